"""The n keys of each row's largest logits: best first, ties to the smaller key, NaN before all.

Algorithm: a candidate (``candidates``) holds a logit and the complement of its key. A program holds
the KEPT best of BLOCK_M rows, unsorted; while a tile has a candidate that beats a row's worst, each
row's best one takes the worst's place. The list is written best first, a maximum at a time. More
than KEPT keys take another walk for the next ones, below the last one found.

Cost: 2 D flops per visible pair and walk, ceil(n / KEPT) walks; where the order of keys is random,
about KEPT ln(Sk / KEPT) steps of maxima over a tile per row. Source: our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.candidates import LOW, NOTHING, as_candidates, keep_best
from attnforge.triton_kernels.lang import seen_range, slope_of, span
from attnforge.triton_kernels.reductions.tile import logit_tile
from attnforge.triton_kernels.tensors import INF, LN2, LOG2E, head_ptr, load_tile, stat_ptr

__all__ = ["topk_keys"]


@triton.jit
def of_candidates(found):
    """(fp32 logits, keys) of candidates."""
    order = (found >> 32).to(tl.int32)
    bits = tl.where(order < 0, order ^ LOW, order)
    return bits.to(tl.float32, bitcast=True), (found & LOW).to(tl.int32) ^ LOW


@triton.jit
def topk_keys(
    q, k, lse, values, indices, seq, scores, heads, group, tiles, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """values, indices [B, Hq, Sq, n] contiguous; lse is a Stat, or None for logits.

    KEPT: a power of two, BLOCK_N at most.
    """
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
    stat = tl.zeros([BLOCK_M], tl.float32)
    if lse is not None:
        stat = tl.load(stat_ptr(lse, b, h, 0) + rows, mask=rows < n_rows, other=-INF)
    at = ((b * heads + h).to(tl.int64) * n_rows + rows) * n
    places = tl.arange(0, KEPT)[None, :]
    limit = tl.full([BLOCK_M], (1 << 63) - 1, tl.int64)
    for done in tl.range(0, n, KEPT):
        best = tl.full([BLOCK_M, KEPT], NOTHING, tl.int64) + places  # distinct, as candidates are
        worst = tl.min(best, 1)
        for start in tl.range(lo, hi, BLOCK_N):
            k_tile = load_tile(k_head, start, n_keys, k, BLOCK_N, BLOCK_D, D, False)
            s, _factor, counts = logit_tile(
                q_tile, k_tile, rows, start, n_rows, n_keys, slope, scores, BLOCK_N
            )
            found = as_candidates(s, (start + tl.arange(0, BLOCK_N)) ^ LOW)
            counts = counts & (stat != -INF)[:, None] & (found < limit[:, None])
            found = tl.where(counts, found, NOTHING)
            best, worst = keep_best(best, worst, found)
        limit = worst
        for place in tl.range(done, tl.minimum(done + KEPT, n)):
            top = tl.max(best, 1)
            best = tl.where(best == top[:, None], NOTHING, best)
            there = top >= NOTHING + KEPT
            s, keys = of_candidates(top)
            if lse is None:
                value = tl.where(there, s * LN2, -INF)
            else:
                value = tl.where(there, tl.exp2(s - stat * LOG2E), 0.0)
            tl.store(values + at + place, value, mask=rows < n_rows)
            tl.store(indices + at + place, tl.where(there, keys, -1), mask=rows < n_rows)
