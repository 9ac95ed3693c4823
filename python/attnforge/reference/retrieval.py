"""Attention to lists of keys in plain PyTorch: the definition of ``indexed_fwd`` and ``_bwd``.

    w_n = exp(scale <q, k[id_n]> + log_bias_n)      out = sum_n w_n v[id_n] / sum_n w_n
    LSE = log sum_n w_n

over the entries n of the row's list whose id names a key in use. An id that stands twice counts
twice. Gathers the lists of one sequence at a time, so it needs O(heads * N * D) bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashTape, IndexedGrads, IndexedParams, PagedCache
from attnforge.reference import paged

__all__ = ["backward", "forward"]


class _Gathered(NamedTuple):
    """What the lists of one sequence name; H lists, each with a KV head of its own."""

    k: Tensor  # [H, N, D]
    v: Tensor  # [H, N, Dv]
    bias: Tensor  # [H, N], -inf where an entry is no key
    valid: Tensor  # [H, N]
    place: Tensor  # [H, N] rows of [Sk * Hk]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _sequence(
    k: Tensor, v: Tensor, p: IndexedParams, b: int
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """k [S, Hk, D] and v of one sequence, which keys are real, and how many are in use."""
    if p.block_table is None:
        used = k.shape[1] if p.cache_seqlens is None else int(p.cache_seqlens[b])
        return k[b], v[b], None, max(0, min(used, k.shape[1]))
    assert p.cache_seqlens is not None
    cache = PagedCache(k, v, p.block_table, p.cache_seqlens)
    used = max(0, min(int(p.cache_seqlens[b]), cache.capacity))
    rows, values, real = paged._gathered(cache, b, used, slice(0, k.shape[2]))
    return rows, values, real, rows.shape[0]


def _gather(k: Tensor, v: Tensor, p: IndexedParams, b: int, lists: int) -> _Gathered:
    """The entries of ``lists`` lists (the KV heads or the query heads) of sequence b."""
    rows, values, real, used = _sequence(k, v, p, b)
    heads_kv = rows.shape[1]
    repeat = lists // p.ids.shape[1]
    ids = p.ids[b].to(torch.int64).repeat_interleave(repeat, 0)
    valid = (ids >= 0) & (ids < used)
    if p.lens is not None:
        slot = torch.arange(ids.shape[-1], device=ids.device)
        valid &= slot < p.lens[b].repeat_interleave(repeat, 0).unsqueeze(-1)
    wide = _wide(k.dtype)
    bias = torch.zeros(ids.shape, dtype=wide, device=ids.device)
    if p.log_bias is not None:
        bias = p.log_bias[b].to(wide).repeat_interleave(repeat, 0)
        valid &= ~bias.isneginf()
    at = torch.where(valid, ids, 0)
    if used == 0:  # nothing to gather from
        rows, values = (x.new_zeros((1, *x.shape[1:])) for x in (rows, values))
    elif real is not None:
        valid &= real[at]
    head = torch.arange(lists, device=ids.device).div(lists // heads_kv, rounding_mode="floor")
    found = [
        torch.where(valid.unsqueeze(-1), x[at, head.unsqueeze(-1)], 0).to(wide)
        for x in (rows, values)
    ]
    bias = torch.where(valid, bias, -torch.inf)
    return _Gathered(found[0], found[1], bias, valid, at * heads_kv + head.unsqueeze(-1))


def _lists(q: Tensor, heads_kv: int, p: IndexedParams) -> int:
    """Lists that are gathered: one per KV head unless query heads have their own."""
    return q.shape[2] if p.ids.shape[1] == q.shape[2] else heads_kv


def _rows(x: Tensor, lists: int) -> Tensor:
    """[Sq, Hq, D] -> [lists, heads of one * Sq, D]."""
    return x.transpose(0, 1).reshape(lists, -1, x.shape[-1])


def _back(x: Tensor, heads: int) -> Tensor:
    """The inverse of ``_rows``."""
    return x.reshape(heads, -1, x.shape[-1]).transpose(0, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Fill out [B, Sq, Hq, Dv], lse [B, Hq, Sq] and, unless empty, out_lo."""
    lists, heads = _lists(q, k.shape[2], p), q.shape[2]
    for b in range(q.shape[0]):
        g = _gather(k, v, p, b, lists)
        x = _rows(q[b].to(g.k.dtype), lists)
        s = p.softmax_scale * x @ g.k.transpose(1, 2)
        s = torch.where(g.bias.isneginf().unsqueeze(1), -torch.inf, s + g.bias.unsqueeze(1))
        total = torch.logsumexp(s, -1, keepdim=True) if s.shape[-1] else s.new_full(
            (*s.shape[:2], 1), -torch.inf
        )  # fmt: skip
        base = torch.where(total.isneginf(), 0.0, total)
        o = _back(torch.exp(s - base) @ g.v, heads)
        out[b] = o
        lse[b] = total.reshape(heads, -1)
        if out_lo.dim() > 1:
            out_lo[b] = o - out[b].to(o.dtype)


def backward(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: IndexedParams, grads: IndexedGrads
) -> None:
    """Fill dq, dk, dv and, where there is a bias, dlog_bias."""
    q, k, v, out, lse, out_lo = tape
    lists, heads = _lists(q, k.shape[2], p), q.shape[2]
    for b in range(q.shape[0]):
        g = _gather(k, v, p, b, lists)
        wide = g.k.dtype
        x, do, o = (_rows(t[b].to(wide), lists) for t in (q, dout, out))
        if out_lo.dim() > 1:
            o = o + _rows(out_lo[b].to(wide), lists)
        stat = lse[b].to(wide).reshape(lists, -1, 1)
        s = p.softmax_scale * x @ g.k.transpose(1, 2)
        s = torch.where(g.bias.isneginf().unsqueeze(1), -torch.inf, s + g.bias.unsqueeze(1))
        prob = torch.exp(s - torch.where(stat.isneginf(), 0.0, stat))
        delta = (do * o).sum(-1, keepdim=True)
        if dlse is not None:
            own = dlse[b].to(wide).reshape(lists, -1, 1)
            delta = delta - torch.where(stat.isneginf(), 0.0, own)
        ds = prob * (do @ g.v.transpose(1, 2) - delta)
        grads.dq[b] = _back(p.softmax_scale * ds @ g.k, heads)
        at = g.place.flatten()
        for grad, each in (
            (grads.dk, p.softmax_scale * ds.transpose(1, 2) @ x),
            (grads.dv, prob.transpose(1, 2) @ do),
        ):
            each = torch.where(g.valid.unsqueeze(-1), each, 0)
            flat = each.new_zeros(max(1, grad[b].shape[0] * grad.shape[2]), grad.shape[3])
            flat.index_add_(0, at, each.flatten(0, 1))
            grad[b] = flat[: grad.shape[1] * grad.shape[2]].view(grad[b].shape)
        if p.log_bias is not None:
            repeat = lists // p.ids.shape[1]
            each = torch.where(g.valid, ds.sum(1), 0)
            grads.dlog_bias[b] = each.view(-1, repeat, each.shape[-1]).sum(1)
