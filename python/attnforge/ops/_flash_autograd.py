"""Autograd of the flash family, around the operators and entered only where a gradient is needed.

The backward is an operator too, and has no derivative of its own: ``_FlashBackward`` exists to
say so when someone asks for one. ``generate_vmap_rule`` lets vmap reach the operators' rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge._params import FlashParams
from attnforge.ops import _flash_ops

__all__ = [
    "FlashAttention",
    "FlashAttentionDual",
    "MergeStates",
    "MergeStatesDual",
    "attend",
    "needs_grad",
]


_HALF = (torch.bfloat16, torch.float16)


def _no_second_order(op: str) -> RuntimeError:
    return RuntimeError(
        f"attnforge.{op}: the backward has no derivative; got a second-order gradient "
        "(create_graph=True and another backward); want first-order gradients; use "
        "torch.nn.attention with the math backend for double backward"
    )


def _no_forward_mode(op: str) -> RuntimeError:
    return RuntimeError(
        f"attnforge.{op}: forward-mode AD (jvp) is not implemented; got a dual tensor; want "
        "reverse mode; use backward() or torch.func.vjp"
    )


class _FlashBackward(Function):  # type: ignore[misc, unused-ignore]
    """``flash_bwd`` whose own backward is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(_flash_ops.flash_bwd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("flash_bwd")


class FlashAttention(Function):  # type: ignore[misc, unused-ignore]
    """(q, k, v, ...) -> (out, lse, out_lo): the arguments of the operator ``flash_fwd``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqused_k: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        window_left: int,
        window_right: int,
        softcap: float,
        save_out_lo: bool,
        backend: str | None,
    ) -> Any:
        return _flash_ops.flash_fwd(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
            max_seqlen_k, softmax_scale, window_left, window_right, softcap, save_out_lo, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        out, lse, out_lo = output
        ctx.save_for_backward(*inputs[:3], out, lse, out_lo, *inputs[3:8])
        ctx.scalars = (*inputs[8:14], inputs[15])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out_lo)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> Any:
        if dout is None and dlse is None:
            return (None,) * 16
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[3])
        args = (dout, dlse, *saved, *ctx.scalars)
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = _FlashBackward.apply if second_order else _flash_ops.flash_bwd
        dq, dk, dv, dsinks = run(*args)
        need = ctx.needs_input_grad
        return (
            dq if need[0] else None,
            dk if need[1] else None,
            dv if need[2] else None,
            *(None,) * 4,
            dsinks if need[7] else None,
            *(None,) * 8,
        )


class MergeStates(Function):  # type: ignore[misc, unused-ignore]
    """(backend, *outs, *lses) -> (out, lse).

        w_n = exp(lse_n - lse);  dO_n = w_n dO;  dlse_n = w_n (dlse + <dO, O_n - O>)

    The backward is plain PyTorch over saved tensors, so it can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str | None, *parts: Tensor) -> Any:
        half = len(parts) // 2
        return _flash_ops.merge_states(list(parts[:half]), list(parts[half:]), backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        *parts, out, lse = ctx.saved_tensors
        half = len(parts) // 2
        d_outs: list[Tensor | None] = [None] * half
        d_lses: list[Tensor | None] = [None] * half
        for n in range(half):
            o, s = parts[n], parts[half + n].to(lse.dtype)
            used = torch.isfinite(s) | torch.isnan(s)  # -inf and +inf mark an empty part
            weight = torch.where(used, torch.exp(torch.where(used, s - lse, 0.0)), 0.0)
            d_stat = torch.zeros_like(lse) if dlse is None else dlse
            if dout is not None:
                wide = weight.transpose(-1, -2).unsqueeze(-1)
                d_outs[n] = torch.where(wide == 0, 0.0, dout * wide).to(o.dtype)
                gap = dout.to(lse.dtype) * (o.to(lse.dtype) - out.to(lse.dtype))
                d_stat = d_stat + gap.sum(-1).transpose(-1, -2)
            d_lses[n] = torch.where(used, weight * d_stat, 0.0).to(parts[half + n].dtype)
        need = ctx.needs_input_grad[1:]
        grads = [g if wanted else None for g, wanted in zip(d_outs + d_lses, need, strict=True)]
        return (None, *grads)


class FlashAttentionDual(FlashAttention):
    """FlashAttention inside a forward-mode level. Apart, since Dynamo traces no ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("flash_fwd")


class MergeStatesDual(MergeStates):
    """MergeStates inside a forward-mode level."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("merge_states")


# ``Function.apply`` binds default arguments with ``inspect``, 40 us a call; ours are all given.
_apply_long: Callable[..., Any] = FlashAttention.apply
_apply_dual: Callable[..., Any] = FlashAttentionDual.apply
_bound_apply: Any = super(Function, FlashAttention).apply  # type: ignore[misc, unused-ignore]


def _apply_short(*args: Any) -> Any:
    """``FlashAttention.apply`` by the short way, unless a functorch transform is active."""
    if torch._C._are_functorch_transforms_active():
        return _apply_long(*args)
    return _bound_apply(*unwrap_dead_wrappers(args))


def needs_grad(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether the call has to be recorded for a backward."""
    return torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (sinks is not None and sinks.requires_grad)
        # A tensor that vmap wraps does not show whether the one inside requires grad.
        or torch._C._are_functorch_transforms_active()
    )


def _distinct(q: Tensor, k: Tensor, v: Tensor, p: FlashParams) -> Any:
    """The same tensors, no two of them one object: Dynamo takes no repeated Function input."""
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)
    if p.cu_seqlens_k is not None and p.cu_seqlens_k is p.cu_seqlens_q:
        p = p._replace(cu_seqlens_k=p.cu_seqlens_k.view_as(p.cu_seqlens_k))
    return q, k, v, p


def attend(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) through autograd if a gradient is needed, else straight from the operator."""
    dual = forward_ad._current_level >= 0
    if not dual and not needs_grad(q, k, v, p.sinks):
        out, lse, _ = _flash_ops.flash_fwd(q, k, v, *p, False, backend)
        return out, lse
    apply = _apply_dual if dual else _apply_short
    if torch.compiler.is_compiling():
        q, k, v, p = _distinct(q, k, v, p)
        apply = _apply_long
    out, lse, _ = apply(q, k, v, *p, q.dtype in _HALF, backend)
    return out, lse
