"""Planned splits: any plan gives the results of none, up to the order of sums, and its numbers may
change from call to call.

``tests/cuda`` and ``tests/triton`` run the same, and what is not named a test here: on a GPU nobody
looks at the numbers of a plan before the kernels do.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnforge
from attnforge._params import PagedCache, PagedParams
from attnforge.testing.cases import Target
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.paged import PagedCase, PagedInputs, planned
from attnforge.testing.poison import guarded

LENGTHS = (150, 0, 47, 1)
ONE_HEAD: dict[str, Any] = {"page_size": 8, "heads_q": 2, "heads_k": 1}
# Ends of pieces of these lengths: few and uneven, inside pages and tiles; one each; many.
CUTS = {
    "uneven": ((16, 101, 150), (), (47,), (1,)),
    "whole": ((150,), (), (47,), (1,)),
    "many": ((*range(9, 150, 9), 150), (), (*range(1, 47, 5), 47), (1,)),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("options", [
    {}, {"dtype": torch.bfloat16, "heads_q": 12}, {"dtype": torch.float16, "v_head_dim": 64},
    {"code": "fp8", "page_size": 3}, {"code": "int8", "scales": "token", "zeros": True},
    {"code": "int4", "scales": "page", "dtype": torch.bfloat16, "layout": "HND", "strided": True},
    {"window": (40, 0), "sinks": True}, {"window": (9, 3), "causal": False, "softcap": 5.0},
    {"alibi": True, "sinks": True, "softcap": 4.0}, {"rows": (3,) * 4, "tree": True},
    {"lengths": ((150, 3), (0, 0), (47, 46), (1, 1)), "rows": (2,) * 4, "sinks": True},
    {"rows": (1, 2, 0, 1), "sinks": True}, {"heads_q": 2, "rows": (70, 1, 9, 2)},
], ids=lambda o: "_".join(o) or "plain")  # fmt: skip
def test_any_plan(target: Target, options: dict[str, Any], cuts: str) -> None:
    base: dict[str, Any] = {"lengths": LENGTHS, "rows": (1,) * 4, "page_size": 8}
    inputs = PagedCase(**{**base, **options}).make()
    plan = planned(CUTS[cuts], 50, batch=6)  # room for more pieces and sequences
    got = inputs.forward(target.backend, split_plan=plan)
    compare(got, inputs.truth(target.rounded), cuts).check()


def test_one_piece_is_no_split(target: Target) -> None:
    inputs = PagedCase(lengths=LENGTHS, rows=(2,) * 4, page_size=8, dtype=torch.bfloat16).make()
    got = inputs.forward(target.backend, split_plan=planned(CUTS["whole"], 3))
    assert_same(got, inputs.forward(target.backend, num_splits=1))


def test_new_numbers_in_the_same_tensors(target: Target) -> None:
    """As a captured graph has it: each step has the bits of a plan that was made for it alone."""
    inputs = PagedCase(lengths=LENGTHS, rows=(1,) * 4, sinks=True, **ONE_HEAD).make()
    held = planned(CUTS["many"], 64)
    found = {}
    for cuts, lengths in (("many", LENGTHS), ("uneven", LENGTHS), ("whole", LENGTHS),
                          ("many", LENGTHS), ("less", (0, 0, 20, 1))):  # fmt: skip
        step = inputs.with_(cache_seqlens=torch.tensor(lengths, dtype=torch.int32))
        fresh = planned(CUTS.get(cuts, ((), (), (8, 20), (1,))), 64)
        for mine, new in zip(held, fresh, strict=True):
            mine.copy_(new)
        got = step.forward(target.backend, split_plan=held)
        assert_same(got, step.forward(target.backend, split_plan=fresh), cuts)
        if cuts == "less":
            assert not got["out"][:2].any()
            assert same_bits(got["lse"][:2, :, 0], inputs.options["sinks"].repeat(2, 1))
        else:
            compare(got, step.truth(target.rounded), cuts).check()
            assert_same(got, found.setdefault(cuts, got), "the same plan as before")


def alone(inputs: PagedInputs, b: int) -> PagedInputs:
    return inputs.with_(q=inputs.q[b : b + 1], **{
        n: inputs.options[n][b : b + 1] for n in ("block_table", "cache_seqlens")
    })  # fmt: skip


def test_neighbours_change_nothing(target: Target) -> None:
    """A sequence's bits follow its own pieces, wherever they stand in the plan."""
    inputs = PagedCase(lengths=LENGTHS, rows=(2,) * 4, **ONE_HEAD).make()
    whole = inputs.forward(target.backend, split_plan=planned(CUTS["many"], 60))
    for b, ends in enumerate(CUTS["many"]):
        mine = {name: x[b : b + 1] for name, x in whole.items()}
        got = alone(inputs, b).forward(target.backend, split_plan=planned([ends], 45))
        if target.exact:
            assert_same(got, mine, str(b))
        torch.testing.assert_close(got, mine)


