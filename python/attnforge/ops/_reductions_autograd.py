"""Autograd of ``span_mass``, the one differentiable reduction; see ``_flash_autograd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge.ops._flash_autograd import _no_forward_mode, _no_second_order, needs_grad
from attnforge.ops._reductions_ops import operators

__all__ = ["SpanMass", "SpanMassDual", "span_mass"]


class _SpanBackward(Function):  # type: ignore[misc, unused-ignore]
    """``reductions_span_bwd`` whose own backward is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return operators.span_bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("reductions.span_mass")


class SpanMass(Function):  # type: ignore[misc, unused-ignore]
    """(q, k, lse, boundaries, ...) -> mass: the arguments of ``reductions_span_mass``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return operators.span_mass(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])  # q, k, lse, boundaries, seqused_k, alibi_slopes
        ctx.options = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> Any:
        nothing = (None,) * (6 + len(ctx.options))
        if dout is None:
            return nothing
        args = (dout, *ctx.saved_tensors, *ctx.options)
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        grads = (_SpanBackward.apply if second_order else operators.span_bwd)(*args)
        wanted = [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]
        return (*wanted, *nothing[3:])


class SpanMassDual(SpanMass):
    """SpanMass inside a forward-mode level. Apart, since Dynamo traces no ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("reductions.span_mass")


def span_mass(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Any:
    """The operator, through autograd if a gradient is needed."""
    dual = forward_ad._current_level >= 0
    if not dual and not needs_grad(q, k, lse, None):
        return operators.span_mass(q, k, lse, *rest)
    if torch.compiler.is_compiling() and k is q:  # Dynamo takes no repeated Function input
        k = k.view_as(k)
    apply: Callable[..., Any] = (SpanMassDual if dual else SpanMass).apply
    return apply(q, k, lse, *rest)
