"""Statistics of attention in plain PyTorch: the definition of the ``reductions`` operators.

    P_ij = exp(s_ij - lse_i) where query i sees key j, 0 elsewhere

with the logits s of ``reference.flash`` (scale, softcap, ALiBi) and its masks. A row whose LSE is
-inf has nothing to attend to: it has no probabilities, whatever its logits are. Rows are walked in
chunks, so temporary memory is bounded; a hidden pair never reaches a result. Accumulation is
float64 for float64 inputs and float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashParams
from attnforge.reference import flash

__all__ = [
    "block_max",
    "column_sums",
    "edges",
    "head_gradient",
    "row_entropy",
    "span_backward",
    "span_mass",
    "topk_keys",
]


class _Tile(NamedTuple):
    """Some rows of every head of some sequences, with all the keys that one of them sees."""

    batch: slice
    rows: slice
    keys: slice
    logits: Tensor  # [B, Hq, R, N], hidden places -inf
    log_prob: Tensor  # logits - lse, or the logits without an LSE
    seen: Tensor  # the same shape, bool: visible, and in a row with an LSE above -inf
    slope: Tensor | None  # d logit / d raw of the softcap

    def prob(self) -> Tensor:
        return torch.exp(self.log_prob).masked_fill(~self.seen, 0.0)


def _tiles(q: Tensor, k: Tensor, lse: Tensor | None, p: FlashParams) -> Iterator[_Tile]:
    if q.numel() == 0 or k.shape[2] == 0:
        return
    acc, heads_kv = flash._accumulator(q.dtype), k.shape[2]
    for seq in flash._sequences(q, k, p):
        rows = flash._group_rows(q[seq.batch], heads_kv, acc)  # [B, Hk, G, Sq, D]
        keys = k[seq.batch, seq.keys].to(acc).transpose(1, 2)
        slopes = flash._batch_slopes(p.alibi_slopes, seq)
        grouped = flash._group_heads(slopes, heads_kv, acc)
        heads, mods = rows.shape[0] * q.shape[2], flash._mods(p, seq, rows, keys)
        for chunk in flash._chunks(q.shape[1], keys.shape[2], heads, p, q.device):
            part = rows[:, :, :, chunk.rows], keys[:, :, chunk.keys]
            s = flash._logits(*part, chunk, p, grouped, mods)
            logits = s.value.flatten(1, 2)
            seen = torch.ones_like(logits, dtype=torch.bool)
            if chunk.visible is not None:
                seen &= chunk.visible
            log_prob = logits
            if lse is not None:
                stat = lse[seq.batch, :, chunk.rows].to(acc).unsqueeze(-1)
                seen &= stat != float("-inf")
                log_prob = logits - stat
            slope = None if s.slope is None else s.slope.flatten(1, 2)
            yield _Tile(seq.batch, chunk.rows, chunk.keys, logits, log_prob, seen, slope)


def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, p: FlashParams, out: Tensor
) -> None:
    """Fill out [B, Hq, Sk] with sum_i w_i P_ij. A row of weight 0 is left out whatever it holds."""
    out.zero_()
    for t in _tiles(q, k, lse, p):
        prob = t.prob()
        if weights is not None:
            w = weights[t.batch, :, t.rows].to(prob.dtype).unsqueeze(-1)
            prob = (prob * w).masked_fill((w == 0) | ~t.seen, 0.0)
        out[t.batch, :, t.keys] += prob.sum(2)


def _spans(boundaries: Tensor, keys: slice) -> Iterator[tuple[int, slice]]:
    """(span, its columns) for each span that meets ``keys``."""
    ends = boundaries.tolist()
    for span in range(len(ends) - 1):
        lo, hi = max(ends[span], keys.start), min(ends[span + 1], keys.stop)
        if lo < hi:
            yield span, slice(lo - keys.start, hi - keys.start)


def span_mass(
    q: Tensor, k: Tensor, lse: Tensor, boundaries: Tensor, p: FlashParams, out: Tensor
) -> None:
    """Fill out [B, Hq, Sq, n] with the mass of keys boundaries[t] .. boundaries[t + 1] - 1."""
    out.zero_()
    for t in _tiles(q, k, lse, p):
        prob = t.prob()
        for span, columns in _spans(boundaries, t.keys):
            out[t.batch, :, t.rows, span] = prob[..., columns].sum(-1)


def span_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    p: FlashParams,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill grads = (dq, dk, dlse) from dout [B, Hq, Sq, n].

        dS_ij = P_ij dout_it(j);  dQ = scale dS' K;  dK = scale dS'^T Q;  dlse_i = -sum_j dS_ij

    where t(j) is the span of key j; keys in no span have no part. dS' has the softcap's slope.
    """
    dq, dk, dlse = grads
    acc, heads_kv = flash._accumulator(q.dtype), k.shape[2]
    group = q.shape[2] // max(1, heads_kv)
    sum_dk = torch.zeros(k.shape, dtype=acc, device=k.device)
    dq.zero_()
    dlse.zero_()
    for t in _tiles(q, k, lse, p):
        prob = t.prob()
        ds, used = torch.zeros_like(prob), torch.zeros_like(t.seen)
        for span, columns in _spans(boundaries, t.keys):
            weight = dout[t.batch, :, t.rows, span].to(acc).unsqueeze(-1)
            ds[..., columns] = prob[..., columns] * weight
            used[..., columns] = t.seen[..., columns]
        ds = ds.masked_fill(~used, 0.0)
        dlse[t.batch, :, t.rows] = -ds.sum(-1)
        if t.slope is not None:
            ds = (ds * t.slope).masked_fill(~used, 0.0)
        ds = ds * p.softmax_scale
        rows = flash._group_rows(q[t.batch, t.rows], heads_kv, acc)
        keys = k[t.batch, t.keys].to(acc).transpose(1, 2)
        for b in range(ds.shape[0]):  # pairs that count differ from sequence to sequence
            for h in range(ds.shape[1]):
                kv, pairs, counts = h // group, ds[b, h : h + 1], used[b, h : h + 1]
                part = flash._visible_matmul(pairs, keys[b, kv : kv + 1], counts)
                dq[t.batch][b, t.rows, h] = part[0].to(dq.dtype)
                back = pairs.transpose(1, 2), rows[b, kv, h % group].unsqueeze(0)
                part = flash._visible_matmul(*back, counts.transpose(1, 2))
                sum_dk[t.batch][b, t.keys, kv] += part[0]
    dk.copy_(sum_dk)


