"""Split-KV plans: every key exactly once, few pieces, arrays that stay in place."""

from __future__ import annotations

import ctypes
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from attnforge import _host


def columns(plan: Any, batch: int, pieces: int) -> tuple[list[int], ...]:
    flat = memoryview(plan).tolist()
    assert len(flat) == 3 * pieces + batch + 1
    return (
        flat[:pieces],
        flat[pieces : 2 * pieces],
        flat[2 * pieces : 3 * pieces],
        flat[-batch - 1 :],
    )


@given(
    lengths=st.lists(st.integers(0, 300), max_size=6),
    spare=st.integers(0, 10),
    page=st.sampled_from([1, 3, 16]),
)
def test_every_key_once(lengths: list[int], spare: int, page: int) -> None:
    batch = 6
    plan = _host.SplitPlan(batch, batch + spare, page)
    plan.plan([300] * batch)  # leftovers of another plan must not show
    plan.plan(lengths)
    sequence, begin, end, first = columns(plan, batch, batch + spare)
    used = first[-1]
    assert all(s == -1 for s in sequence[used:])
    for i, length in enumerate([*lengths, *[0] * (batch - len(lengths))]):
        own = range(first[i], first[i + 1])
        assert all(sequence[p] == i for p in own)
        assert all(0 < end[p] - begin[p] <= plan.piece and begin[p] % page == 0 for p in own)
        covered = [t for p in own for t in range(begin[p], end[p])]
        assert covered == list(range(length))
    shorter = plan.piece - page
    if shorter:  # the least size that fits
        assert sum(-(-n // shorter) for n in lengths) > batch + spare


def test_fixed_pieces_do_not_depend_on_the_batch() -> None:
    plan = _host.SplitPlan(4, 40, 16)

    def own(lengths: list[int], at: int) -> list[tuple[int, int]]:
        plan.plan(lengths, fixed=32)
        _, begin, end, first = columns(plan, 4, 40)
        return [(begin[p], end[p]) for p in range(first[at], first[at + 1])]

    assert own([70], 0) == own([500, 0, 70, 1], 2) == [(0, 32), (32, 64), (64, 70)]


def test_the_table_stays_in_place() -> None:
    plan = _host.SplitPlan(3, 5, 4)
    view = memoryview(plan)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    for lengths in ([9, 1], [100, 100, 100], []):
        plan.plan(lengths)
        assert ctypes.addressof(ctypes.c_char.from_buffer(memoryview(plan))) == address
    assert view[-1] == 0
    del plan
    assert view[0] == -1  # the view keeps the plan alive


@pytest.mark.parametrize(
    ("lengths", "fixed", "message"),
    [
        ([1, 1, 1], 0, "3 lengths, but the plan was made for max_batch 2"),
        ([-1], 0, "length -1 is not in"),
        ([1 << 31], 0, "length 2147483648 is not in"),
        ([8], 3, "fixed 3 is not a multiple of page_size 2"),
        ([8], 2, "fixed 2 tokens are 4, more than max_pieces 3"),
    ],
)
def test_what_is_refused(lengths: list[int], fixed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _host.SplitPlan(2, 3, 2).plan(lengths, fixed)
    with pytest.raises(ValueError, match="max_pieces at least max_batch"):
        _host.SplitPlan(2, 1, 2)
