"""Scores and selections of keys in plain PyTorch: the definition of those operators."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge._params import PagedCache, SelectParams
from attnforge.reference import paged

__all__ = ["expand_runs", "key_scores", "page_scores", "select_columns"]


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [Sq, Hq, D], k [S, Hk, D] -> [Hq, Sq, S]."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    rows = q.to(wide).transpose(0, 1)
    keys = k.to(wide).permute(1, 2, 0).repeat_interleave(group, 0)
    return scale * rows @ keys


def key_scores(
    q: Tensor,
    k: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    counts: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Fill out [B, Hq, Sq, N] with logits, or with log shares where there are counts."""
    for b in range(q.shape[0]):
        used = out.shape[-1] if cache_seqlens is None else int(cache_seqlens[b])
        used = max(0, min(used, out.shape[-1]))
        if block_table is None:
            keys = k[b, :used]
        else:
            assert cache_seqlens is not None
            cache = PagedCache(k, k, block_table, cache_seqlens)
            keys = paged._gathered(cache, b, used, slice(0, k.shape[2]))[0]
        s = out.new_full(out.shape[1:], -torch.inf)
        s[..., :used] = _logits(q[b], keys, scale)
        if counts is not None:
            size = counts[b].repeat_interleave(s.shape[0] // counts.shape[1], 0).unsqueeze(1)
            s = torch.where(size > 0, s, -torch.inf)
            total = torch.logsumexp(s + size.clamp_min(1).to(s.dtype).log(), -1, keepdim=True)
            s = s - torch.where(total.isneginf(), 0.0, total)
        out[b] = s


def page_scores(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_scale: Tensor | None,
    block_table: Tensor | None,
    used: Tensor | None,
    scale: float,
    grouped: bool,
    out: Tensor,
) -> None:
    """Fill out [B, Hq, Sq, N]: sum over channels of max(q low, q high).

    page_scale: of bounds in int8. grouped: the largest over the query heads of each KV head,
    [B, Hk, Sq, N].
    """
    if page_scale is not None:
        low, high = (x.to(out.dtype) * page_scale.unsqueeze(-1) for x in (low, high))
    for b in range(q.shape[0]):
        ends = [low[b], high[b]]
        if block_table is not None:
            page = block_table[b, : out.shape[-1]].long().clamp(0, low.shape[0] - 1)
            ends = [low[page], high[page]]
        group = q.shape[2] // low.shape[-2]
        a, c = (x.to(out.dtype).permute(1, 0, 2).repeat_interleave(group, 0) for x in ends)
        x = scale * q[b].to(out.dtype).transpose(0, 1)  # [Hq, Sq, D]
        each = torch.maximum(x.unsqueeze(2) * a.unsqueeze(1), x.unsqueeze(2) * c.unsqueeze(1))
        found = each.sum(-1)
        if grouped:
            found = found.view(out.shape[1], group, *found.shape[1:]).amax(1)
        out[b] = found
        if used is not None:
            column = torch.arange(out.shape[-1], device=out.device)
            out[b].masked_fill_(column >= used[b], -torch.inf)


_NEVER = torch.iinfo(torch.int64).min


def _ranked(scores: Tensor) -> Tensor:
    """int64 keys: by score, then by column; _NEVER where a column is never chosen."""
    bits = scores.contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    column = torch.arange(scores.shape[-1], device=scores.device)
    key = (bits.long() << 31) + column
    return torch.where(scores.isnan() | scores.isneginf(), _NEVER, key)


def select_columns(
    scores: Tensor, used: Tensor | None, p: SelectParams, ids: Tensor, lens: Tensor
) -> None:
    """Fill ids [R, slots], ascending with -1 behind, and lens [R]."""
    rows, columns = scores.shape
    column = torch.arange(columns, device=scores.device)
    room = scores.new_full((rows, 1), columns) if used is None else used.view(-1, 1)
    room = room.clamp(0, columns)
    forced = ((column < p.first) | (column >= room - p.last)) & (column < room)
    key = _ranked(scores).masked_fill(column >= room, _NEVER)
    free = key.masked_fill(forced, _NEVER)
    if p.kind == "threshold":
        assert p.threshold is not None
        chosen = (free != _NEVER) & (scores >= p.threshold.view(-1, 1))
    else:
        order = free.argsort(-1, descending=True)
        place = torch.empty_like(order).scatter_(-1, order, column.expand_as(order))
        if p.kind == "topk":
            want = p.k - forced.sum(-1, keepdim=True)
        else:
            want = _fewest(scores, key, free, order, p.mass)
        chosen = (free != _NEVER) & (place < want)
    chosen |= forced
    found = torch.where(chosen, column, columns).sort(-1).values
    slots = ids.shape[1]
    found = torch.nn.functional.pad(found, (0, max(0, slots - columns)), value=columns)[:, :slots]
    ids.copy_(torch.where(found < columns, found, -1))
    lens.copy_(chosen.sum(-1).clamp_max(slots))


def expand_runs(
    columns: Tensor,
    lens: Tensor | None,
    starts: Tensor,
    tail_begin: int,
    tail_end: int,
    ids: Tensor,
    sizes: Tensor,
) -> None:
    """Fill ids [R, slots] with the runs of columns [R, N] and then the tail, -1 behind; sizes [R].

    Column c is starts[c] .. starts[c + 1] - 1 of starts [R / share, runs + 1].
    """
    rows, slots = ids.shape
    ends = starts.repeat_interleave(rows // starts.shape[0], 0).long()
    at = columns.long().clamp(0, ends.shape[1] - 2)
    real = columns == at
    if lens is not None:
        real &= torch.arange(columns.shape[1], device=ids.device) < lens.unsqueeze(-1)
    first = torch.where(real, ends.gather(-1, at), 0)
    size = torch.where(real, ends.gather(-1, at + 1) - first, 0)
    tail = size.new_tensor([[tail_begin, max(0, tail_end - tail_begin)]]).expand(rows, -1)
    first, size = torch.cat([first, tail[:, :1]], 1), torch.cat([size, tail[:, 1:]], 1)
    stop = size.cumsum(-1)
    place = torch.arange(slots, device=ids.device).expand(rows, -1).contiguous()
    which = torch.searchsorted(stop, place, right=True).clamp_max(size.shape[1] - 1)
    id_ = place + (first - (stop - size)).gather(-1, which)
    ids.copy_(torch.where(place < stop[:, -1:], id_, -1))
    sizes.copy_(stop[:, -1].clamp_max(slots))


def _fewest(scores: Tensor, key: Tensor, free: Tensor, order: Tensor, mass: float) -> Tensor:
    """How many free columns, best first, give all chosen ones ``mass`` of the softmax: [R, 1]."""
    s = torch.where(key != _NEVER, scores, -torch.inf).double()
    top = s.amax(-1, keepdim=True) if s.shape[1] else s.new_full((s.shape[0], 1), -torch.inf)
    weight = torch.exp(s - torch.where(top.isneginf(), 0.0, top)).masked_fill(key == _NEVER, 0.0)
    weight = torch.where(s == top, 1.0, weight).masked_fill(key == _NEVER, 0.0)
    own = weight.masked_fill(free == _NEVER, 0.0)
    need = mass * weight.sum(-1, keepdim=True) - (weight - own).sum(-1, keepdim=True)
    if mass >= 1.0:
        return torch.full_like(need, scores.shape[1])
    before = own.gather(-1, order).cumsum(-1) - own.gather(-1, order)
    return (before < need).sum(-1, keepdim=True)
