"""Attention to listed keys as torch sees it: opcheck, gradcheck, compile, vmap, second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.retrieval import IndexedCase

OPS = torch.ops.attnforge


def small(**more: Any) -> Any:
    inputs = IndexedCase(batch=1, keys=12, entries=6, **more).make()
    return inputs.with_(k=inputs.k.nan_to_num(0.2), v=inputs.v.nan_to_num(0.2))


@pytest.mark.plain_memory
def test_opcheck(backend: str) -> None:
    x = small()
    o = x.options
    lists = (o["ids"], o["lens"], o["log_bias"], None, None, 0.3)
    args = (x.q, x.k, x.v, *lists)
    torch.library.opcheck(OPS.indexed_fwd.default, (*args, True, backend))
    saved = OPS.indexed_fwd(*args, True, backend)
    torch.library.opcheck(
        OPS.indexed_bwd.default, (x.dout, x.dlse, *args[:3], *saved, *lists, backend)
    )


@pytest.mark.parametrize("lists", ["one", "kv", "query"])
def test_gradcheck(lists: str) -> None:
    x = small(dtype=torch.float64, head_dim=8, lists=lists, order="any")
    bias = torch.randn(x.options["ids"].shape, dtype=torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor, log_bias: Tensor) -> Any:
        out, lse = attnforge.indexed_attention(
            q, k, v, ids=x.options["ids"], log_bias=log_bias, return_lse=True
        )
        return out, lse.nan_to_num(neginf=0.0)

    tensors = tuple(t.detach().requires_grad_() for t in (x.q, x.k, x.v, bias))
    assert torch.autograd.gradcheck(call, tensors)


def test_second_order_is_an_error() -> None:
    x = small()
    q = x.q.requires_grad_()
    out = attnforge.indexed_attention(q, x.k, x.v, **x.options)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        grad.sum().backward()


def test_compile_and_vmap(cpu: str) -> None:
    x = small()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnforge.indexed_attention(q, k, v, **x.options)

    want = call(x.q, x.k, x.v)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q = x.q.clone().requires_grad_()
    got = compiled(q, x.k, x.v)
    torch.testing.assert_close(got.detach(), want)
    got.sum().backward()
    assert q.grad is not None
    stacked = [t.expand(3, *t.shape) for t in (x.q, x.k, x.v)]
    for one in torch.vmap(call)(*stacked):
        torch.testing.assert_close(one, want)
