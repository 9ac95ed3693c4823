"""``cpu.cope.*``: the tiled C++ kernels of ``csrc/cpu/cope``.

A launcher brings the table to fp32 with its positions padded, [H|1, D, N], and sums what the
backward leaves of its gradient per sequence, head and part of the queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge._params import FlashParams, FlashTape
from attnforge.backends.cpu.flash import _COMMON, _native_op, _unit
from attnforge.registry.predicates import Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]

_PADDING = 32  # kCopePadding
# Parts that the query tiles of a batch entry are dealt to: work for all threads where heads are
# few, and a slab of dK and dV for each.
_CHUNKS = 16


def _table(emb: Tensor) -> Tensor:
    """fp32 [H|1, D, N rounded up], zeros behind the last position."""
    more = -emb.shape[-1] % _PADDING
    return torch.nn.functional.pad(emb.float(), (0, more)).contiguous()


def _problem(p: FlashParams) -> tuple[Any, ...]:
    """cu_seqlens_q .. seqused_k, longest sequences, scale, window, as the native schema has it."""
    indices = (None if x is None else x.contiguous() for x in p[:3])
    return (*indices, *p[5:10])


def _low(x: Tensor) -> Tensor | None:
    return x if x.dim() > 1 else None


def fwd(
    q: Tensor, k: Tensor, v: Tensor, emb: Tensor, p: FlashParams,
    out: Tensor, lse: Tensor, out_lo: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``cope_fwd``."""
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(float("-inf"))
        for x in (out, out_lo):
            x.zero_()
    _native_op("cope_fwd")(
        _unit(q), _unit(k), _unit(v), _table(emb), emb.shape[-1], *_problem(p), out, lse,
        _low(out_lo),
    )  # fmt: skip


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, emb: Tensor, p: FlashParams,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Launcher of ``cope_bwd``."""
    q, k, v, out, lse, out_lo = tape
    dq, dk, dv, demb = grads
    if p.cu_seqlens_q is not None or q.numel() == 0:  # rows and keys of no sequence
        for x in grads:
            x.zero_()
    if q.numel() == 0:
        return
    table = _table(emb)
    batch = q.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    chunks = -(-_CHUNKS // k.shape[-2])
    parts = q.new_zeros(
        (batch, q.shape[-2], chunks, table.shape[-1], q.shape[-1]), dtype=torch.float32
    )
    _native_op("cope_bwd")(
        _unit(dout), None if dlse is None else dlse.contiguous(), *map(_unit, (q, k, v)), table,
        emb.shape[-1], _unit(out), lse.contiguous(), _low(out_lo), *_problem(p), dq, dk, dv, parts,
    )  # fmt: skip
    total = parts.sum((0, 2))[:, : emb.shape[-1]].transpose(1, 2)
    demb.copy_(total.sum_to_size(demb.shape))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.cope.{kind}",
        op=f"cope_{kind}",
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=(
            *_COMMON[:3],
            Features("varlen", "seqused_k", "window_left", "window_right"),
            _COMMON[4],
        ),
        score=100.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "key tiles from right to left with a running sum of gates"),
    _spec("bwd", "sums of gates per key block, then from left to right; no atomics"),
)
