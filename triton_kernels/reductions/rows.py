"""Statistics with one owner per row: entropy, and mass on spans of keys.

One program holds BLOCK_M query rows of one head and walks the keys they see. Spans are walked one
after the other, so a tile that several of them share is computed once for each; a span has its
sums in registers and needs no atomics. Cost: 2 D flops per visible pair; K from L2 mostly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import seen_range, slope_of, span
from attnforge.triton_kernels.reductions.tile import row_stats, score_tile
from attnforge.triton_kernels.tensors import LN2, head_ptr, load_tile

__all__ = ["row_entropy", "span_mass"]


@triton.jit
def row_entropy(
    q, k, lse, out, seq, scores, heads, group, tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, Sq] contiguous: -sum P ln P."""
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
    stat = row_stats(lse, b, h, rows, n_rows, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N):
        x = score_tile(
            q_tile, stat, rows, start, n_rows, n_keys, slope, k, k_head, scores, D, BLOCK_N, BLOCK_D
        )
        p = tl.exp2(x)
        total += tl.sum(tl.where(p == 0.0, 0.0, p * x), 1)
    at = (b * heads + h).to(tl.int64) * n_rows + rows
    tl.store(out + at, 0.0 - total * LN2, mask=rows < n_rows)


@triton.jit
def span_mass(
    q, k, lse, bounds, out, seq, scores, heads, group, tiles, spans,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, Sq, spans] contiguous: sum of P over keys bounds[t] .. bounds[t + 1] - 1."""
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
    stat = row_stats(lse, b, h, rows, n_rows, BLOCK_M)
    at = ((b * heads + h).to(tl.int64) * n_rows + rows) * spans
    for t in tl.range(0, spans):
        begin = tl.maximum(tl.load(bounds + t), lo)
        end = tl.minimum(tl.load(bounds + t + 1), hi)
        mass = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
            x = score_tile(
                q_tile, stat, rows, start, n_rows, n_keys, slope, k, k_head, scores,
                D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            keys = start + tl.arange(0, BLOCK_N)
            inside = (keys >= begin) & (keys < end)
            mass += tl.sum(tl.where(inside[None, :], tl.exp2(x), 0.0), 1)
        tl.store(out + at + t, mass, mask=rows < n_rows)
