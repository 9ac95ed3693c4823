"""Gradients of score mods on the CPU: buffers that the kernel adds to, and what is summed of them.

The kernel leaves sums of dS per (batch, query head): over rows, over the keys of a chunk, over
what shares an entry of rel_bias. What a mod broadcasts is summed here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashGrads, FlashParams

__all__ = ["GradBuffers"]

# Parts of the keys that the kernel may leave partial sums of, over all heads of a batch entry: what
# it chooses by itself. Tuned to more it makes do with these.
_CHUNKS = 16


class GradBuffers(NamedTuple):
    """The last arguments of the native backward: fp32, zeroed; None where nobody asks."""

    dcolumns: Tensor | None = None  # [B, Hq, Sk] (packed [Hq, Tk])
    drows: Tensor | None = None  # [B, Hq, chunks, Sq] (packed without B)
    dbias: Tensor | None = None  # shaped like bias
    drel_bias: Tensor | None = None  # [B, Hq, chunks, 2 R + 1]
    drow_scale: Tensor | None = None  # [B, Hq, Sq]

    @classmethod
    def plan(cls, q: Tensor, k: Tensor, p: FlashParams, grads: FlashGrads) -> GradBuffers:
        """What the kernel must leave for ``grads``."""
        if not p.mods:
            return cls()
        heads_kv = max(1, k.shape[-2])
        chunks = -(-_CHUNKS // heads_kv)
        *batch, rows, heads, _ = q.shape
        sequences = batch[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return q.new_zeros(shape, dtype=torch.float32) if wanted else None

        bias = grads.dbias
        with_bias, decay = bias.numel() > 0, grads.ddecay.numel() > 0
        if with_bias and (
            (bias.shape[0] == 1 and sequences > 1) or (bias.shape[1] == 1 and heads_kv > 1)
        ):
            chunks = _CHUNKS  # they share elements and run one by one: all threads work on each
        return cls(
            zeros(decay or grads.dkey_bias.numel() > 0, *batch, heads, k.shape[-3]),
            zeros(decay, *batch, heads, chunks, rows),
            zeros(with_bias, *bias.shape),
            zeros(grads.drel_bias.numel() > 0, sequences, heads, chunks, grads.drel_bias.shape[-1]),
            zeros(grads.drow_scale.numel() > 0, *batch, heads, rows),
        )

    def finish(self, p: FlashParams, grads: FlashGrads) -> None:
        """Fill the gradients of mods."""
        if self.dcolumns is not None and grads.dkey_bias.numel():
            grads.dkey_bias.copy_(self.dcolumns.sum_to_size(grads.dkey_bias.shape))
        if self.dbias is not None:
            grads.dbias.copy_(self.dbias)
        if self.drel_bias is not None:
            grads.drel_bias.copy_(self.drel_bias.sum((0, 2)).sum_to_size(grads.drel_bias.shape))
        if self.drow_scale is not None:
            grads.drow_scale.copy_(self.drow_scale.sum_to_size(grads.drow_scale.shape))
        if self.drows is not None and self.dcolumns is not None:
            rows = self.drows.double().sum(-2)
            total = self.dcolumns.double().neg_()
            if total.numel():
                total.scatter_add_(-1, _gate_places(rows, total, p).expand_as(rows), rows)
            grads.ddecay.copy_(total.sum_to_size(grads.ddecay.shape))


def _gate_places(rows: Tensor, keys: Tensor, p: FlashParams) -> Tensor:
    """Where queries read decay: [B|1, 1, Sq] (packed [1, Tq]); rows [.., Sq], keys [.., Sk]."""
    i = torch.arange(rows.shape[-1])
    used = None if p.seqused_k is None else p.seqused_k.to(torch.int64)
    if p.cu_seqlens_q is None or p.cu_seqlens_k is None:
        length = torch.tensor(keys.shape[-1]) if used is None else used
        length = length.view(-1, 1, 1)
        return (i + length - rows.shape[-1]).minimum(length - 1).clamp_min(0)
    cu_q, cu_k = p.cu_seqlens_q.to(torch.int64), p.cu_seqlens_k.to(torch.int64)
    which = torch.searchsorted(cu_q[1:], i, right=True).clamp_max(cu_q.shape[0] - 2)
    length = (cu_k.diff() if used is None else used)[which]
    place = i - cu_q[which] + length - cu_q.diff()[which]
    place = place.minimum(length - 1).clamp_min(0) + cu_k[which]
    return place.clamp_max(keys.shape[-1] - 1).unsqueeze(0)
