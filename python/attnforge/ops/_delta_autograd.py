"""Autograd of the delta rules and the diagonal scan, around the operators; see ``_flash_autograd``.

Both operators return (out, final state) from tensors that come first; only the inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge.ops import _delta_ops, _scan_ops
from attnforge.ops._flash_autograd import _no_forward_mode, _no_second_order
from attnforge.ops._linear_autograd import distinct, recorded

__all__ = ["DeltaChunk", "DeltaChunkDual", "DiagScan", "DiagScanDual", "delta_chunk", "diag_scan"]


class _DeltaBackward(Function):  # type: ignore[misc, unused-ignore]
    """``delta_chunk_bwd`` whose own backward is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(_delta_ops.delta_chunk_bwd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("delta_chunk_bwd")


class _ScanBackward(_DeltaBackward):
    """The same for ``diag_scan_bwd``."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(_scan_ops.diag_scan_bwd(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("diag_scan_bwd")


def _run_backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None, own: Any, op: Any) -> Any:
    """Gradients of the inputs from those of (out, state): the tensors with one come first."""
    need = ctx.needs_input_grad
    if dout is None and dstate is None:
        return (None,) * len(need)
    if dout is None:
        like = ctx.saved_tensors[ctx.out_like]
        dout = torch.zeros_like(like)
    args = (dout, dstate, *ctx.saved_tensors, *ctx.scalars)
    second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    grads = (own.apply if second_order else op)(*args)
    wanted = [g if n else None for g, n in zip(grads, need, strict=False)]
    return (*wanted, *(None,) * (len(need) - len(wanted)))


class DeltaChunk(Function):  # type: ignore[misc, unused-ignore]
    """The arguments of ``delta_chunk_fwd`` -> (out, final_state)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _delta_ops.delta_chunk_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # q, k, v, g, beta, initial_state, cu_seqlens; scale, output_final_state, backend
        ctx.save_for_backward(*inputs[:7])
        ctx.out_like, ctx.scalars = 2, (inputs[7], inputs[9])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> Any:
        return _run_backward(ctx, dout, dstate, _DeltaBackward, _delta_ops.delta_chunk_bwd)


class DeltaChunkDual(DeltaChunk):
    """DeltaChunk inside a forward-mode level. Apart, since Dynamo traces no ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("delta_chunk_fwd")


class DiagScan(Function):  # type: ignore[misc, unused-ignore]
    """The arguments of ``diag_scan_fwd`` -> (out, final_state)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _scan_ops.diag_scan_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])  # x, g, initial_state, cu_seqlens
        ctx.out_like, ctx.scalars = 0, inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> Any:
        return _run_backward(ctx, dout, dstate, _ScanBackward, _scan_ops.diag_scan_bwd)


class DiagScanDual(DiagScan):
    """DiagScan inside a forward-mode level."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("diag_scan_fwd")


def _applied(args: tuple[Any, ...], op: Any, plain: Any, dual: Any) -> tuple[Tensor, Tensor]:
    forward_mode = forward_ad._current_level >= 0
    tensors = [x for x in args if isinstance(x, Tensor)]
    if not (forward_mode or recorded(*tensors)):
        out, state = op(*args)
        return out, state
    if torch.compiler.is_compiling():
        args = distinct(args)
    apply: Callable[..., Any] = (dual if forward_mode else plain).apply
    out, state = apply(*args)
    return out, state


def delta_chunk(*args: Any) -> tuple[Tensor, Tensor]:
    """``delta_chunk_fwd``, through autograd if a gradient is needed."""
    return _applied(args, _delta_ops.delta_chunk_fwd, DeltaChunk, DeltaChunkDual)


def diag_scan(*args: Any) -> tuple[Tensor, Tensor]:
    """``diag_scan_fwd``, through autograd if a gradient is needed."""
    return _applied(args, _scan_ops.diag_scan_fwd, DiagScan, DiagScanDual)
