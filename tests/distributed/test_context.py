"""Context-parallel attention on 1 to 4 processes (gloo) against one process; bands by force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from attnforge.distributed import context
from attnforge.distributed._pairs import Piece, band


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_equal_one_process(run_ranks: Callable[[str], None]) -> None:
    run_ranks("context_process.py")


def test_needs_a_process_group() -> None:
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match=r"context.ring_attention: no process group; want"):
        context.ring_attention(x, x, x)


piece = st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(0, 3))


@given(piece, piece, st.integers(-1, 15), st.integers(-1, 15))
def test_bands(q: tuple[int, int, int], k: tuple[int, int, int], left: int, right: int) -> None:
    """Trimmed rows, keys and window are exactly the visible pairs; nothing is kept in vain."""
    mine, theirs = (Piece(start, slice(at, at + n)) for start, n, at in (q, k))
    seen = {
        (mine.rows.start + i, theirs.rows.start + j)
        for i in range(mine.length)
        for j in range(theirs.length)
        if (left < 0 or theirs.start + j >= mine.start + i - left)
        and (right < 0 or theirs.start + j <= mine.start + i + right)
    }
    b = band(mine, theirs, left, right)
    if b is None:
        assert not seen
        return
    rows, keys = (range(s.start, s.stop) for s in (b.rows, b.keys))
    shift = len(keys) - len(rows)
    assert b.window[0] >= 0
    assert b.window[1] >= 0
    found = {
        (i, j)
        for n, i in enumerate(rows)
        for m, j in enumerate(keys)
        if n + shift - b.window[0] <= m <= n + shift + b.window[1]
    }
    assert found == seen
    assert {i for i, _ in seen} >= {rows[0], rows[-1]}
    assert {j for _, j in seen} >= {keys[0], keys[-1]}
