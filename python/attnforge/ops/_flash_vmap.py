"""Batching rules of the flash operators: ``torch.vmap`` folds its dimension into the batch.

A rule that cannot fold (varlen boundaries, per-head tensors that are themselves batched, mods, a
gradient of sinks, which sums over the batch) runs the operator once per slice and stacks. Both
give the same numbers; kernels do not mix sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._ops import operator

__all__ = ["backward", "decode", "forward", "looped", "merge"]

Dims = tuple[Any, ...]


def _front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """``x`` with the mapped dimension first; an unmapped tensor is expanded (stride 0)."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[.., B, ..] -> [V * B, ..]; None stays, and so does an empty placeholder of shape [0]."""
    x = _front(x, dim, size)
    return None if x is None else x.flatten(0, 1) if x.dim() > 2 or x.shape[1:] != (0,) else x[0]


def _unfold(x: Tensor, size: int, folded: bool) -> Tensor:
    return x.reshape(size, x.shape[0] // size, *x.shape[1:]) if folded else x


def _looped(
    op: Any, size: int, in_dims: Dims, args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], Dims]:
    results = []
    for n in range(size):
        picked = [_pick(a, d, n) for a, d in zip(args, in_dims, strict=True)]
        results.append(op(*picked))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def looped(name: str) -> Callable[..., Any]:
    """The rule of an operator that runs once per slice, with one or several tensors as result."""

    def rule(info: Any, in_dims: Dims, *args: Any) -> Any:
        if info.batch_size == 0:
            raise ValueError("attnforge: vmap over a dimension of size 0 is not defined")
        op, several = operator(name), True

        def run(*picked: Any) -> Any:
            nonlocal several
            result = op(*picked)
            several = isinstance(result, tuple)
            return result if several else (result,)

        outs, dims = _looped(run, info.batch_size, in_dims, args)
        return (outs, dims) if several else (outs[0], 0)

    return rule


def _pick(x: Any, dim: Any, n: int) -> Any:
    if isinstance(x, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
        return [_pick(item, d, n) for item, d in zip(x, dims, strict=True)]
    return x if dim is None else x.select(dim, n)


def _mapped(op: Any, folds: int, args: tuple[Any, ...], info: Any, in_dims: Dims) -> Any:
    """Fold the first ``folds`` arguments and seqused_k, or loop where that does not do.

    The arguments after them start with cu_seqlens_q, cu_seqlens_k, seqused_k, alibi, sinks.
    """
    size = info.batch_size
    cu_q, _, _, alibi, sinks = args[folds : folds + 5]
    # A gradient of sinks is a sum over the batch, which folding would run together.
    sums = sinks is not None and folds == 8
    mixed = any(d is not None for d in in_dims[folds + 3 : folds + 5])
    mods = next(x for x in args if isinstance(x, (list, tuple)))
    per_batch = alibi is not None and alibi.dim() == 2
    if size == 0 or cu_q is not None or mixed or sums or per_batch or mods:
        if size == 0:
            raise ValueError("attnforge: vmap over a dimension of size 0 is not defined")
        return _looped(op, size, in_dims, args)
    folded = [_fold(x, d, size) for x, d in zip(args[:folds], in_dims[:folds], strict=True)]
    used = _fold_lengths(args[folds + 2], in_dims[folds + 2], size)
    results = op(*folded, None, None, used, *args[folds + 3 :])
    keep = [x.dim() > 1 for x in results]
    outs = tuple(_unfold(x, size, k) for x, k in zip(results, keep, strict=True))
    return outs, tuple(0 if k else None for k in keep)


def _fold_lengths(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    x = _front(x, dim, size)
    return None if x is None else x.reshape(-1)


def forward(info: Any, in_dims: Dims, *args: Any) -> Any:
    """``flash_fwd``: q, k, v fold into the batch."""
    return _mapped(operator("flash_fwd"), 3, args, info, in_dims)


def backward(info: Any, in_dims: Dims, *args: Any) -> Any:
    """``flash_bwd``: dout, dlse, q, k, v, out, lse, out_lo fold into the batch."""
    return _mapped(operator("flash_bwd"), 8, args, info, in_dims)


def decode(info: Any, in_dims: Dims, *args: Any) -> Any:
    """``flash_decode``: as forward, without boundaries."""

    def op(*a: Any) -> Any:
        return operator("flash_decode")(*a[:3], *a[5:])

    wide = (*args[:3], None, None, *args[3:])
    return _mapped(op, 3, wide, info, (*in_dims[:3], None, None, *in_dims[3:]))


def merge(info: Any, in_dims: Dims, outs: list[Tensor], lses: list[Tensor], backend: Any) -> Any:
    """``merge_states``: packed parts loop, batched ones fold."""
    size, (out_dims, lse_dims, _) = info.batch_size, in_dims
    out_dims = out_dims if isinstance(out_dims, (list, tuple)) else [out_dims] * len(outs)
    lse_dims = lse_dims if isinstance(lse_dims, (list, tuple)) else [lse_dims] * len(lses)
    rank = outs[0].dim() - (out_dims[0] is not None)
    op: Callable[..., Any] = operator("merge_states")
    if rank == 3:
        return _looped(op, size, (out_dims, lse_dims, None), (outs, lses, backend))
    out, lse = op(
        [_fold(x, d, size) for x, d in zip(outs, out_dims, strict=True)],
        [_fold(x, d, size) for x, d in zip(lses, lse_dims, strict=True)],
        backend,
    )
    return (_unfold(out, size, True), _unfold(lse, size, True)), (0, 0)
