"""Autograd of attention to lists of keys: in the manner of ``_flash_autograd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge._params import IndexedParams
from attnforge.ops import _indexed_ops as operators
from attnforge.ops._flash_autograd import _HALF, _no_forward_mode, _no_second_order

__all__ = ["Indexed", "IndexedDual", "attend"]

_TENSORS = 8  # q, k, v, ids, lens, log_bias, block_table, cache_seqlens
_BIAS = 5


class _Backward(Function):  # type: ignore[misc, unused-ignore]
    """``indexed_bwd`` whose own backward is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(operators.indexed_bwd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("indexed_bwd")


class Indexed(Function):  # type: ignore[misc, unused-ignore]
    """The arguments of ``indexed_fwd`` -> (out, lse, out_lo)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return operators.indexed_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:_TENSORS])
        ctx.scalars = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> Any:
        need = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(need)
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[3])
        scale, _, backend = ctx.scalars
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run: Callable[..., Any] = _Backward.apply if second_order else operators.indexed_bwd
        grads = run(dout, dlse, *saved, scale, backend)
        found: list[Tensor | None] = [None] * len(need)
        for n, grad in zip((0, 1, 2, _BIAS), grads, strict=True):
            found[n] = grad if need[n] else None
        return tuple(found)


class IndexedDual(Indexed):
    """Indexed inside a forward-mode level. Apart, since Dynamo traces no ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("indexed_fwd")


def attend(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) through autograd if a gradient is needed, else straight from the operator."""
    dual = forward_ad._current_level >= 0
    inputs = (q, k, v, p.log_bias)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not dual and not wanted:
        out, lse, _ = operators.indexed_fwd(q, k, v, *p, False, backend)
        return out, lse
    apply: Callable[..., Any] = (IndexedDual if dual else Indexed).apply
    out, lse, _ = apply(q, k, v, *p, q.dtype in _HALF, backend)
    return out, lse
