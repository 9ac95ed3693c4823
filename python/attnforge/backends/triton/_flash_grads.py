"""Gradients of the features of single scores, from what the Triton kernels leave.

``dkdv`` leaves column sums of dS per query head, ``dq`` row sums and the gradient of a row's scale;
here they are summed to the shape of their tensors, in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashGrads, FlashParams
from attnforge.reference.scores import rotate

__all__ = ["Sums", "by_distance", "turn_back"]


class Sums(NamedTuple):
    """fp32 results of the kernels, zeros where no kernel writes; None if not wanted."""

    columns: Tensor | None  # [B, Hq, Sk] (packed [Hq, Tk]): sums of dS over the rows
    rows: Tensor | None  # [B, Hq, Sq]: over the keys
    by_scale: Tensor | None  # [B, Hq, Sq]: gradient of row_scale

    @classmethod
    def plan(cls, lse: Tensor, k: Tensor, grads: FlashGrads) -> Sums:
        """What the wanted gradients need."""
        gates, by_key = grads.ddecay.numel() > 0, grads.dkey_bias.numel() > 0
        return cls(
            lse.new_zeros((*lse.shape[:-1], k.shape[-3])) if gates or by_key else None,
            torch.zeros_like(lse) if gates else None,
            torch.zeros_like(lse) if grads.drow_scale.numel() else None,
        )

    def finish(self, p: FlashParams, grads: FlashGrads) -> None:
        """Fill the gradients that are sums of these."""
        if grads.dkey_bias.numel() and self.columns is not None:
            grads.dkey_bias.copy_(self.columns.sum_to_size(grads.dkey_bias.shape))
        if grads.drow_scale.numel() and self.by_scale is not None:
            grads.drow_scale.copy_(self.by_scale.sum_to_size(grads.drow_scale.shape))
        if grads.ddecay.numel() and self.columns is not None and self.rows is not None:
            each = _at_keys(self.rows.double(), self.columns.shape[-1], p) - self.columns
            grads.ddecay.copy_(each.sum_to_size(grads.ddecay.shape))


def _at_keys(rows: Tensor, keys: int, p: FlashParams) -> Tensor:
    """Sums of rows [B, H, Sq] (packed [H, Tq]) at the key each row stands at, 0 elsewhere.

    A gather from the keys' side, since adding by index would need atomics. Rows before the first
    key count there. [B, H, Sk] or [H, Tk].
    """
    key = torch.arange(keys, device=rows.device)
    count = rows.shape[-1]
    if p.cu_seqlens_q is None or p.cu_seqlens_k is None:
        used = torch.full((1,), keys, device=rows.device)
        if p.seqused_k is not None:
            used = p.seqused_k.long().clamp(0, keys)
        offset = (used - count).view(-1, 1)
        at, first = key - offset, key == 0
        exists = (at >= 0) & (at < count) & (key < used.view(-1, 1))
        at = at.clamp(0, max(count - 1, 0)).unsqueeze(1).expand(rows.shape[0], rows.shape[1], -1)
        found = rows.gather(-1, at) * exists.unsqueeze(1)
        early = torch.arange(count, device=rows.device) + offset < 0  # [B|1, Sq]
        before = (rows * early.unsqueeze(1)).sum(-1, keepdim=True)
        return found + before * (first & (used > 0).view(-1, 1)).unsqueeze(1)
    cu_q, cu_k = p.cu_seqlens_q.long(), p.cu_seqlens_k.long()
    sequence = torch.searchsorted(cu_k[1:].contiguous(), key, right=True)
    sequence = sequence.clamp_max(cu_k.shape[0] - 2)
    lengths = cu_k.diff() if p.seqused_k is None else p.seqused_k.long()
    offset = lengths - cu_q.diff()
    place = key - cu_k[sequence]
    at = place - offset[sequence]
    exists = (at >= 0) & (at < cu_q.diff()[sequence]) & (place < lengths[sequence])
    at = (cu_q[sequence] + at).clamp(0, max(count - 1, 0))
    found = rows.gather(-1, at.expand(rows.shape[0], -1)) * exists
    row = torch.arange(count, device=rows.device)
    inside = (row >= cu_q[:-1, None]) & (row < cu_q[1:, None])
    early = inside & (row - cu_q[:-1, None] + offset[:, None] < 0)  # [sequences, Tq]
    before = rows @ early.to(rows.dtype).T
    return found + before[:, sequence] * ((place == 0) & (lengths[sequence] > 0))


def by_distance(skewed: Tensor, keys: int, radius: int) -> Tensor:
    """[H, 2 radius + 1] from sums [H, W] whose column n has distance n + 1 - ``keys``."""
    zero = keys - 1  # column of distance 0
    if radius == 0:
        return skewed.sum(-1, keepdim=True)
    found = skewed.new_zeros(skewed.shape[0], 2 * radius + 1)
    left, right = max(0, zero - radius + 1), min(skewed.shape[-1], zero + radius)
    found[:, left - zero + radius : right - zero + radius] = skewed[:, left:right]
    found[:, 0] = skewed[:, :left].sum(-1)
    found[:, -1] = skewed[:, right:].sum(-1)
    return found


def turn_back(grad: Tensor, turned: Tensor, positions: Tensor | None, p: FlashParams) -> None:
    """``grad`` from the gradient with respect to turned rows, [B, S, H, D] or packed, fp32."""
    cos, sin = p.score_mods.rope_cos, p.score_mods.rope_sin
    if cos is None or sin is None or positions is None:
        return
    packed = turned.dim() == 3
    x = turned.unsqueeze(0) if packed else turned
    if cos.shape[0] > 1:  # a table per KV head
        cos, sin = (t.repeat_interleave(x.shape[2] // t.shape[0], 0) for t in (cos, sin))
    at = positions.unsqueeze(0) if packed else positions
    x = rotate(x.transpose(1, 2), cos, -sin, at, p.rope_interleaved).transpose(1, 2)
    grad.copy_(x.squeeze(0) if packed else x)
