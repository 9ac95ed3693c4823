"""Edges: every P_ij above a threshold, in lexicographic order, into lists of a fixed size.

Algorithm: a program owns BLOCK_M rows of one head, walks the keys they see, and writes each edge to
its row's start plus the edges of the row before it. It is launched twice: with no room it only
counts, and the prefix sums of the counts are the starts of the second time. Both run one binary, so
that both see the same bits of P. No atomics.

Cost: 2 D flops per visible pair, twice. Source: our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import seen_range, slope_of, span
from attnforge.triton_kernels.reductions.tile import row_stats, score_tile
from attnforge.triton_kernels.tensors import head_ptr, load_tile

__all__ = ["edges"]


@triton.jit(do_not_specialize=["room"])
def edges(
    q, k, lse, threshold, starts, counts, where, prob, room, seq, scores, heads, group, tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """starts, counts int64 [B, Hq, Sq]; where int32 [room, 4]; prob fp32 [room]; contiguous."""
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
    row = (b * heads + h).to(tl.int64) * n_rows + rows
    begin = tl.load(starts + row, mask=rows < n_rows, other=0)
    at = begin
    for start in tl.range(lo, hi, BLOCK_N):
        x = score_tile(
            q_tile, stat, rows, start, n_rows, n_keys, slope, k, k_head, scores, D, BLOCK_N, BLOCK_D
        )
        p = tl.exp2(x)
        found = (p > threshold).to(tl.int32)
        place = at[:, None] + (tl.cumsum(found, 1) - found)
        kept = (found != 0) & (place < room)
        keys = (start + tl.arange(0, BLOCK_N))[None, :]
        tl.store(prob + place, p, mask=kept)
        tl.store(where + place * 4, tl.zeros_like(found) + b, mask=kept)
        tl.store(where + place * 4 + 1, tl.zeros_like(found) + h, mask=kept)
        tl.store(where + place * 4 + 2, tl.zeros_like(found) + rows[:, None], mask=kept)
        tl.store(where + place * 4 + 3, tl.zeros_like(found) + keys, mask=kept)
        at += tl.sum(found, 1)
    tl.store(counts + row, at - begin, mask=rows < n_rows)
