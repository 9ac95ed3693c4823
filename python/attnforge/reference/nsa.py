"""Block importance and NSA's choice of blocks in plain PyTorch: the definition of both operators.

    P_hi = exp(s_hi - lse_h) for windows i that end at or before the query, 0 for others
    p_j  = sum over the heads h of a KV head, and windows i, of overlap(i, j) * P_hi

where window i is tokens [i d, i d + l), block j tokens [j l', (j + 1) l'), and the overlap is
counted in strides d (Yuan et al., 2025, equations 9 and 10). Rows go in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnforge._params import NsaSelectParams
from attnforge.reference import flash

__all__ = ["chosen", "combine", "importance", "overlap", "select"]

_CHUNK = 1 << 22  # scores held at once


def overlap(windows: int, blocks: int, p: NsaSelectParams, device: torch.device) -> Tensor:
    """float64 [windows, blocks]: strides that window i and block j share."""
    i = torch.arange(windows, device=device, dtype=torch.float64)[:, None] * p.cmp_stride
    j = torch.arange(blocks, device=device, dtype=torch.float64) * p.slc_block
    shared = torch.minimum(i + p.cmp_block, j + p.slc_block) - torch.maximum(i, j)
    return shared.clamp_min(0) / p.cmp_stride


def _sums(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, blocks: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """batch, rows (varlen: of the packed tensor), key positions and importance [B, Hk, R, N]."""
    heads_kv = k.shape[-2]
    for seq in flash._sequences(q, k, p.flash):
        acc = flash._accumulator(q.dtype)
        rows = flash._group_rows(flash._cut(q, seq, seq.rows), heads_kv, acc)
        keys = flash._cut(k, seq, seq.keys).to(acc).transpose(1, 2).unsqueeze(2)
        stat = flash._cut_stat(lse, seq).to(acc)
        stat = stat.view(stat.shape[0], heads_kv, rows.shape[2], stat.shape[2]).unsqueeze(-1)
        at = positions if positions.dim() == 2 else positions[seq.rows].unsqueeze(0)
        windows = keys.shape[3]
        share = overlap(windows, blocks, p, q.device).to(acc)
        last = torch.arange(windows, device=q.device) * p.cmp_stride + p.cmp_block - 1
        heads = rows.shape[0] * rows.shape[1] * rows.shape[2]
        step = max(1, _CHUNK // max(1, heads * windows))
        for first in range(0, rows.shape[3], step):
            part = slice(first, min(rows.shape[3], first + step))
            own = at[:, part]
            s = rows[:, :, :, part] @ keys.transpose(-1, -2) * p.flash.softmax_scale
            hidden = (last > own.unsqueeze(-1))[:, None, None] | (stat[:, :, :, part] == -torch.inf)
            prob = torch.exp(s - stat[:, :, :, part]).masked_fill(hidden, 0.0).sum(2)
            place = slice(seq.rows.start + part.start, seq.rows.start + part.stop)
            yield seq.batch, place, own, prob @ share


def importance(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Fill out [B, Hk, Sq, blocks], varlen [Hk, T, blocks]."""
    out.zero_()
    for batch, rows, _, value in _sums(q, k, lse, positions, p, out.shape[-1]):
        if out.dim() == 4:
            out[batch, :, rows] = value.to(out.dtype)
        else:
            out[:, rows] = value[0].to(out.dtype)


def chosen(scores: Tensor, at: Tensor, p: NsaSelectParams) -> Tensor:
    """int32 ids of the forced and the best blocks; scores [B, H, R, N], at [B | 1, R]."""
    blocks = scores.shape[-1]
    column = torch.arange(blocks, device=scores.device)
    own = at.long().div(p.slc_block, rounding_mode="floor")[:, None, :, None]
    forced = (column < p.init_blocks) | (column > own - p.local_blocks)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(column > own, -torch.inf)
    # Stable, and from the right: of equal scores the larger id comes first.
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    ids = blocks - 1 - order.indices[..., : p.top_n]
    ids = torch.where(order.values[..., : p.top_n] > -torch.inf, ids, blocks).sort(-1).values
    return torch.where(ids < blocks, ids, -1).to(torch.int32)


def select(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Fill out int32 [B, Hk, Sq, top_n], varlen [Hk, T, top_n]: ascending ids, then -1."""
    out.fill_(-1)
    for batch, rows, at, value in _sums(q, k, lse, positions, p, p.blocks):
        ids = chosen(value, at, p)
        slots = ids.shape[-1]
        if out.dim() == 4:
            out[batch, :, rows, :slots] = ids
        else:
            out[:, rows, :slots] = ids[0]


def combine(outs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """sum_n gates[..., n] * outs[n], differentiable."""
    acc = flash._accumulator(outs[0].dtype)
    total: Tensor | None = None
    for x, gate in zip(outs, gates.to(acc).unbind(-1), strict=True):
        part = x.to(acc) * gate.unsqueeze(-1)
        total = part if total is None else total + part
    assert total is not None
    return total.to(outs[0].dtype)
