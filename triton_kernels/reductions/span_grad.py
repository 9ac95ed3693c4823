"""Gradient of the mass on spans of keys: dS_ij = P_ij dM_it for the span t of key j.

    dQ = scale dS' K,  dK = scale dS'^T Q,  dLSE_i = -sum_j dS_ij      dS' has the softcap's slope

Algorithm: as the backward of flash, without its second product: ``span_dq`` owns BLOCK_M rows and
walks keys, ``span_dk`` owns BLOCK_N keys and walks the rows of all query heads of its
KV head. A key knows its span from a list, -1 for none: such a key has no part.

Numerics: dS is fp32 in the products, which run as true fp32. Terms that do not count are 0 and
meet no NaN: products take 0 for NaN and infinities, and ``spoil`` puts NaN where one counts.

Cost: 8 D flops per visible pair. Limits: tiles are those of fp32. Source: our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import dot, row_lse, seen, seen_range, slope_of, span, tame
from attnforge.triton_kernels.reductions.tile import logit_tile
from attnforge.triton_kernels.tensors import (
    INF,
    head_ptr,
    inside,
    load_tile,
    tile_ptr,
)

__all__ = ["span_dk", "span_dq"]


@triton.jit
def counting(rows, start, stat, span_of, n_rows, n_keys, scores, BLOCK_N: tl.constexpr):
    """(which pairs of a tile count, the spans [BN] of its keys)."""
    keys = start + tl.arange(0, BLOCK_N)
    spans = tl.load(span_of + keys, mask=keys < n_keys, other=-1)
    counts = seen(rows[:, None], keys[None, :], n_rows, n_keys, scores)
    return counts & (stat != INF)[:, None] & (spans >= 0)[None, :], spans


@triton.jit
def score_grad(
    q_tile, k_tile, stat, mass, rows, start, span_of, n_rows, n_keys, slope, scores,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(dS, dS') [BM, BN] fp32, 0 where a pair does not count; mass [BM]: dM of each row's spans."""
    counts, spans = counting(rows, start, stat, span_of, n_rows, n_keys, scores, BLOCK_N)
    s, factor, _seen = logit_tile(
        q_tile, k_tile, rows, start, n_rows, n_keys, slope, scores, BLOCK_N
    )
    weight = tl.load(mass[:, None] + spans[None, :], mask=counts, other=0.0)
    ds = tl.where(counts, tl.exp2(s - stat[:, None]) * weight, 0.0)
    return ds, tl.where(counts, ds * factor, 0.0)


@triton.jit
def spoil(acc, counts, x):
    """``acc`` [BM, D] with NaN where a row of ``x`` [BN, D] that counts has NaN or an infinity."""
    wild = tl.where(tl.abs(x.to(tl.float32)) < INF, 0.0, 1.0)
    met = dot(counts.to(tl.float32), wild, tl.zeros(acc.shape, tl.float32))
    return tl.where(met > 0.0, float("nan"), acc)


@triton.jit
def span_dq(
    dmass, q, k, lse, span_of, grad, dlse, seq, scores, scale, heads, group, tiles, spans,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad is the View of dQ; dmass [B, Hq, Sq, spans] and dlse [B, Hq, Sq] are contiguous."""
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * BLOCK_M
    h = pid // tiles % heads
    b = pid // tiles // heads
    _, n_rows, _, n_keys = span(seq, b)
    rows = first + tl.arange(0, BLOCK_M)
    slope = slope_of(scores, b, h)
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    lo, _, _, hi = seen_range(
        first, last, n_keys, n_keys - n_rows, scores.left, scores.right, BLOCK_N
    )
    q_tile = load_tile(head_ptr(q, b, h, 0), first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
    k_head = head_ptr(k, b, h // group, 0)
    stat = row_lse(lse, b, h, 0, rows, n_rows)
    row = (b * heads + h).to(tl.int64) * n_rows + rows
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    bad = 0
    for start in tl.range(lo, hi, BLOCK_N):
        k_tile = load_tile(k_head, start, n_keys, k, BLOCK_N, BLOCK_D, D, False)
        ds, turned = score_grad(
            q_tile, k_tile, stat, dmass + row * spans, rows, start, span_of, n_rows, n_keys,
            slope, scores, BLOCK_N,
        )  # fmt: skip
        total += tl.sum(ds, 1)
        k_tile, found = tame(k_tile)
        bad = bad | found
        acc = dot(turned, k_tile.to(tl.float32), acc)
    if bad != 0:
        for start in tl.range(lo, hi, BLOCK_N):
            counts, _spans = counting(rows, start, stat, span_of, n_rows, n_keys, scores, BLOCK_N)
            k_tile = load_tile(k_head, start, n_keys, k, BLOCK_N, BLOCK_D, D, False)
            acc = spoil(acc, counts, k_tile)
    tl.store(dlse + row, 0.0 - total, mask=rows < n_rows)
    at = tile_ptr(head_ptr(grad, b, h, 0), first, grad, BLOCK_M, BLOCK_D)
    acc = (acc * scale).to(grad.ptr.dtype.element_ty)
    tl.store(at, acc, mask=inside(first, n_rows, BLOCK_M, BLOCK_D, D))


@triton.jit
def span_dk(
    dmass, q, k, lse, span_of, grad, seq, scores, scale, heads, group, tiles, spans,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad is the View of dK; heads counts KV heads. Keys that are not in use get 0."""
    pid = tl.program_id(0)
    start = pid % tiles * BLOCK_N
    h = pid // tiles % heads
    b = pid // tiles // heads
    _, n_rows, _, n_keys = span(seq, b)
    last = tl.minimum(start + BLOCK_N, n_keys) - 1
    reach = tl.where(start < n_keys, n_rows, 0)  # nobody sees a tile of unused slots
    lo, _, _, hi = seen_range(
        start, last, reach, n_rows - n_keys, scores.right, scores.left, BLOCK_M
    )
    k_tile = load_tile(head_ptr(k, b, h, 0), start, n_keys, k, BLOCK_N, BLOCK_D, D, False)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in tl.range(h * group, h * group + group):
        slope = slope_of(scores, b, head)
        q_head = head_ptr(q, b, head, 0)
        mass = dmass + (b * heads * group + head).to(tl.int64) * n_rows * spans
        bad = 0
        for first in tl.range(lo, hi, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q_head, first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
            stat = row_lse(lse, b, head, 0, rows, n_rows)
            _ds, turned = score_grad(
                q_tile, k_tile, stat, mass + rows.to(tl.int64) * spans, rows, start, span_of,
                n_rows, n_keys, slope, scores, BLOCK_N,
            )  # fmt: skip
            q_tile, found = tame(q_tile)
            bad = bad | found
            acc = dot(turned.T, q_tile.to(tl.float32), acc)
        if bad != 0:
            for first in tl.range(lo, hi, BLOCK_M):
                rows = first + tl.arange(0, BLOCK_M)
                q_tile = load_tile(q_head, first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
                stat = row_lse(lse, b, head, 0, rows, n_rows)
                counts, _spans = counting(
                    rows, start, stat, span_of, n_rows, n_keys, scores, BLOCK_N
                )
                acc = spoil(acc, counts.T, q_tile)
    at = tile_ptr(head_ptr(grad, b, h, 0), start, grad, BLOCK_N, BLOCK_D)
    acc = (acc * scale).to(grad.ptr.dtype.element_ty)
    tl.store(at, acc, mask=inside(start, seq.keys, BLOCK_N, BLOCK_D, D))
