"""Sequence-parallel linear attention on 1 to 4 processes (gloo) against one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from attnforge.distributed import linear_sp


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_equal_one_process(run_ranks: Callable[[str], None]) -> None:
    # one start of 4 processes; groups of 1, 2 and 3 of them run inside
    run_ranks("linear_sp_process.py")


def test_needs_a_process_group() -> None:
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match=r"linear_sp.linear_attention: no process group; want"):
        linear_sp.linear_attention(x, x, x)
