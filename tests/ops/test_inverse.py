"""invert_selection against a walk over the lists."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge import BlockSelection


@pytest.mark.parametrize("counted", [False, True])
def test_rows_of_each_block(counted: bool) -> None:
    ids = torch.randint(-2, 9, (2, 3, 11, 5))
    counts = torch.randint(0, 6, (2, 3, 11)) if counted else None
    lists = BlockSelection.from_indices(ids, q_block=2, kv_block=16, counts=counts)
    starts, rows = attnforge.invert_selection(lists, 7)
    assert starts.shape == (2, 3, 8)
    mask = lists.to_mask(7)
    for b in range(2):
        for h in range(3):
            for j in range(7):
                got = rows[b, h, starts[b, h, j] : starts[b, h, j + 1]]
                assert got.tolist() == mask[b, h, :, j].nonzero().flatten().tolist()
            assert (rows[b, h, starts[b, h, 7] :] == -1).all()


def test_packed() -> None:
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)  # 3, 0 and 4 list rows of 2 queries
    lists = BlockSelection.from_indices(torch.randint(-1, 5, (2, 8, 3)), q_block=2, kv_block=16)
    starts, rows = attnforge.invert_selection(lists, 4, cu_seqlens_q=cu)
    assert starts.shape == (2, 13)
    mask = lists.to_mask(4)
    for h in range(2):
        for b, (first, last) in enumerate(((0, 3), (3, 3), (3, 7))):  # row 7 is nobody's
            for j in range(4):
                got = rows[h, starts[h, 4 * b + j] : starts[h, 4 * b + j + 1]]
                want = mask[h, first:last, j].nonzero().flatten() + first
                assert got.tolist() == want.tolist()


def test_nothing_and_errors() -> None:
    empty = BlockSelection.from_indices(torch.zeros(1, 1, 0, 2).int(), q_block=1, kv_block=8)
    assert attnforge.invert_selection(empty, 3).starts.tolist() == [[[0, 0, 0, 0]]]
    with pytest.raises(ValueError, match="cu_seqlens_q goes with packed lists"):
        attnforge.invert_selection(empty, 3, cu_seqlens_q=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="blocks is -1"):
        attnforge.invert_selection(empty, -1)
