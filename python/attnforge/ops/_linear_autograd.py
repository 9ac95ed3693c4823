"""Autograd of the linear family's additive part, around the operators; see ``_flash_autograd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge._params import LinearOutputs, LinearParams
from attnforge.ops import _linear_ops
from attnforge.ops._flash_autograd import _no_forward_mode, _no_second_order

__all__ = ["LinearChunk", "LinearChunkDual", "chunk", "distinct", "recorded"]


class _LinearBackward(Function):  # type: ignore[misc, unused-ignore]
    """``linear_chunk_bwd`` whose own backward is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(_linear_ops.linear_chunk_bwd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_order("linear_chunk_bwd")


class LinearChunk(Function):  # type: ignore[misc, unused-ignore]
    """The arguments of ``linear_chunk_fwd`` -> its outputs; den and out_lo have no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(_linear_ops.linear_chunk_fwd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, gate, _, state, z, cu_seqlens, *_ = inputs
        # An output that is saved and the state that a gate's gradient starts from.
        ctx.save_for_backward(q, k, v, *output, gate, state, z, cu_seqlens)
        ctx.gate_kind, ctx.scalars, ctx.backend = inputs[4], inputs[8:12], inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[3], output[4])

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dstate: Tensor | None, dz: Tensor | None, *_: Any
    ) -> Any:
        need = ctx.needs_input_grad
        if dout is None and dstate is None and dz is None:
            return (None,) * len(need)
        *tape, gate, state, z, cu_seqlens = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(tape[3])
        args = (dout, dstate, dz, *tape, gate, ctx.gate_kind, state, z, cu_seqlens, *ctx.scalars,
                need[3], ctx.backend)  # fmt: skip
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = _LinearBackward.apply if second_order else _linear_ops.linear_chunk_bwd
        dq, dk, dv, dgate, dinitial, dinitial_z = run(*args)
        grads = (dq, dk, dv, dgate, None, dinitial, dinitial_z)
        wanted = [g if n else None for g, n in zip(grads, need, strict=False)]
        return (*wanted, *(None,) * (len(need) - len(grads)))


class LinearChunkDual(LinearChunk):
    """LinearChunk inside a forward-mode level. Apart, since Dynamo traces no ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("linear_chunk_fwd")


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a call over these inputs has to be recorded for a backward."""
    return torch.is_grad_enabled() and (
        any(x is not None and x.requires_grad for x in tensors)
        # A tensor that vmap wraps does not show whether the one inside requires grad.
        or torch._C._are_functorch_transforms_active()
    )


def distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, no two one object: Dynamo takes no repeated Function input."""
    seen: list[Tensor] = []
    own = []
    for x in args:
        if isinstance(x, Tensor):
            if any(x is y for y in seen):
                x = x.view_as(x)
            seen.append(x)
        own.append(x)
    return tuple(own)


def chunk(
    q: Tensor, k: Tensor, v: Tensor, p: LinearParams, final_state: bool, backend: str | None
) -> LinearOutputs:
    """``linear_chunk_fwd``, through autograd if a gradient is needed."""
    dual = forward_ad._current_level >= 0
    save = dual or recorded(q, k, v, p.gate, p.initial_state, p.initial_z)
    args = (q, k, v, *p, final_state, save, backend)
    if not save:
        return LinearOutputs(*_linear_ops.linear_chunk_fwd(*args))
    if torch.compiler.is_compiling():
        args = distinct(args)
    apply: Callable[..., Any] = (LinearChunkDual if dual else LinearChunk).apply
    return LinearOutputs(*apply(*args))
