"""Autograd of block-sparse attention: in the manner of ``_flash_autograd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge._params import BlockLists, FlashParams
from attnforge.ops import _block_sparse_ops as operators
from attnforge.ops._flash_autograd import _HALF, _no_forward_mode, _no_second_order, needs_grad

__all__ = ["BlockSparse", "BlockSparseDual", "attend"]


class _Backward(Function):  # type: ignore[misc, unused-ignore]
    """``block_sparse_bwd`` whose own backward is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(operators.block_sparse_bwd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("block_sparse_bwd")


# q, k, v, indices, counts, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks
_TENSORS = 10


class BlockSparse(Function):  # type: ignore[misc, unused-ignore]
    """The arguments of ``block_sparse_fwd`` -> (out, lse, out_lo)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return operators.block_sparse_fwd(*args)

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
        *scalars, _, backend = ctx.scalars
        args = (dout, dlse, *saved, *scalars, backend)
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dq, dk, dv, dsinks = (_Backward.apply if second_order else operators.block_sparse_bwd)(
            *args
        )
        wanted = [g if n else None for g, n in zip((dq, dk, dv), need, strict=False)]
        last = dsinks if need[_TENSORS - 1] else None
        rest = (None,) * (len(need) - _TENSORS)
        return (*wanted, *(None,) * (_TENSORS - 4), last, *rest)


class BlockSparseDual(BlockSparse):
    """BlockSparse inside a forward-mode level. Apart, since Dynamo traces no ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("block_sparse_fwd")


def _distinct(tensors: list[Any]) -> list[Any]:
    """The same tensors, no two of them one object: Dynamo takes no repeated Function input."""
    out: list[Any] = []
    for x in tensors:
        out.append(x.view_as(x) if x is not None and any(x is y for y in out) else x)
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, lists: BlockLists, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) through autograd if a gradient is needed, else straight from the operator."""
    args = [q, k, v, lists.indices, lists.counts, *p[:11], lists.q_block, lists.kv_block]
    dual = forward_ad._current_level >= 0
    if not dual and not needs_grad(q, k, v, p.sinks):
        out, lse, _ = operators.block_sparse_fwd(*args, False, backend)
        return out, lse
    if torch.compiler.is_compiling():
        args[:_TENSORS] = _distinct(args[:_TENSORS])
    apply: Callable[..., Any] = (BlockSparseDual if dual else BlockSparse).apply
    out, lse, _ = apply(*args, q.dtype in _HALF, backend)
    return out, lse
