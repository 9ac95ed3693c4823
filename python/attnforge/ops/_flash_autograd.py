"""Autograd of the flash family, around the operators and entered only where a gradient is needed.

The backward is an operator too, and has no derivative of its own: ``_FlashBackward`` exists to
say so when someone asks for one. ``generate_vmap_rule`` lets vmap reach the operators' rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge._params import FlashMods, FlashParams
from attnforge.ops import _flash_ops

__all__ = [
    "FlashAttention",
    "FlashAttentionDual",
    "MergeStates",
    "MergeStatesDual",
    "attend",
    "merge",
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


# Arguments of FlashAttention: q, k, v; the fields of FlashParams up to softcap; score_fn,
# dropout_p, rope_interleaved, out_dtype, save_out_lo, backend: so many. Then the mods, if any.
_PLAIN = 20


def _flat(q: Tensor, k: Tensor, v: Tensor, p: FlashParams, save: bool, backend: str | None) -> Any:
    return (q, k, v, *p[:11], *p[12:], save, backend, *p.mods)


class FlashAttention(Function):  # type: ignore[misc, unused-ignore]
    """``_flat`` arguments -> (out, lse, out_lo) of the operator ``flash_fwd``.

    Mods stand apart and last: autograd sees tensors, not lists of them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        plain = args[:_PLAIN]
        return _flash_ops.flash_fwd(*plain[:14], list(args[_PLAIN:]), *plain[14:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        out, lse, out_lo = output
        ctx.save_for_backward(*inputs[:3], out, lse, out_lo, *inputs[3:8], *inputs[_PLAIN:])
        ctx.scalars = inputs[8:_PLAIN]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out_lo)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> Any:
        need = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(need)
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[3])
        *scalars, score_fn, dropout_p, interleaved, out_dtype, _, backend = ctx.scalars
        mods = dict(zip(FlashMods._fields, need[_PLAIN:], strict=False))
        wanted = [mods.get(name, False) for name in _flash_ops.GRAD_MODS]
        bits = sum(1 << n for n, on in enumerate(wanted) if on)
        args = (dout, dlse, *saved[:11], *scalars, list(saved[11:]), score_fn, dropout_p,
                interleaved, out_dtype, bits, backend)  # fmt: skip
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = _FlashBackward.apply if second_order else _flash_ops.flash_bwd
        dq, dk, dv, dsinks, *d_mods = run(*args)
        named = dict(zip(_flash_ops.GRAD_MODS, d_mods, strict=True))
        return (
            dq if need[0] else None,
            dk if need[1] else None,
            dv if need[2] else None,
            *(None,) * 4,
            dsinks if need[7] else None,
            *(None,) * (_PLAIN - 8),
            *(named.get(name) if wanted else None for name, wanted in mods.items()),
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


def needs_grad(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mods: Sequence[Tensor | None] = ()
) -> bool:
    """Whether the call has to be recorded for a backward."""
    return torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (sinks is not None and sinks.requires_grad)
        or any(x is not None and x.requires_grad for x in mods)
        # A tensor that vmap wraps does not show whether the one inside requires grad.
        or torch._C._are_functorch_transforms_active()
    )


def _distinct(q: Tensor, k: Tensor, v: Tensor, p: FlashParams) -> Any:
    """The same tensors, no two of them one object: Dynamo takes no repeated Function input."""
    tensors: list[Tensor] = []

    def own(x: Any) -> Any:
        if isinstance(x, Tensor):
            if any(x is y for y in tensors):
                x = x.view_as(x)
            tensors.append(x)
        return x

    q, k, v = own(q), own(k), own(v)
    fields = {name: own(x) for name, x in p._asdict().items()}
    return q, k, v, FlashParams(**{**fields, "mods": tuple(own(x) for x in p.mods)})


def attend(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) through autograd if a gradient is needed, else straight from the operator."""
    dual = forward_ad._current_level >= 0
    if not dual and not needs_grad(q, k, v, p.sinks, p.mods):
        out, lse, _ = _flash_ops.flash_fwd(q, k, v, *p, False, backend)
        return out, lse
    apply = _apply_dual if dual else _apply_short
    if torch.compiler.is_compiling():
        q, k, v, p = _distinct(q, k, v, p)
        apply = _apply_long
    out, lse, _ = apply(*_flat(q, k, v, p, q.dtype in _HALF, backend))
    return out, lse


def merge(outs: list[Tensor], lses: list[Tensor], backend: str | None) -> tuple[Tensor, Tensor]:
    """``merge_states`` through autograd if a gradient is needed, else straight."""
    dual = forward_ad._current_level >= 0
    wrapped = torch._C._are_functorch_transforms_active()
    wanted = torch.is_grad_enabled() and (wrapped or any(x.requires_grad for x in outs + lses))
    if not dual and not wanted:
        out, lse = _flash_ops.merge_states(outs, lses, backend)
        return out, lse
    apply: Callable[..., Any] = (MergeStatesDual if dual else MergeStates).apply
    if torch.compiler.is_compiling():
        outs, lses = [x.view_as(x) for x in outs], [x.view_as(x) for x in lses]
    out, lse = apply(backend, *outs, *lses)
    return out, lse
