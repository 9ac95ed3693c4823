"""The paged operators as torch sees them: opcheck, compile, explain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge.testing.paged import PagedCase

OPS = torch.ops.attnforge


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.plain_memory
@pytest.mark.parametrize("code", ["", "int8"])
def test_opcheck(backend: str, code: str) -> None:
    # check 77
    inputs = PagedCase(lengths=(20, 9), rows=(2, 2), code=code, head_dim=16, page_size=4).make()
    o = inputs.options
    scales = [x.view(1, 1, -1) for x in o["kv_scales"]] if code else [None, None]
    cache = (o["block_table"].clamp(0, 5), o["cache_seqlens"], *scales, None, None)
    pages = [x if code else x.nan_to_num(1.0) for x in (inputs.k_pages, inputs.v_pages)]
    plan = (2, 0.25, -1, 0, 0.0, 0, ints(0, 1, 0, 0, 20, 9).view(3, 2), ints(0, 1, 2), backend)
    torch.library.opcheck(OPS.paged_fwd.default, (inputs.q, *pages, *cache, *[None] * 4, *plan))
    groups = (ints(0, 1, 2), ints(4, 0))
    cascade = (inputs.q, *pages, *groups, *cache, None, None, 2, 0.25, 0.0, 0, backend)
    torch.library.opcheck(OPS.cascade_fwd.default, cascade)
    k = torch.randn(2, 3, 2, 16)
    bounds = [torch.zeros(pages[0].shape[0], 2, 16) for _ in range(2)]
    append = (k, k.clone(), *pages, torch.arange(8).view(2, 4).int(), ints(1, 5), *scales, None,
              None, None, None, None, None, False, *bounds, backend)  # fmt: skip
    torch.library.opcheck(OPS.paged_append.default, append)


def test_compiled_decode_step() -> None:
    # check 78: append and attend in one graph, with the pages changed in place
    inputs = PagedCase(lengths=(21, 10), rows=(1, 1), head_dim=16).make()
    o = inputs.options
    k, v = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)

    def step(k_pages: torch.Tensor, v_pages: torch.Tensor) -> Any:
        lengths = o["cache_seqlens"]
        table = o["block_table"]
        attnforge.paged_append(k, v, k_pages, v_pages, block_table=table, cache_seqlens=lengths - 1)
        return attnforge.paged_attention(
            inputs.q, k_pages, v_pages, block_table=table, cache_seqlens=lengths
        )

    eager = [inputs.k_pages.clone(), inputs.v_pages.clone()]
    compiled = [x.clone() for x in eager]
    want = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(got, want)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_explain() -> None:
    shapes = {"block_table": (2, 4), "cache_seqlens": (2,)}
    found = attnforge.explain(
        attnforge.paged_attention, (2, 1, 8, 64), (9, 16, 2, 64), (9, 16, 2, 64), dtype="bf16",
        **shapes,
    )  # fmt: skip
    assert found.decisions[0].request.op == "paged_fwd"
    odd = attnforge.explain(attnforge.paged_attention, (2, 1, 8, 52), (9, 16, 2, 52),
                            (9, 16, 2, 52), **shapes)  # fmt: skip
    assert odd.chosen is not None
    assert odd.chosen.id == "reference.paged.fwd"
