"""``cpu.reductions.*``: the C++ kernels of ``csrc/cpu/reductions``, one reducer each on one walker.

A launcher hands over tensors and scalars in the order of the native schema and allocates nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import FlashParams
from attnforge.registry.predicates import Available, Device, Dim, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


@cache  # overloads of a loaded library never change
def _native_op(name: str) -> Any:
    return _native.operator(name)


def _unit(x: Tensor) -> Tensor:
    """``x`` itself if its last stride is 1, else a copy: the one layout kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _stat(x: Tensor | None) -> Tensor | None:
    """The same for a statistic, also where it has one row: there ``contiguous`` changes nothing."""
    if x is None or x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _features(p: FlashParams) -> tuple[Tensor | None, Tensor | None]:
    """seqused_k and alibi_slopes, contiguous (a no-op for all but sliced ones)."""
    used, alibi = p.seqused_k, p.alibi_slopes
    return (
        None if used is None else used.contiguous(),
        None if alibi is None else alibi.contiguous(),
    )


def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, p: FlashParams, out: Tensor
) -> None:
    """Launcher of ``reductions_column_sums``."""
    _native_op("column_sums")(
        _unit(q), _unit(k), _stat(lse), _stat(weights), *_features(p), out, *p[7:11]
    )


def span_mass(
    q: Tensor, k: Tensor, lse: Tensor, boundaries: Tensor, p: FlashParams, out: Tensor
) -> None:
    """Launcher of ``reductions_span_mass``."""
    _native_op("span_mass")(
        _unit(q), _unit(k), _stat(lse), boundaries.contiguous(), *_features(p), out, *p[7:11]
    )


def span_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    p: FlashParams,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Launcher of ``reductions_span_bwd``."""
    if q.numel() == 0:  # no rows: nothing reaches the keys
        for x in grads:
            x.zero_()
        return
    _native_op("span_grad")(
        dout.contiguous(), _unit(q), _unit(k), _stat(lse), boundaries.contiguous(),
        *_features(p), *grads, *p[7:11],
    )  # fmt: skip


def block_max(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: tuple[int, int],
    p: FlashParams,
    out: Tensor,
) -> None:
    """Launcher of ``reductions_block_max``."""
    _native_op("block_max")(_unit(q), _unit(k), _stat(lse), *blocks, *_features(p), out, *p[7:11])


def row_entropy(q: Tensor, k: Tensor, lse: Tensor, p: FlashParams, out: Tensor) -> None:
    """Launcher of ``reductions_row_entropy``."""
    _native_op("row_entropy")(_unit(q), _unit(k), _stat(lse), *_features(p), out, *p[7:11])


def topk_keys(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    n: int,
    p: FlashParams,
    values: Tensor,
    indices: Tensor,
) -> None:
    """Launcher of ``reductions_topk_keys``."""
    _native_op("topk_keys")(
        _unit(q), _unit(k), _stat(lse), n, *_features(p), values, indices, *p[7:11]
    )


def edges(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    threshold: float,
    p: FlashParams,
    where: Tensor,
    prob: Tensor,
    total: Tensor,
) -> None:
    """Launcher of ``reductions_edges``; the kernel writes the edges alone."""
    where.fill_(-1)
    prob.zero_()
    total.zero_()
    _native_op("edges")(
        _unit(q), _unit(k), _stat(lse), threshold, *_features(p), where, prob, total, *p[7:11]
    )


def head_gradient(dout: Tensor, out: Tensor, rows: Tensor, sums: Tensor) -> None:
    """Launcher of ``reductions_head_gradient``."""
    _native_op("head_gradient")(_unit(dout), _unit(out), rows, sums)


_ANY_DIM = (
    Device("cpu"),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Available("libattnforge_cpu.so", _native.unavailable),
)
_TILES = (*_ANY_DIM, Dim("head_dim", 8, 256, 8, also=(576,)))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.reductions.{kind}",
        op=f"reductions_{kind}",
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=_ANY_DIM if kind == "head_gradient" else _TILES,
        score=100.0,  # far above the reference; room below for simpler kernels
        notes=notes,
    )


SPECS = (
    _spec("column_sums", "tiles of P from Q, K and LSE; fixed chunks of rows, added in order"),
    _spec("span_mass", "tiles of P; a row has one owner"),
    _spec("span_bwd", "tiles of P become dS; dK in fixed chunks of rows, no atomics"),
    _spec("block_max", "maxima of log P, whole row blocks in one task"),
    _spec("row_entropy", "from log P, no logarithm taken"),
    _spec("topk_keys", "a heap per row in the output itself"),
    _spec("edges", "count, prefix sum, write"),
    _spec("head_gradient", "row dot products, one owner per head"),
)