def test_a_stale_plan_is_named(target: Target) -> None:
    inputs = PagedCase(lengths=LENGTHS, rows=(1,) * 4).make()
    longer = inputs.options["cache_seqlens"] + torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cuts sequence 0 .* for 151 keys.*plan again for these"):
        inputs.with_(cache_seqlens=longer).forward(
            target.backend, split_plan=planned(CUTS["uneven"], 9)
        )


def test_room_for_no_piece(target: Target) -> None:
    inputs = PagedCase(lengths=(0, 0), rows=(1, 1)).make()
    got = inputs.forward(target.backend, split_plan=planned(((), ()), 0))
    assert not got["out"].any()
    assert (got["lse"] == -torch.inf).all()


@pytest.mark.parametrize("options", [
    {"window": (60, 0), "sinks": True}, {"code": "int8", "scales": "token", "zeros": True},
], ids=lambda o: "_".join(o))  # fmt: skip
def as_on_the_cpu(target: Target, options: dict[str, Any]) -> None:
    """The CPU kernel's results, from the same plan."""
    inputs = PagedCase(lengths=LENGTHS, rows=(1,) * 4, page_size=8, **options).make()
    for cuts in CUTS.values():
        plan = planned(cuts, 50)
        got, want = (inputs.forward(x, split_plan=plan) for x in (target.backend, "cpu"))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def many_steps(target: Target) -> None:
    """A decode as the cache and the planner have it: prompts, then tokens, one plan in place."""
    pytest.importorskip("attnforge._host", reason="attnforge._host is not built (make native)")
    cache = attnforge.PagedKVCache(60, 4, 2, 16, dtype=torch.float32)
    names = [cache.allocate() for _ in range(3)]
    plan = attnforge.paged_cache.SplitPlan(4, 12, cache.page_size)
    for n in range(4):
        rows = [90, 3, 17] if n == 0 else [1] * len(names)
        step = cache.begin(names, rows)
        step.append(*torch.randn(2, sum(rows), 2, 16))
        plan.plan(step.seqlens_after)
        q = torch.randn(sum(rows), 4, 16)
        got = step.attention(q, split_plan=plan.tensors, backend=target.backend)
        want = step.attention(q, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        if n == 2:  # one has left: its pieces go to the others
            cache.free(names.pop(0))


# ---- past the checks of values ----

INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1
OWNER, BEGIN, END = range(3)


def launched(
    target: Target, inputs: PagedInputs, plan: tuple[Tensor, Tensor], sinks: Tensor | None = None
) -> dict[str, Tensor]:
    """A batched call past the checks, the plan before guard pages."""
    name = {"emulated": "cuda"}.get(target.backend, target.backend)
    launcher = importlib.import_module(f"attnforge.backends.{name}.paged").fwd
    o, q = inputs.options, inputs.q
    cache = PagedCache(inputs.k_pages, inputs.v_pages, o["block_table"], o["cache_seqlens"])
    p = PagedParams(None, None, sinks, None, q.shape[1], q.shape[-1] ** -0.5, -1, 0, 0.0, 0,
                    *map(guarded, plan))  # fmt: skip
    out = q.new_empty((*q.shape[:-1], inputs.v_pages.shape[-1]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]))
    launcher(q, cache, p, out, lse)
    return {"out": out, "lse": lse}


def of(result: dict[str, Tensor], sequences: list[int]) -> dict[str, Tensor]:
    return {name: x[sequences] for name, x in result.items()}


