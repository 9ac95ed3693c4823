"""Contextual positions under torch: gradcheck, compile, vmap, opcheck, errors, explain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import attnforge


def inputs(dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    shapes = ((2, 9, heads, 6), (2, 9, 2, 6), (2, 9, 2, 6), (heads, 6, 4))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (4, 2)}])
def test_gradcheck(options: dict[str, Any]) -> None:
    tensors = tuple(x.requires_grad_() for x in inputs(torch.float64, heads=4))

    def call(*x: Tensor) -> Any:
        return attnforge.cope_attention(*x, **options, return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(call, tensors)


def test_the_papers_code() -> None:
    """The formula as the paper prints it, gates and interpolation, on plain tensors."""
    q, k, v, emb = inputs(torch.float64)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / 6**0.5
    logits += torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
    pos = torch.sigmoid(logits).flip(-1).cumsum(dim=-1).flip(-1).clamp(max=3)
    ceil, floor = pos.ceil().long(), pos.floor().long()
    table = q @ emb
    w = pos - floor
    logits = logits + table.gather(-1, ceil) * w + table.gather(-1, floor) * (1 - w)
    want = torch.softmax(logits, -1) @ v
    got = attnforge.cope_attention(*(x.transpose(1, 2) for x in (q, k, v)), emb, causal=True)
    assert torch.allclose(got.transpose(1, 2), want, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_whole(backend: str) -> None:
    tensors = tuple(x.bfloat16() if i < 3 else x for i, x in enumerate(inputs()))
    wide = tuple(torch.nn.functional.pad(x, (0, 2)) for x in tensors[:3])
    emb = torch.nn.functional.pad(tensors[3], (0, 0, 0, 2))

    def call(*x: Tensor) -> Tensor:
        out: Tensor = attnforge.cope_attention(*x, causal=True, backend=backend)
        return out

    grads = []
    for fn in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (*wide, emb)]
        grads.append(torch.autograd.grad(fn(*leaves).float().square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


def test_operator() -> None:
    q, k, v, emb = inputs()
    rest = (None, None, None, 9, 9, 0.4, -1, 0, False, "reference")
    opcheck(torch.ops.attnforge.cope_fwd.default, (q, k, v, emb, *rest))


def test_vmap_runs_slice_by_slice() -> None:
    q, k, v, emb = inputs()
    many = torch.stack((q, 2 * q, q - 1))

    def call(x: Tensor) -> Tensor:
        out: Tensor = attnforge.cope_attention(x, k, v, emb, causal=True)
        return out

    want = torch.stack([call(x) for x in many])
    assert torch.allclose(torch.vmap(call)(many), want, atol=1e-6)


def test_no_second_order() -> None:
    q, k, v, emb = (x.requires_grad_() for x in inputs())
    out = attnforge.cope_attention(q, k, v, emb)
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cope_bwd: the backward has no derivative"):
        first.sum().backward()


CU = torch.tensor([0, 9], dtype=torch.int32)
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "table_heads": ({"pos_emb": torch.ones(3, 6, 4)}, r"has shape \(3, 6, 4\); want \[2\|1"),
    "table_dim": ({"pos_emb": torch.ones(5, 4)}, r"want \[2\|1, 6, 4\]"),
    "no_positions": ({"pos_emb": torch.ones(6, 0)}, "at least one position"),
    "kind": ({"pos_emb": [1.0]}, "pos_emb must be a tensor"),
    "one_cu": ({"cu_seqlens_q": CU}, "want both, or neither"),
    "packed_4d": ({"cu_seqlens_q": CU, "cu_seqlens_k": CU}, "q has 4 dims"),
    "used": ({"seqused_k": torch.tensor([9, 10], dtype=torch.int32)}, "seqused_k"),
    "window": ({"window_size": 3}, "window_size is 3"),
    "softcap": ({"softcap": 3.0}, "unexpected keyword argument 'softcap'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments_get_a_sentence(name: str) -> None:
    changes, text = ERRORS[name]
    call = dict(zip(("q", "k", "v", "pos_emb"), inputs(), strict=True))
    with pytest.raises((ValueError, TypeError), match=text):
        attnforge.cope_attention(**{**call, **changes})


def test_fp8_is_refused() -> None:
    q, k, v, emb = inputs()
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    with pytest.raises(ValueError, match=r"k has dtype torch\.float8_e4m3fn; want a wider one"):
        attnforge.cope_attention(q, k, v, emb)


def test_explain() -> None:
    shapes = ((1, 64, 4, 64), (1, 64, 2, 64), (1, 64, 2, 64), (1, 64, 16))
    found = attnforge.explain(attnforge.cope_attention, *map(torch.empty, shapes), causal=True)
    assert [d.request.op for d in found.decisions] == ["cope_fwd", "cope_bwd"]
    assert all(d.chosen is not None for d in found.decisions)
