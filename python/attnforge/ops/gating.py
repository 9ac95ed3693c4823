"""Branches of attention mixed by gates that need not sum to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnforge.ops import _nsa_ops
from attnforge.ops._checks import _shape, fail, tensor

__all__ = ["gated_combine"]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _weights(gates: Tensor, acc: torch.dtype) -> tuple[Tensor, ...]:
    """Of each branch, [.., H, 1]."""
    return gates.to(acc).unsqueeze(-2).unbind(-1)


def _plain(outs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """The sum in PyTorch, for what traces or differentiates forwards."""
    acc = _accumulator(outs[0].dtype)
    parts = [x.to(acc) * w for x, w in zip(outs, _weights(gates, acc), strict=True)]
    return sum(parts[1:], parts[0]).to(outs[0].dtype)


class _Combine(Function):  # type: ignore[misc, unused-ignore]
    """(gates, *outs) -> sum_n gates[..., n] * outs[n]. The backward is plain PyTorch over saved
    tensors, so it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, *outs: Tensor) -> Tensor:
        out: Tensor = _nsa_ops.nsa_combine(list(outs), gates)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        gates, *outs = ctx.saved_tensors
        acc = _accumulator(dout.dtype)
        wide = dout.to(acc)
        need = ctx.needs_input_grad
        d_gates = None
        if need[0]:
            d_gates = torch.stack([(wide * x.to(acc)).sum(-1) for x in outs], -1).to(gates.dtype)
        weights = _weights(gates, acc)
        d_outs = [
            (wide * w).to(dout.dtype) if wanted else None
            for w, wanted in zip(weights, need[1:], strict=True)
        ]
        return (d_gates, *d_outs)


def gated_combine(outs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """sum_n gates[..., n] * outs[n]: branches mixed by gates that need not sum to 1.

    outs: n tensors [.., H, Dv] of one shape. gates [.., H, n]: weights of each token and head, as
    they are (NSA: after the sigmoid). Sums are fp32 (fp64 of fp64), the result has the dtype of
    outs. Differentiable in both: d gates[.., n] = <dO, outs[n]>. Branches are softmaxes of their
    own, so no LSE takes part; for parts of one softmax see ``merge_states``.
    """
    op = "gated_combine"
    if not outs:
        fail(op, "outs is empty; want at least one tensor")
    tensor(op, "gates", gates)
    first = outs[0]
    for n, x in enumerate(outs):
        tensor(op, f"outs[{n}]", x)
        if x.shape != first.shape or x.dtype is not first.dtype:
            fail(op, f"outs[{n}] is {x.dtype} {_shape(x)}; want {first.dtype} {_shape(first)}")
    want = (*first.shape[:-1], len(outs))
    if tuple(gates.shape) != want:
        fail(op, f"gates has shape {_shape(gates)}; want {want}: one weight per branch")
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return _plain(outs, gates)
    result: Tensor = _Combine.apply(gates, *outs)  # type: ignore[no-untyped-call]
    return result
