"""Sequence-parallel linear attention on 1 to 4 processes (gloo) against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from attnforge.distributed import linear_sp

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_equal_one_process(tmp_path: Path) -> None:
    # one start of 4 processes; groups of 1, 2 and 3 of them run inside
    script = Path(__file__).with_name("linear_sp_process.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "4", str(tmp_path / "store")],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, text in zip(ranks, said, strict=True):
        assert rank.returncode == 0, text
        assert text.strip().endswith("fine")


def test_needs_a_process_group() -> None:
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match=r"linear_sp.linear_attention: no process group; want"):
        linear_sp.linear_attention(x, x, x)
