"""Operators of contextual position encoding, and autograd around them: see ``_flash_ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge import _ops
from attnforge._params import FlashParams, FlashTape
from attnforge.ops import _flash_ops
from attnforge.ops._flash_autograd import _no_forward_mode, _no_second_order, needs_grad
from attnforge.ops._flash_vmap import looped
from attnforge.registry.select import launcher

__all__ = ["attend", "cope_bwd", "cope_fwd"]

# q, k, v and emb; then cu_seqlens_q, cu_seqlens_k, seqused_k and five numbers of FlashParams.
_PROBLEM = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float softmax_scale, SymInt window_left, SymInt window_right, "
)


def _params(fields: Any) -> FlashParams:
    cu_q, cu_k, used, rows, keys, scale, left, right = fields
    return FlashParams(cu_q, cu_k, used, None, None, rows, keys, scale, left, right, 0.0)


def _fwd(q: Tensor, k: Tensor, v: Tensor, emb: Tensor, *rest: Any) -> Any:
    *fields, save_out_lo, backend = rest
    p = _flash_ops._checked("cope_attention", q, k, _params(fields))
    outputs = _flash_ops.alloc_fwd(q, v, save_out_lo)
    launch = launcher("cope_fwd", _flash_ops.metadata(q, v, p), _flash_ops.request, backend)
    launch(q, k, v, emb, p, *outputs)
    return outputs


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, emb: Tensor, *rest: Any) -> Any:
    return _flash_ops.alloc_fwd(q, v, rest[-2])


def _grads(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in like)


def _bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, emb: Tensor, out: Tensor,
    lse: Tensor, out_lo: Tensor, *rest: Any,
) -> Any:  # fmt: skip
    *fields, backend = rest
    p = _flash_ops._checked("cope_attention", q, k, _params(fields))
    grads = _grads(q, k, v, emb)
    launch = launcher("cope_bwd", _flash_ops.metadata(q, v, p), _flash_ops.request, backend)
    launch(dout, dlse, FlashTape(q, k, v, out, lse, out_lo), emb, p, grads)
    return grads


def _bwd_fake(dout: Tensor, dlse: Tensor | None, *rest: Any) -> Any:
    return _grads(*rest[:4])


cope_fwd = _ops.define(
    f"cope_fwd(Tensor q, Tensor k, Tensor v, Tensor emb, {_PROBLEM}bool save_out_lo, str? backend) "
    "-> (Tensor out, Tensor lse, Tensor out_lo)",
    _fwd,
    _fwd_fake,
    looped("cope_fwd"),
)
cope_bwd = _ops.define(
    "cope_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor emb, Tensor out, "
    f"Tensor lse, Tensor out_lo, {_PROBLEM}str? backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor demb)",
    _bwd,
    _bwd_fake,
    looped("cope_bwd"),
)


class _CopeBackward(Function):  # type: ignore[misc, unused-ignore]
    """``cope_bwd`` whose own backward is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return cope_bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("cope_bwd")


class CopeAttention(Function):  # type: ignore[misc, unused-ignore]
    """Arguments of ``cope_fwd`` -> (out, lse, out_lo)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return cope_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4], *output, *inputs[4:7])
        ctx.scalars = (*inputs[7:12], inputs[13])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> Any:
        need = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(need)
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[4])
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = _CopeBackward.apply if second_order else cope_bwd
        grads = run(dout, dlse, *saved, *ctx.scalars)
        return (*(x if on else None for x, on in zip(grads, need, strict=False)), *(None,) * 10)


class CopeAttentionDual(CopeAttention):
    """CopeAttention inside a forward-mode level. Apart, since Dynamo traces no ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("cope_fwd")


def attend(
    q: Tensor, k: Tensor, v: Tensor, emb: Tensor, p: FlashParams, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) through autograd if a gradient is needed, else straight from the operator."""
    fields = (*p[:3], *p[5:10])
    dual = forward_ad._current_level >= 0
    if not dual and not needs_grad(q, k, v, emb):
        out, lse, _ = cope_fwd(q, k, v, emb, *fields, False, backend)
        return out, lse
    apply: Callable[..., Any] = (CopeAttentionDual if dual else CopeAttention).apply
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice
        q, k, v, emb = (x.view_as(x) for x in (q, k, v, emb))
    save = q.dtype.itemsize == 2
    out, lse, _ = apply(q, k, v, emb, *fields, save, backend)
    return out, lse
