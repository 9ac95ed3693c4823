"""Planned splits: the pieces of `SplitPlan` are those that decode runs over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge.paged_cache import SplitPlan
from attnforge.testing.cases import Target
from attnforge.testing.compare import compare, same_bits
from attnforge.testing.paged import PagedCase, PagedInputs


def longest(inputs: PagedInputs) -> torch.Tensor:
    lengths: torch.Tensor = inputs.options["cache_seqlens"]
    return lengths


def planned(inputs: PagedInputs, pieces: int, **options: Any) -> SplitPlan:
    plan = SplitPlan(8, pieces, inputs.case.page_size)  # of a larger batch than that of the call
    plan.plan(longest(inputs), **options)
    return plan


@pytest.mark.parametrize("options", [
    {}, {"code": "int8", "scales": "token"}, {"rows": (2,) * 4, "window": (900, 0)},
    {"rows": (1, 40, 2, 1)}, {"lengths": ((4500, 9), (0, 2048), (5, 5), (2047, 2049))},
], ids=lambda o: "_".join(o) or "plain")  # fmt: skip
def test_pieces_of_2048_are_the_default_bit_for_bit(
    target: Target, options: dict[str, Any]
) -> None:
    base: dict[str, Any] = {"lengths": (4500, 0, 2048, 2049), "rows": (1,) * 4, "head_dim": 16}
    inputs = PagedCase(**{**base, **options}).make()
    plan = planned(inputs, 16, fixed=2048)
    want = inputs.forward(target.backend)
    got = inputs.forward(target.backend, split_plan=plan.tensors)
    assert all(same_bits(got[n], want[n]) for n in want)


@pytest.mark.parametrize("pieces", [8, 13, 64])
@pytest.mark.parametrize("options", [
    {}, {"code": "int4", "scales": "page"}, {"sinks": True, "window": (40, 0)},
    {"lengths": ((300, 3), (0, 0), (47, 64), (1, 150)), "rows": (2,) * 4},
], ids=lambda o: "_".join(o) or "plain")  # fmt: skip
def test_balanced_pieces(target: Target, pieces: int, options: dict[str, Any]) -> None:
    base: dict[str, Any] = {"lengths": (300, 0, 47, 1), "rows": (1,) * 4, "page_size": 4}
    inputs = PagedCase(**{**base, **options}).make()
    plan = planned(inputs, pieces)
    got = inputs.forward(target.backend, split_plan=plan.tensors)
    compare(got, inputs.truth()).check()


def test_the_kernel_cuts_where_the_plan_says(level: Target) -> None:
    """Bits follow the pieces: sums of another order differ, those of equal pieces do not."""
    inputs = PagedCase(lengths=(3000, 3000), rows=(1, 1), head_dim=64).make()
    plan = planned(inputs, 40, fixed=160)
    small = inputs.forward("cpu", split_plan=plan.tensors)["out"]
    assert not torch.equal(small, inputs.forward("cpu")["out"])
    assert same_bits(
        small, inputs.forward("cpu", split_plan=planned(inputs, 45, fixed=160).tensors)["out"]
    )
    halves = planned(inputs, 8, fixed=1504)
    equal = inputs.forward("cpu", num_splits=2)["out"]  # of 1500 keys
    assert not torch.equal(inputs.forward("cpu", split_plan=halves.tensors)["out"], equal)
    # num_splits gives way, and a fixed plan of one sequence does not depend on its neighbours
    assert same_bits(small, inputs.forward("cpu", split_plan=plan.tensors, num_splits=2)["out"])
    alone = PagedCase(lengths=(3000, 40), rows=(1, 1), head_dim=64).make()
    mixed = inputs.with_(cache_seqlens=longest(alone))
    plan.plan(longest(alone), fixed=160)
    assert same_bits(mixed.forward("cpu", split_plan=plan.tensors)["out"][0], small[0])


def test_planned_once_run_by_every_layer() -> None:
    """The tensors stay where they are; a stale plan is named; `Step.attention` hands one on."""
    cache = attnforge.PagedKVCache(40, 4, 2, 16, dtype=torch.float32, num_layers=2)
    names = [cache.allocate() for _ in range(3)]
    plan = SplitPlan(4, 9, cache.page_size)
    addresses = [x.data_ptr() for x in plan.tensors]
    for rows in ([30, 1, 9], [1, 1, 1]):
        step = cache.begin(names, rows)
        plan.plan(step.seqlens_after)
        assert [x.data_ptr() for x in plan.tensors] == addresses
        assert int(plan.tensors[1][3]) <= 9
        assert plan.piece % 4 == 0
        for layer in range(2):
            new = torch.randn(sum(rows), 2, 16), torch.randn(sum(rows), 2, 16)
            step.append(*new, layer=layer)
            q = torch.randn(sum(rows), 4, 16)
            torch.testing.assert_close(
                step.attention(q, layer=layer, split_plan=plan.tensors),
                step.attention(q, layer=layer), rtol=2e-5, atol=2e-6,
            )  # fmt: skip
    later = cache.begin(names, 1)
    later.append(torch.randn(3, 1, 2, 16), torch.randn(3, 1, 2, 16))
    with pytest.raises(ValueError, match=r"cuts sequence 0 .* plan again for these lengths"):
        later.attention(torch.randn(3, 1, 4, 16), split_plan=plan.tensors)