def nothing(result: dict[str, Tensor], b: int) -> bool:
    return not result["out"][b].any() and bool((result["lse"][b] == -torch.inf).all())


@pytest.mark.parametrize("rows", [2, 20])
def unchecked_numbers(target: Target, rows: int) -> None:
    """Piece 2, sequence 0's last, with numbers that the planner never writes."""
    inputs = PagedCase(lengths=LENGTHS, rows=(rows,) * 4, **ONE_HEAD).make()
    plan = planned(CUTS["uneven"], 8)
    want = launched(target, inputs, plan)
    assert_same(want, inputs.forward(target.backend, split_plan=plan))
    lost = None
    for field, number in (
        *((OWNER, n) for n in (-1, 2, 4, INT_MIN, INT_MAX)),
        *((BEGIN, n) for n in (150, INT_MAX)), *((END, n) for n in (101, -1, INT_MIN)),
    ):  # fmt: skip
        pieces = plan[0].clone()
        pieces[field, 2] = number
        got = launched(target, inputs, (pieces, plan[1]))
        assert_same(of(got, [1, 2, 3]), of(want, [1, 2, 3]), str(number))
        assert not same_bits(got["out"][0], want["out"][0])  # its last keys are not there
        lost = lost or got
        assert_same(got, lost, str((field, number)))
    for field, number in ((END, 151), (END, INT_MAX)):
        pieces = plan[0].clone()
        pieces[field, 2] = number
        assert_same(launched(target, inputs, (pieces, plan[1])), want, str(number))


def unchecked_ranges(target: Target) -> None:
    """Which pieces are a sequence's: those within the plan that say so as well."""
    inputs = PagedCase(lengths=LENGTHS, rows=(2,) * 4, **ONE_HEAD).make()
    pieces, first = planned(CUTS["uneven"], 8)
    want = launched(target, inputs, (pieces, first))
    for number in (4, 9, INT_MAX):
        wide = first.clone()
        wide[1] = number
        assert_same(launched(target, inputs, (pieces, wide)), want, str(number))
    for number in (0, -1, INT_MIN):
        narrow = first.clone()
        narrow[1] = number
        got = launched(target, inputs, (pieces, narrow))
        assert nothing(got, 0)
        assert_same(of(got, [1, 2, 3]), of(want, [1, 2, 3]), str(number))


def no_pieces(target: Target) -> None:
    """A plan that has none for a sequence: as one without keys, its sink among it."""
    inputs = PagedCase(lengths=LENGTHS, rows=(2,) * 4, **ONE_HEAD).make()
    sinks = torch.randn(inputs.q.shape[2])
    for plan in (planned(((), (), (47,), (1,)), 5), planned(((), (), (), ()), 0)):
        got = launched(target, inputs, plan)
        assert all(nothing(got, b) for b in (0, 1))
        assert nothing(got, 2) == (plan[0].shape[1] == 0)
        got = launched(target, inputs, plan, sinks)
        assert not got["out"][:2].any()
        assert same_bits(got["lse"][:2], sinks.view(1, -1, 1).expand(2, -1, 2).contiguous())


def any_numbers(target: Target) -> None:
    """Whatever a plan holds: no access out of bounds, and nothing that nobody has written."""
    inputs = PagedCase(lengths=LENGTHS, rows=(1,) * 4, **ONE_HEAD).make()
    extremes = st.sampled_from([INT_MIN, -1, 2147480000, INT_MAX])

    def numbers(most: int, count: int) -> Any:
        one = st.one_of(st.integers(-1, most), st.integers(0, most), extremes)
        return st.lists(one, min_size=count, max_size=count).map(
            lambda x: torch.tensor(x, dtype=torch.int32)
        )

    @settings(max_examples=15)
    @given(numbers(4, 7), numbers(160, 7), numbers(160, 7), numbers(8, 5))
    def call(owner: Tensor, begin: Tensor, end: Tensor, first: Tensor) -> None:
        got = launched(target, inputs, (torch.stack((owner, begin, end)), first))
        assert got["out"].isfinite().all()
        assert (got["lse"] < torch.inf).all()

    call()
