"""Index tensors are data: one test per check of hostile values, 38 to 44.

On the CPU an operator refuses each of them by name. What it hands to a kernel elsewhere is not
looked at: there, and so for the launchers themselves, invalid entries are masked or clamped, and
other sequences keep their bits. Pools and tables stand between guard pages. (Check 45, hash codes
out of range, is of the tables of LSH: ``test_lsh.py``.)
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import attnforge
from attnforge._params import PagedCache, PagedParams
from attnforge.testing.cases import Target
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.paged import PagedCase, PagedInputs
from attnforge.testing.poison import guarded

INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1


def unchecked(inputs: PagedInputs, target: Target, **more: Any) -> dict[str, torch.Tensor]:
    """A batched call past the checks of values, its inputs between guard pages."""
    launcher = importlib.import_module(f"attnforge.backends.{target.backend}.paged").fwd
    o = {**inputs.options, **more}
    q, k, v = (guarded(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages))
    table, lengths = guarded(o["block_table"]), guarded(o["cache_seqlens"])
    p = PagedParams(None, None, None, None, q.shape[1], q.shape[-1] ** -0.5, -1, 0, 0.0)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]))
    launcher(q, PagedCache(k, v, table, lengths), p, out, lse)
    return {"out": out, "lse": lse}


def second(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: x[1] for n, x in result.items()}


def refused(inputs: PagedInputs, target: Target, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"attnforge\.paged_attention: " + text):
        inputs.forward(target.backend)


@pytest.mark.parametrize("bad", [-1, INT_MIN, 11, 2147480000, INT_MAX])
@pytest.mark.parametrize("rows", [1, 20, 120])
def test_check_38_page_ids_that_do_not_exist(target: Target, bad: int, rows: int) -> None:
    inputs = PagedCase(lengths=(70, 33), rows=(rows, rows)).make()
    assert inputs.k_pages.shape[0] == 11
    table = inputs.options["block_table"].clone()
    table[0, 2] = bad
    wrong = inputs.with_(block_table=table)
    refused(wrong, target, rf"block_table\[0, 2\] is {bad}; got 11 pages")
    want = inputs.forward(target.backend)
    assert_same(second(unchecked(wrong, target)), second(want))
    assert_same(unchecked(inputs, target), want)


def test_check_39_tables_that_share_pages(target: Target) -> None:
    inputs = PagedCase(lengths=(64, 64), rows=(3, 3), page_size=8).make()
    table = inputs.options["block_table"].clone()
    table[1] = table[0]
    q = inputs.q.clone()
    q[1] = q[0]
    shared = inputs.with_(block_table=table, q=q)
    got = shared.forward(target.backend)
    compare(got, shared.truth()).check()
    assert same_bits(got["out"][0], got["out"][1])


@pytest.mark.parametrize("length", [113, INT_MAX])
@pytest.mark.parametrize("rows", [1, 20, 120])
def test_check_40_lengths_that_the_table_has_no_room_for(
    target: Target, length: int, rows: int
) -> None:
    inputs = PagedCase(lengths=(112, 33), rows=(rows, rows)).make()
    table = inputs.options["block_table"][:, :7].contiguous()
    inputs = inputs.with_(block_table=table)
    lengths = torch.tensor([length, 33], dtype=torch.int32)
    wrong = inputs.with_(cache_seqlens=lengths)
    refused(wrong, target, rf"cache_seqlens\[0\] is {length}; got a block_table with room for 112")
    assert_same(unchecked(wrong, target), inputs.forward(target.backend))  # clamped to the room


@pytest.mark.parametrize("length", [-1, INT_MIN])
@pytest.mark.parametrize("rows", [1, 20, 120])
def test_check_41_negative_lengths(target: Target, length: int, rows: int) -> None:
    inputs = PagedCase(lengths=(70, 33), rows=(rows, rows)).make()
    wrong = inputs.with_(cache_seqlens=torch.tensor([length, 33], dtype=torch.int32))
    refused(wrong, target, rf"cache_seqlens\[0\] is {length}; got a block_table")
    got = unchecked(wrong, target)
    assert_same(second(got), second(inputs.forward(target.backend)))
    assert not got["out"][0].any()  # as a sequence without keys
    assert (got["lse"][0] == -torch.inf).all()


def packed(ends: torch.Tensor, **more: Any) -> PagedInputs:
    """Two sequences of 9 packed rows in all."""
    inputs = PagedCase(lengths=(70, 33)).make()
    return inputs.with_(q=torch.randn(9, 4, 32), cu_seqlens_q=ends, **more)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_check_42_boundaries_that_decrease(target: Target) -> None:
    refused(packed(ints(0, 7, 3)), target, "cu_seqlens_q decreases at entry 2")


@pytest.mark.parametrize(("ends", "text"), [
    (ints(0, 4, 10), "cu_seqlens_q ends at 10; got 9 rows"),
    (ints(0, 4, INT_MAX), "cu_seqlens_q ends at 2147483647; got 9 rows"),
    (ints(1, 4, 9), "cu_seqlens_q starts at 1"),
    (ints(-3, 4, 9), "cu_seqlens_q starts at -3"),
    (ints(0, 9), r"cu_seqlens_q has shape \(2,\); want \[batch \+ 1\] = \(3,\)"),
    (ints(0, 4, 9).long(), "cu_seqlens_q has dtype int64; want int32"),
    (ints(0, 4, 9).to("meta"), "cu_seqlens_q is on meta; want cpu"),
], ids=["beyond", "INT_MAX", "late", "negative", "short", "int64", "device"])  # fmt: skip
def test_check_43_boundaries_that_do_not_fit(target: Target, ends: torch.Tensor, text: str) -> None:
    refused(packed(ends), target, text)


def test_check_44_a_bound_below_the_longest_sequence(target: Target) -> None:
    refused(packed(ints(0, 6, 9), max_seqlen_q=5), target, "max_seqlen_q is 5; got a sequence of 6")


def test_appends_refuse_the_same(target: Target) -> None:
    """Writing is where a wrong id would cost another request its data."""
    new = torch.randn(2, 3, 2, 16)
    pages = [torch.randn(4, 16, 2, 16) for _ in range(2)]
    before = [x.clone() for x in pages]
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    for bad in (-1, INT_MIN, 4, 2147480000):
        wrong = table.clone()
        wrong[1, 0] = bad
        with pytest.raises(ValueError, match=rf"paged_append: block_table\[1, 0\] is {bad}"):
            attnforge.paged_append(new, new, *pages, block_table=wrong, cache_seqlens=ints(0, 5),
                                   backend=target.backend)  # fmt: skip
    for bad in (-1, INT_MIN, 30, INT_MAX):
        with pytest.raises(ValueError, match=r"paged_append: (cache_seqlens\[1\]|sequence 1)"):
            attnforge.paged_append(new, new, *pages, block_table=table, cache_seqlens=ints(0, bad),
                                   backend=target.backend)  # fmt: skip
    assert all(same_bits(x, y) for x, y in zip(pages, before, strict=True))
