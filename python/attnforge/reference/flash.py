"""Flash attention in plain PyTorch: the definition of ``flash_fwd``, ``flash_bwd``, ``merge``.

    s_ij = scale * <q_i, k_j>;  s = cap * tanh(s / cap) if cap;  s -= slope_h * |i + offset - j|
    lse_i = log(sum_{j visible} exp(s_ij) + exp(sink_h));  o_i = sum_j exp(s_ij - lse_i) v_j

with offset = Sk - Sq (bottom-right alignment). Accumulation is float64 for float64 inputs and
float32 otherwise. Query rows are walked in chunks, and only keys that a chunk can see are read,
so temporary memory is bounded although the work is plain O(Sq * Sk).

A key that a row does not see never reaches that row, whatever it holds: hidden NaN and Inf do
not leak (``_visible_matmul``); visible ones propagate as IEEE arithmetic has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashGrads, FlashParams, FlashTape
from attnforge.reference.scores import (
    Scores,
    add_mod_grads,
    add_row_scale_grad,
    differentiate,
    exp_gap,
    weigh,
)

__all__ = ["backward", "forward", "merge", "sink_gradient"]

# Logits held at once: 2^22 fp32 elements are 16 MiB, a few times the last-level cache.
_CHUNK_LOGITS = 1 << 22


class _Sequence(NamedTuple):
    """One call of the core: a batch of equal-length sequences, as index ranges of the inputs."""

    batch: slice  # of dense tensors and of per-batch slopes
    rows: slice  # query rows: of dim 1 (dense) or dim 0 (varlen)
    keys: slice


def _sequences(q: Tensor, k: Tensor, p: FlashParams) -> Iterator[_Sequence]:
    used = None if p.seqused_k is None else p.seqused_k.tolist()
    if p.cu_seqlens_q is not None and p.cu_seqlens_k is not None:
        cu_q, cu_k = p.cu_seqlens_q.tolist(), p.cu_seqlens_k.tolist()
        for b in range(len(cu_q) - 1):
            stop = cu_k[b + 1] if used is None else cu_k[b] + used[b]
            yield _Sequence(slice(b, b + 1), slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], stop))
    elif used is None:
        yield _Sequence(slice(0, q.shape[0]), slice(0, q.shape[1]), slice(0, k.shape[1]))
    else:
        for b, length in enumerate(used):
            yield _Sequence(slice(b, b + 1), slice(0, q.shape[1]), slice(0, length))


def _cut(x: Tensor, seq: _Sequence, span: slice) -> Tensor:
    """The sequence's part of ``x`` as a 4-D view [B, S, H, D]."""
    return x[seq.batch, span] if x.dim() == 4 else x[span].unsqueeze(0)


