"""Column sums: sum_i w_i P_ij of BLOCK_N keys per program, over the rows that see them.

A key has one owner, which adds row tiles in their order: no atomics, the same bits in any batch.
Cost: 2 D flops per visible pair; Q is read ceil(Sk / BLOCK_N) times, from L2 mostly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import seen_range, slope_of, span
from attnforge.triton_kernels.reductions.tile import row_stats, score_tile
from attnforge.triton_kernels.tensors import head_ptr, load_tile, stat_ptr

__all__ = ["column_sums"]


@triton.jit
def column_sums(
    q, k, lse, weights, out, seq, scores, heads, group, tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, Sk] contiguous; weights is a Stat or None. Keys not in use get 0."""
    pid = tl.program_id(0)
    start = pid % tiles * BLOCK_N
    h = pid // tiles % heads
    b = pid // tiles // heads
    _, n_rows, _, n_keys = span(seq, b)
    slope = slope_of(scores, b, h)
    last = tl.minimum(start + BLOCK_N, n_keys) - 1
    lo, _, _, hi = seen_range(
        start, last, n_rows, n_rows - n_keys, scores.right, scores.left, BLOCK_M
    )
    q_head = head_ptr(q, b, h, 0)
    k_head = head_ptr(k, b, h // group, 0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(lo, hi, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q_head, first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
        stat = row_stats(lse, b, h, rows, n_rows, BLOCK_M)
        x = score_tile(
            q_tile, stat, rows, start, n_rows, n_keys, slope, k, k_head, scores, D, BLOCK_N, BLOCK_D
        )
        p = tl.exp2(x)
        if weights is not None:
            w = tl.load(stat_ptr(weights, b, h, 0) + rows, mask=rows < n_rows, other=0.0)
            # Hidden pairs are 0 whatever the weight is, and weight 0 hides a row.
            p = tl.where((w == 0.0)[:, None] | (p == 0.0), 0.0, p * w[:, None])
        total += tl.sum(p, 0)
    keys = start + tl.arange(0, BLOCK_N)
    at = (b * heads + h).to(tl.int64) * seq.keys + keys
    tl.store(out + at, total, mask=keys < seq.keys)
