"""Autograd: gradcheck, subsets, retained graphs, checkpointing, modes, autocast, transforms."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnforge
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import assert_same

F64 = torch.float64
GRADCHECKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "softcap": {"softcap": 1.7},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.1], dtype=F64)},
    "used": {"seqused_k": torch.tensor([4, 2], dtype=torch.int32)},
    "dead_rows": {"causal": True, "seqused_k": torch.tensor([1, 0], dtype=torch.int32)},
    "scale": {"softmax_scale": 0.8},
}


@pytest.mark.parametrize("name", GRADCHECKS)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_gradcheck(name: str, with_sinks: bool) -> None:
    # check 7: out and LSE together, in float64
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, s, h, d, generator=g, dtype=F64, requires_grad=True)
               for s, h, d in ((3, 2, 4), (5, 1, 4), (5, 1, 3)))  # fmt: skip
    sinks = torch.randn(2, generator=g, dtype=F64, requires_grad=True)

    def fn(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        options = {**GRADCHECKS[name], **({"sinks": rest[0]} if rest else {})}
        out, lse = attnforge.flash_attention(
            q, k, v, return_lse=True, backend="reference", **options
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(fn, (q, k, v, sinks) if with_sinks else (q, k, v))


def test_gradcheck_varlen() -> None:
    # check 7
    q, k, v = (torch.randn(n, 2, 3, dtype=F64, requires_grad=True) for n in (7, 9, 9))
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 3, 3, 7], [0, 5, 6, 9]))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnforge.flash_attention_varlen(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, backend="reference"
        )

    assert torch.autograd.gradcheck(fn, (q, k, v))


def test_gradcheck_merge() -> None:
    # check 7
    outs = [torch.randn(2, 3, 2, 4, dtype=F64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 2, 3, dtype=F64, requires_grad=True) for _ in range(3)]

    def fn(*parts: Tensor) -> Any:
        return attnforge.merge_states(list(parts[:3]), list(parts[3:]))

    assert torch.autograd.gradcheck(fn, (*outs, *lses))


SUBSETS = [c for n in (1, 2, 3) for c in itertools.combinations("qkvs", n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="".join)
def test_gradients_of_a_subset(backend: str, wanted: tuple[str, ...]) -> None:
    # check 84: the others stay None, the wanted ones are what they are together
    inputs = FlashCase(seqlen_q=20, seqlen_k=30, sinks="normal", causal=True).make()
    full = inputs.run(backend)
    leaves = {"q": inputs.q.clone(), "k": inputs.k.clone(), "v": inputs.v.clone(),
              "s": inputs.options["sinks"].clone()}  # fmt: skip
    for name in wanted:
        leaves[name].requires_grad_()
    options = {**inputs.options, "sinks": leaves["s"]}
    out, lse = inputs.call(leaves["q"], leaves["k"], leaves["v"], **options, return_lse=True,
                           backend=backend)  # fmt: skip
    torch.autograd.backward((out, lse), (inputs.dout, inputs.dlse))
    names = {"q": "dq", "k": "dk", "v": "dv", "s": "dsinks"}
    for name, leaf in leaves.items():
        if name in wanted:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, full[names[name]])
        else:
            assert leaf.grad is None


def test_one_output_used(backend: str) -> None:
    # a loss on out alone, on lse alone, on neither
    inputs = FlashCase(seqlen_q=9, seqlen_k=14).make()
    q = inputs.q.clone().requires_grad_()
    out, lse = inputs.call(q, inputs.k, inputs.v, return_lse=True, backend=backend)
    grads = [torch.autograd.grad(x.sum(), q, retain_graph=True)[0] for x in (out, lse)]
    (both,) = torch.autograd.grad(out.sum() + lse.sum(), q, retain_graph=True)
    torch.testing.assert_close(grads[0] + grads[1], both, rtol=1e-5, atol=1e-5)
    (none,) = torch.autograd.grad(inputs.k.sum() + 0 * out.detach().sum() + 0 * q.sum(), q)
    assert not none.any()


def test_retain_graph_twice(backend: str) -> None:
    # check 85
    inputs = FlashCase(seqlen_q=9, seqlen_k=14, dtype=torch.bfloat16).make()
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = inputs.call(q, k, v, backend=backend)
    first = torch.autograd.grad(out, (q, k, v), inputs.dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), inputs.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, (q, k, v), inputs.dout)


def test_in_place_change_is_noticed(backend: str) -> None:
    # a saved tensor that was written to: torch's version check, not silent nonsense
    inputs = FlashCase(seqlen_q=5, seqlen_k=6).make()
    q, k = inputs.q.clone().requires_grad_(), inputs.k.clone()
    out = inputs.call(q, k, inputs.v, backend=backend)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend: str, reentrant: bool) -> None:
    # check 85
    inputs = FlashCase(seqlen_q=20, seqlen_k=20, causal=True).make()
    want = inputs.run(backend)
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return inputs.call(q, k, v, causal=True, return_lse=True, backend=backend)

    out, lse = checkpoint(fn, q, k, v, use_reentrant=reentrant)
    assert inputs.dlse is not None
    torch.autograd.backward((out, lse), (inputs.dout, inputs.dlse))
    got = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    assert_same(got, want)


def test_hooks_see_gradients(backend: str) -> None:
    # check 85
    inputs = FlashCase(seqlen_q=5, seqlen_k=6).make()
    q = inputs.q.clone().requires_grad_()
    seen = []
    q.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    inputs.call(q, inputs.k, inputs.v, backend=backend).sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad, 2 * seen[0])


def test_nothing_is_kept_alive(backend: str) -> None:
    # check 85: no leak of inputs after the graph is gone
    inputs = FlashCase(seqlen_q=5, seqlen_k=6).make()
    q = inputs.q.clone().requires_grad_()
    scaled = q * 1
    out = inputs.call(scaled, inputs.k, inputs.v, backend=backend)
    refs = [weakref.ref(scaled), weakref.ref(out)]
    out.sum().backward()
    assert all(r() is not None for r in refs)
    del scaled, out
    gc.collect()
    assert all(r() is None for r in refs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(backend: str, mode: Any) -> None:
    # check 85
    inputs = FlashCase(seqlen_q=9, seqlen_k=14).make()
    want = inputs.run(backend)
    q = inputs.q.clone().requires_grad_()
    with mode():
        out, lse = inputs.call(q, inputs.k, inputs.v, return_lse=True, backend=backend)
        merged, _ = attnforge.merge_states([out, out], [lse, lse], backend=backend)
    assert not out.requires_grad
    assert not merged.requires_grad
    assert_same({"out": out, "lse": lse}, {n: want[n] for n in ("out", "lse")})


def test_inference_tensors_as_inputs(backend: str) -> None:
    with torch.inference_mode():
        q = torch.randn(1, 5, 2, 8)
    out = attnforge.flash_attention(q, q, q, backend=backend)
    assert torch.equal(out, attnforge.flash_attention(*[q.clone()] * 3, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    # check 83: q, k, v take autocast's dtype; gradients return in the inputs' own
    inputs = FlashCase(seqlen_q=20, seqlen_k=30, sinks="normal").make()
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with torch.autocast("cpu", dtype=dtype):
        out, lse = inputs.call(q, k, v, **inputs.options, return_lse=True, backend=backend)
        mixed = inputs.call(q.to(dtype), k, v, backend=backend)
        decoded = attnforge.flash_decode(q, k, v, backend=backend)
    assert out.dtype == mixed.dtype == decoded.dtype == dtype
    assert lse.dtype == torch.float32
    halves = inputs.with_(**{n: getattr(inputs, n).to(dtype) for n in ("q", "k", "v")})
    assert_same({"out": out, "lse": lse}, halves.forward(backend))
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        wide = torch.randn(1, 3, 1, 8, dtype=F64)
        assert attnforge.flash_attention(wide, wide, wide).dtype == F64


def test_double_backward_is_an_error(backend: str) -> None:
    # check 82: never a silent zero
    inputs = FlashCase(seqlen_q=5, seqlen_k=6).make()
    q = inputs.q.clone().requires_grad_()
    out = inputs.call(q, inputs.k, inputs.v, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attnforge\.flash_bwd: .*second-order"):
        grad.sum().backward()


def test_forward_mode_is_an_error(backend: str) -> None:
    # check 82
    import torch.autograd.forward_ad as fwd

    x = torch.randn(1, 3, 1, 8)
    lse = torch.randn(1, 1, 3)
    for fn, name in (
        (lambda t: attnforge.flash_attention(t, x, x, backend=backend), "flash_fwd"),
        (lambda t: attnforge.flash_decode(x, t, x, backend=backend), "flash_fwd"),
        (lambda t: attnforge.merge_states([t, x], [lse, lse], backend=backend), "merge_states"),
    ):
        with pytest.raises(RuntimeError, match=rf"attnforge\.{name}: forward-mode"):
            torch.func.jvp(fn, (x,), (torch.ones_like(x),))
        with fwd.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            fn(fwd.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, 2), (None, 0, 0), (4, None, None)], ids=str)
def test_vmap_forward(backend: str, dims: tuple[int | None, ...]) -> None:
    # check 82: equals a loop
    shape = (2, 6, 2, 8)
    args = [torch.randn(*shape[: d or 0], 3, *shape[d or 0 :]) if d is not None
            else torch.randn(shape) for d in dims]  # fmt: skip

    def fn(*t: Tensor) -> Any:
        return attnforge.flash_attention(*t, causal=True, return_lse=True, backend=backend)

    got = torch.vmap(fn, in_dims=dims)(*args)
    for n in range(3):
        picked = [x if d is None else x.select(d, n) for x, d in zip(args, dims, strict=True)]
        for a, b in zip(got, fn(*picked), strict=True):
            torch.testing.assert_close(a[n], b, rtol=1e-6, atol=1e-6)


def test_vmap_of_the_others(backend: str) -> None:
    # check 82: varlen (which loops), decode with mapped lengths, merge
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    x = torch.randn(3, 9, 2, 8)

    def packed(t: Tensor) -> Any:
        return attnforge.flash_attention_varlen(t, t, t, cu_seqlens_q=cu, cu_seqlens_k=cu,
                                                return_lse=True, backend=backend)  # fmt: skip

    for a, b in zip(torch.vmap(packed)(x), zip(*map(packed, x), strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-6, atol=1e-6)
    used = torch.tensor([[3, 5], [9, 0], [1, 1]], dtype=torch.int32)
    q, kv = torch.randn(3, 2, 1, 4, 8), torch.randn(3, 2, 9, 2, 8)

    def decode(q: Tensor, t: Tensor, n: Tensor) -> Tensor:
        return attnforge.flash_decode(q, t, t, cache_seqlens=n, backend=backend)

    got = torch.vmap(decode)(q, kv, used)
    want = torch.stack([decode(*a) for a in zip(q, kv, used, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    outs, lses = torch.randn(3, 2, 2, 5, 3, 8), torch.randn(3, 2, 2, 3, 5)

    def merge(o: Tensor, s: Tensor) -> Tensor:
        return attnforge.merge_states([o[0], o[1]], [s[0], s[1]], backend=backend)[0]

    got = torch.vmap(merge)(outs, lses)
    torch.testing.assert_close(got, torch.stack([merge(*a) for a in zip(outs, lses, strict=True)]))


def test_functorch_gradients(backend: str) -> None:
    # check 82: grad, vjp, and per-sample gradients by vmap(grad)
    q, k, v = torch.randn(3, 2, 5, 2, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    weight = torch.randn(2, 5, 2, 8)

    def loss(q: Tensor) -> Tensor:
        return (attnforge.flash_attention(q, k, v, causal=True, backend=backend) * weight).sum()

    def plain(q: Tensor) -> Tensor:
        leaf = q.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    want = torch.stack([plain(x) for x in q])
    torch.testing.assert_close(torch.func.grad(loss)(q[0]), want[0], rtol=1e-5, atol=1e-6)
    _, pull = torch.func.vjp(loss, q[1])
    torch.testing.assert_close(pull(torch.ones(()))[0], want[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q), want, rtol=1e-5, atol=1e-6)