def _cut_stat(x: Tensor, seq: _Sequence) -> Tensor:
    """The sequence's part of an LSE-shaped tensor as a view [B, H, Sq]."""
    return x[seq.batch, :, seq.rows] if x.dim() == 3 else x[:, seq.rows].unsqueeze(0)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _group_rows(x: Tensor, heads_kv: int, acc: torch.dtype) -> Tensor:
    """[B, S, Hq, D] -> [B, Hk, G, S, D]: the query heads that share a KV head become rows."""
    b, s, h, d = x.shape
    return x.to(acc).reshape(b, s, heads_kv, h // heads_kv, d).permute(0, 2, 3, 1, 4)


def _split_rows(x: Tensor, group: int) -> Tensor:
    """[B, Hk, G * R, X] -> [B, Hk, G, R, X]."""
    b, heads_kv, rows, width = x.shape
    return x.view(b, heads_kv, group, rows // group, width)


class _Chunk(NamedTuple):
    rows: slice  # query rows of the sequence
    keys: slice  # keys that some row of the chunk sees
    visible: Tensor | None  # [R, N] bool; None when every row sees every key of the chunk
    distance: Tensor  # [R, N] int64, |i + offset - j|


def _chunks(sq: int, sk: int, heads: int, p: FlashParams, device: torch.device) -> Iterator[_Chunk]:
    step = max(1, _CHUNK_LOGITS // max(1, heads * sk))
    offset, left, right = sk - sq, p.window_left, p.window_right
    for start in range(0, sq, step):
        stop = min(sq, start + step)
        first = 0 if left < 0 else min(sk, max(0, start + offset - left))
        last = sk if right < 0 else max(first, min(sk, stop + offset + right))
        i = torch.arange(start, stop, device=device).unsqueeze(1) + offset
        j = torch.arange(first, last, device=device).unsqueeze(0)
        visible = None
        if left >= 0 or right >= 0:
            visible = torch.ones(stop - start, last - first, dtype=torch.bool, device=device)
            if left >= 0:
                visible &= j >= i - left
            if right >= 0:
                visible &= j <= i + right
        yield _Chunk(slice(start, stop), slice(first, last), visible, (i - j).abs())


def _visible_matmul(a: Tensor, b: Tensor, visible: Tensor | None) -> Tensor:
    """``a @ b`` where a term counts only if visible: a [.., M, N] is 0 at hidden places.

    0 * NaN is NaN, so rows of ``b`` that hold NaN or Inf are zeroed for the product and their
    visible terms added one row at a time. visible is [.., M, N] or None (all).
    """
    if visible is None:
        return a @ b
    finite = torch.isfinite(b)
    if bool(finite.all()):
        return a @ b
    out = a @ b.where(finite, 0.0)
    rows = (~finite).any(-1).flatten(0, -2).any(0).nonzero().flatten().tolist()
    bad = b.where(~finite, 0.0)
    for n in rows:
        term = a[..., :, n : n + 1] * bad[..., n : n + 1, :]
        hidden = ~visible[..., :, n : n + 1] | finite[..., n : n + 1, :]
        out += term.masked_fill(hidden, 0.0)
    return out


class _Logits(NamedTuple):
    value: Tensor  # [B, Hk, G, R, N], hidden places -inf
    raw: Tensor  # scale * <q, k>, before anything else
    slope: Tensor | None  # d value / d raw of the softcap, same shape
    seen: Tensor | None  # [.., R, N]; None is all
    visible: Tensor | None  # [.., G * R, N], for products with the heads of a group as rows


def _logits(
    q: Tensor, k: Tensor, chunk: _Chunk, p: FlashParams, slopes: Tensor | None, mods: Scores
) -> _Logits:
    """q [B, Hk, G, R, D], k [B, Hk, N, D], slopes [B or 1, Hk, G, 1, 1]."""
    group = q.shape[2]
    raw = _split_rows(q.flatten(2, 3) @ k.transpose(-1, -2), group) * p.softmax_scale
    s, slope, seen = raw, None, chunk.visible
    if p.mods and (row_scale := mods.row_scale(chunk.rows)) is not None:
        s = s * row_scale
    if p.softcap > 0:
        t = torch.tanh(s / p.softcap)
        s, slope = t * p.softcap, 1.0 - t * t
    if slopes is not None:
        s = s - slopes * chunk.distance
    if p.mods:
        bias = mods.bias(chunk.rows, chunk.keys, s.dtype)
        s = s if bias is None else s + bias
        seen = mods.visible(chunk.rows, chunk.keys, seen)
    if seen is None:
        return _Logits(s, raw, slope, None, None)
    s = s.masked_fill(~seen, float("-inf"))
    wide = seen if seen.dim() == 2 else seen.expand(*s.shape[:2], *seen.shape[2:])
    if wide.dim() == 2:
        return _Logits(s, raw, slope, seen, wide.repeat(group, 1))
    return _Logits(s, raw, slope, seen, wide.expand(s.shape).flatten(2, 3))


def _group_heads(x: Tensor | None, heads_kv: int, acc: torch.dtype) -> Tensor | None:
    """Per-head values [Hq] or [B, Hq] -> [1 or B, Hk, G, 1, 1]."""
    if x is None:
        return None
    x = x.to(acc)
    return x.reshape(-1 if x.dim() == 2 else 1, heads_kv, x.shape[-1] // heads_kv, 1, 1)


def _batch_slopes(slopes: Tensor | None, seq: _Sequence) -> Tensor | None:
    return slopes[seq.batch] if slopes is not None and slopes.dim() == 2 else slopes


def _mods(p: FlashParams, seq: _Sequence, rows: Tensor, keys: Tensor) -> Scores:
    """What ``p.mods`` says of one sequence; rows [B, Hk, G, Sq, D], keys [B, Hk, Sk, D]."""
    _, heads_kv, group, sq, _ = rows.shape
    return Scores(p, seq.batch, seq.rows, seq.keys, heads_kv, group, sq, keys.shape[2])


def forward(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Fill ``out``, ``lse`` and, unless it is empty, ``out_lo = round(O - out)``.

    Dense q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]; varlen without the batch.
    """
    acc, heads_kv = _accumulator(q.dtype), k.shape[-2]
    if p.cu_seqlens_q is not None:  # rows past the last sequence
        lse.fill_(float("-inf"))
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0 or heads_kv == 0:
        return
    sinks = _group_heads(p.sinks, heads_kv, acc)
    for seq in _sequences(q, k, p):
        rows = _group_rows(_cut(q, seq, seq.rows), heads_kv, acc)
        keys = _cut(k, seq, seq.keys).to(acc).transpose(1, 2)  # [B, Hk, Sk, D]
        values = _cut(v, seq, seq.keys).to(acc).transpose(1, 2)
        mods = _mods(p, seq, rows, keys)
        rows, keys = mods.rotated(rows, True), mods.rotated(keys, False)
        rows = mods.descaled(rows, mods.mods.qk_descale)
        values = mods.descaled(values, mods.mods.v_descale)
        slopes = _group_heads(_batch_slopes(p.alibi_slopes, seq), heads_kv, acc)
        heads = rows.shape[0] * q.shape[-2]
        o_view, lse_view = _cut(out, seq, seq.rows), _cut_stat(lse, seq)
        for chunk in _chunks(rows.shape[3], keys.shape[2], heads, p, q.device):
            part = rows[:, :, :, chunk.rows]
            s = _logits(part, keys[:, :, chunk.keys], chunk, p, slopes, mods)
            w = weigh(s.value, p.score_fn, sinks)
            value = w.value
            if (kept := mods.kept(chunk.rows, chunk.keys, value.shape[0])) is not None:
                value = value * kept.to(value.device) / (1.0 - p.dropout_p)
            o = _visible_matmul(value.flatten(2, 3), values[:, :, chunk.keys], s.visible)
            empty = w.total == 0
            o = (_split_rows(o, part.shape[2]) / w.total).masked_fill(empty, 0.0)
            stat = w.lse.masked_fill(empty, float("-inf"))
            lse_view[:, :, chunk.rows] = stat.squeeze(-1).flatten(1, 2).to(lse.dtype)
            o = o.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, R, Hq, Dv]
            high = o.to(out.dtype)
            o_view[:, chunk.rows] = high
            if out_lo.numel():
                _cut(out_lo, seq, seq.rows)[:, chunk.rows] = (o - high).to(out.dtype)


def backward(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: FlashParams, grads: FlashGrads
) -> None:
    """Fill ``grads = (dq, dk, dv, dsinks)``.

        P = exp(S - lse);  delta_i = <dO_i, O_i> - dlse_i;  dS = P * (dO V^T - delta)
        dV = P^T dO;  dQ = scale * dS' K;  dK = scale * dS'^T Q;  dsink = -sum exp(sink - lse) delta

    with dS' = dS * (1 - tanh^2) under a softcap. O is ``out + out_lo``: the float32 value.
    """
    q, k, v, out, lse, out_lo = tape
    dq, dk, dv, dsinks = grads[:4]
    acc, heads_kv = _accumulator(q.dtype), k.shape[-2]
    for x in grads:  # unused key slots, rows past the last sequence
        x.zero_()
    if q.numel() == 0 or heads_kv == 0:
        return
    for seq in _sequences(q, k, p):
        rows = _group_rows(_cut(q, seq, seq.rows), heads_kv, acc)
        d_out = _group_rows(_cut(dout, seq, seq.rows), heads_kv, acc)
        o = _cut(out, seq, seq.rows).to(acc)
        if out_lo.numel():
            o = o + _cut(out_lo, seq, seq.rows).to(acc)
        stat = _cut_stat(lse, seq).to(acc)
        delta = (d_out * _group_rows(o, heads_kv, acc)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - _cut_stat(dlse, seq).to(acc).reshape(delta.shape)
        if p.sinks is not None:
            dsinks += sink_gradient(p.sinks, stat, delta.reshape(stat.shape)).to(dsinks.dtype)
        stat = stat.reshape(delta.shape)
        keys = _cut(k, seq, seq.keys).to(acc).transpose(1, 2)
        values = _cut(v, seq, seq.keys).to(acc).transpose(1, 2)
        mods = _mods(p, seq, rows, keys)
        rows, keys = mods.rotated(rows, True), mods.rotated(keys, False)
        slopes = _group_heads(_batch_slopes(p.alibi_slopes, seq), heads_kv, acc)
        heads = rows.shape[0] * q.shape[-2]
        sum_dk, sum_dv = torch.zeros_like(keys), torch.zeros_like(values)
        sum_dq = torch.zeros_like(rows)
        for chunk in _chunks(rows.shape[3], keys.shape[2], heads, p, q.device):
            part, d_part = rows[:, :, :, chunk.rows], d_out[:, :, :, chunk.rows]
            k_part, v_part = keys[:, :, chunk.keys], values[:, :, chunk.keys]
            s = _logits(part, k_part, chunk, p, slopes, mods)
            dp = _split_rows(d_part.flatten(2, 3) @ v_part.transpose(-1, -2), part.shape[2])
            kept = mods.kept(chunk.rows, chunk.keys, part.shape[0])
            if kept is not None:
                kept = kept.to(dp.device) / (1.0 - p.dropout_p)
                dp = dp * kept
            # A row with nothing to attend to has lse = -inf: it has no probabilities at all.
            row_lse = stat[:, :, :, chunk.rows]
            dead = row_lse == float("-inf")
            row_delta = delta[:, :, :, chunk.rows]
            prob, ds = differentiate(s.value, p.score_fn, row_lse, dp, row_delta)
            hidden = dead if s.seen is None else dead | ~s.seen
            prob, ds = prob.masked_fill(hidden, 0.0), ds.masked_fill(hidden, 0.0)
            if p.mods:
                add_mod_grads(mods, grads, chunk.rows, chunk.keys, ds)
            if s.slope is not None:
                ds = (ds * s.slope).masked_fill(hidden, 0.0)
            if grads.drow_scale.numel():
                add_row_scale_grad(mods, grads.drow_scale, chunk.rows, ds, s.raw, hidden)
            if p.mods and (row_scale := mods.row_scale(chunk.rows)) is not None:
                ds = ds * row_scale
            ds = ds.flatten(2, 3) * p.softmax_scale
            if kept is not None:
                prob = prob * kept
            prob = prob.flatten(2, 3)  # [B, Hk, G * R, N]
            transposed = None if s.visible is None else s.visible.transpose(-1, -2)
            g = _split_rows(_visible_matmul(ds, k_part, s.visible), part.shape[2])
            sum_dq[:, :, :, chunk.rows] = g
            sum_dk[:, :, chunk.keys] += _visible_matmul(
                ds.transpose(-1, -2), part.flatten(2, 3), transposed
            )
            sum_dv[:, :, chunk.keys] += _visible_matmul(
                prob.transpose(-1, -2), d_part.flatten(2, 3), transposed
            )
        sum_dq, sum_dk = mods.rotated(sum_dq, True, True), mods.rotated(sum_dk, False, True)
        _cut(dq, seq, seq.rows).copy_(sum_dq.permute(0, 3, 1, 2, 4).flatten(2, 3))
        _cut(dk, seq, seq.keys).copy_(sum_dk.transpose(1, 2))
        _cut(dv, seq, seq.keys).copy_(sum_dv.transpose(1, 2))


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dsinks [Hq] from lse and delta = <dO, O> - dlse, both [B, Hq, Sq] or varlen [Hq, T].

    The sink is a key whose value is zero: its dS is ``p_sink * (0 - delta)``.
    """
    prob = exp_gap(sinks.to(lse.dtype).unsqueeze(-1), lse)
    # No part: a sink of -inf, and rows of no sequence (their LSE is -inf in spite of the sink).
    absent = (prob == 0) | (lse == float("-inf"))
    terms = (prob * delta).masked_fill(absent, 0.0)
    total = terms.sum(-1)
    return -(total.sum(0) if total.dim() == 2 else total)


def merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` and ``lse`` with the attention over the union of the parts' keys.

    outs [.., S, H, D], lses [.., H, S]. An LSE of -inf or +inf marks an empty part: its output
    is not used, whatever it holds.
    """
    acc = lse.dtype
    stats = torch.stack([x.to(acc) for x in lses])
    stats = stats.masked_fill(stats == float("inf"), float("-inf"))
    top = stats.amax(0)
    base = torch.where(top == float("-inf"), 0.0, top)
    weights = torch.exp(stats - base)  # [N, .., H, S]
    total = weights.sum(0)
    empty = total == 0
    sum_out = torch.zeros(out.shape, dtype=acc, device=out.device)
    for x, w, s in zip(outs, weights, stats, strict=True):
        w = w.transpose(-1, -2).unsqueeze(-1)
        unused = (s == float("-inf")).transpose(-1, -2).unsqueeze(-1)
        sum_out += (x.to(acc) * w).masked_fill(unused, 0.0)
    scale = total.transpose(-1, -2).unsqueeze(-1)
    unused = empty.transpose(-1, -2).unsqueeze(-1)
    out.copy_((sum_out / scale).masked_fill(unused, 0.0))
    lse.copy_((base + torch.log(total)).masked_fill(empty, float("-inf")))
