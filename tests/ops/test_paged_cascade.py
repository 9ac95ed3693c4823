"""Cascades are paged attention with shared prefixes read once: the same results, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge.testing.cases import Target
from attnforge.testing.compare import compare
from attnforge.testing.paged import PagedCase, PagedInputs


def shared(case: PagedCase, cu_groups: list[int], prefix_lens: list[int]) -> PagedInputs:
    """A case whose groups have the prefix pages of their first requests."""
    inputs = case.make()
    table = inputs.options["block_table"].clone()
    for g, length in enumerate(prefix_lens):
        if cu_groups[g] < cu_groups[g + 1]:
            pages = length // case.page_size
            table[cu_groups[g] : cu_groups[g + 1], :pages] = table[cu_groups[g], :pages]
    return inputs.with_(block_table=table)


def run(inputs: PagedInputs, groups: list[int], lens: list[int], backend: str) -> dict[str, Any]:
    options = {n: x for n, x in inputs.options.items() if n not in ("causal", "window_size")}
    out, lse = attnforge.cascade_attention(
        inputs.q, inputs.k_pages, inputs.v_pages, return_lse=True, backend=backend,
        cu_groups=torch.tensor(groups, dtype=torch.int32),
        prefix_lens=torch.tensor(lens, dtype=torch.int32), **options,
    )  # fmt: skip
    return {"out": out, "lse": lse}


GROUPS = ([0, 3, 3, 4, 6], [48, 32, 0, 16])


@pytest.mark.parametrize("options", [
    {}, {"dtype": torch.bfloat16}, {"sinks": True, "softcap": 6.0}, {"code": "int8"},
    {"rows": (3, 1, 9, 0, 2, 5)}, {"rows": (2,) * 6, "layout": "HND", "strided": True},
    {"heads_q": 32, "heads_k": 1},
], ids=lambda o: "_".join(o) or "plain")  # fmt: skip
def test_bounds(target: Target, options: dict[str, Any]) -> None:
    base: dict[str, Any] = {"lengths": (60, 90, 57, 30, 21, 150), "rows": (1,) * 6,
                            "page_size": 16, "head_dim": 64}  # fmt: skip
    inputs = shared(PagedCase(**{**base, **options}), *GROUPS)
    compare(run(inputs, *GROUPS, target.backend), inputs.truth(target.rounded)).check()


@pytest.mark.parametrize("prefix", [0, 16, 32, 4096])
def test_prefix_lengths(target: Target, prefix: int) -> None:
    # dense_paged 5.2, 38: no prefix, one page, an empty rest, a long one
    lengths = (prefix, prefix + 1) if prefix else (5, 9)
    case = PagedCase(lengths=lengths, rows=(1, 1), head_dim=32)
    inputs = shared(case, [0, 2], [prefix])
    compare(run(inputs, [0, 2], [prefix], target.backend), inputs.truth(target.rounded)).check()


@pytest.mark.parametrize(("groups", "lens", "text"), [
    ([0, 3], [16], r"cu_groups is \[0, 3\]; want rising boundaries from 0 to 2"),
    ([0, 2], [8], r"prefix_lens\[0\] is 8; got pages of 16"),
    ([0, 2], [-16], r"prefix_lens\[0\] is -16"),
    ([0, 2], [64], r"prefix_lens\[0\] is 64; got pages of 16 and a request whose first query sees"),
    ([0, 2], [16], r"block_table\[1, 0\] is \d+; got page \d+ in request 0 of the same group"),
])  # fmt: skip
def test_errors(groups: list[int], lens: list[int], text: str) -> None:
    inputs = PagedCase(lengths=(50, 40), rows=(1, 1)).make()
    with pytest.raises(ValueError, match=r"attnforge\.cascade_attention: " + text):
        run(inputs, groups, lens, "reference")