def _blocks(x: Tensor, dim: int, start: int, block: int) -> Tensor:
    """Maxima of x over blocks of ``dim``, where x begins at position ``start`` of it."""
    before = start % block
    after = -(before + x.shape[dim]) % block
    pad = (before, after) if dim == -1 else (0, 0, before, after)
    padded = torch.nn.functional.pad(x, pad, value=float("-inf"))
    shape = list(padded.shape)
    at = x.dim() + dim
    shape[at : at + 1] = [shape[at] // block, block]
    return padded.view(shape).amax(dim)


def block_max(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: tuple[int, int],
    p: FlashParams,
    out: Tensor,
) -> None:
    """Fill out [B, Hq, ceil(Sq / q_block), ceil(Sk / k_block)] with the largest P (or logit)."""
    q_block, k_block = blocks
    out.fill_(float("-inf"))
    for t in _tiles(q, k, lse, p):
        if t.keys.start == t.keys.stop:
            continue
        top = _blocks(t.log_prob.masked_fill(~t.seen, float("-inf")), -1, t.keys.start, k_block)
        top = _blocks(top, -2, t.rows.start, q_block)
        i, j = t.rows.start // q_block, t.keys.start // k_block
        place = out[t.batch, :, i : i + top.shape[2], j : j + top.shape[3]]
        place.copy_(torch.maximum(place, top))
    if lse is not None:
        out.exp_()


def row_entropy(q: Tensor, k: Tensor, lse: Tensor, p: FlashParams, out: Tensor) -> None:
    """Fill out [B, Hq, Sq] with -sum_j P_ij log P_ij in nats, where 0 log 0 = 0."""
    out.zero_()
    for t in _tiles(q, k, lse, p):
        prob = t.prob()
        out[t.batch, :, t.rows] = -(prob * t.log_prob).masked_fill(prob == 0, 0.0).sum(-1)


def topk_keys(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    n: int,
    p: FlashParams,
    values: Tensor,
    indices: Tensor,
) -> None:
    """Fill values and indices [B, Hq, Sq, n] with the keys of the largest logits of each row.

    Best first, ties to the smaller key, a NaN before everything. Where a row has fewer keys the
    index is -1 and the value 0 (without an LSE -inf).
    """
    values.fill_(float("-inf") if lse is None else 0.0)
    indices.fill_(-1)
    for t in _tiles(q, k, lse, p):
        order = t.logits.sort(dim=-1, descending=True, stable=True).indices
        # A visible logit may be -inf too: hidden ones go behind it.
        hidden = ~t.seen.gather(-1, order)
        order = order.gather(-1, hidden.long().sort(dim=-1, stable=True).indices)[..., :n]
        seen = t.seen.gather(-1, order)
        score = t.logits if lse is None else t.prob()
        place = (t.batch, slice(None), t.rows, slice(0, order.shape[-1]))
        values[place] = torch.where(seen, score.gather(-1, order).to(values.dtype), values[place])
        indices[place] = torch.where(seen, order + t.keys.start, -1).int()


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
    """Fill where [M, 4] with (batch, head, query, key) of each P > threshold, prob [M] with P.

    In lexicographic order; total [] is the number of all edges, of which the first M are kept.
    The rest of where is -1 and of prob 0.
    """
    where.fill_(-1)
    prob.zero_()
    shape = (q.shape[0], q.shape[2], q.shape[1])
    counts = torch.zeros(shape, dtype=torch.int64, device=q.device)
    for t in _tiles(q, k, lse, p):
        counts[t.batch, :, t.rows] = (t.prob() > threshold).sum(-1)
    total.copy_(counts.sum())
    first = (counts.flatten().cumsum(0) - counts.flatten()).view(shape)
    for t in _tiles(q, k, lse, p):
        value = t.prob()
        found = value > threshold
        place = first[t.batch, :, t.rows].unsqueeze(-1) + found.cumsum(-1) - 1
        found &= place < prob.shape[0]
        start = torch.tensor([t.batch.start, 0, t.rows.start, t.keys.start], device=q.device)
        where[place[found]] = (found.nonzero() + start).int()
        prob[place[found]] = value[found].to(prob.dtype)


def head_gradient(dout: Tensor, out: Tensor, rows: Tensor, sums: Tensor) -> None:
    """Fill rows [B, H, S] with <dO_i, O_i> and sums [B, H] with their sum over the rows."""
    acc = rows.dtype
    rows.copy_((dout.to(acc) * out.to(acc)).sum(-1).transpose(1, 2))
    sums.copy_(rows.double().sum(-1))
