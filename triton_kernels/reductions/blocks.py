"""The largest probability (or logit) of each block of q_block rows and k_block keys.

One program per block; it walks the part that is visible in tiles and keeps a maximum per row, over
log2 P, exponentiated at the end. A NaN is its block's maximum. Cost: 2 D flops per pair of the
tiles that blocks cut, so blocks smaller than a tile waste what is left of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import seen_range, slope_of, span
from attnforge.triton_kernels.reductions.tile import row_stats, score_tile
from attnforge.triton_kernels.tensors import INF, LN2, head_ptr, load_tile

__all__ = ["block_max"]


@triton.jit
def block_max(
    q, k, lse, out, seq, scores, heads, group, q_block, k_block, q_blocks, k_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, q_blocks, k_blocks] contiguous; lse is a Stat, or None for logits."""
    pid = tl.program_id(0)
    j = pid % k_blocks
    i = pid // k_blocks % q_blocks
    h = pid // k_blocks // q_blocks % heads
    b = pid // k_blocks // q_blocks // heads
    _, n_rows, _, n_keys = span(seq, b)
    slope = slope_of(scores, b, h)
    row_end = tl.minimum((i + 1) * q_block, n_rows)
    lo, _, _, hi = seen_range(
        i * q_block, row_end - 1, n_keys, n_keys - n_rows, scores.left, scores.right, BLOCK_N
    )
    begin = tl.maximum(j * k_block, lo)
    end = tl.minimum((j + 1) * k_block, hi)
    q_head = head_ptr(q, b, h, 0)
    k_head = head_ptr(k, b, h // group, 0)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    wild = tl.zeros([BLOCK_M], tl.int32)
    for first in tl.range(i * q_block, row_end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q_head, first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
        stat = row_stats(lse, b, h, rows, n_rows, BLOCK_M)
        for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
            x = score_tile(
                q_tile, stat, rows, start, n_rows, n_keys, slope, k, k_head, scores,
                D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            keys = start + tl.arange(0, BLOCK_N)
            inside = (rows < row_end)[:, None] & ((keys >= begin) & (keys < end))[None, :]
            x = tl.where(inside, x, -INF)
            wild = wild | tl.max((x != x).to(tl.int32), 1)
            top = tl.maximum(top, tl.max(tl.where(x != x, -INF, x), 1))
    best = tl.max(top, 0)
    value = best * LN2
    if lse is not None:
        value = tl.exp2(best)
    value = tl.where(tl.max(wild, 0) != 0, float("nan"), value)
    tl.store(out + pid.to(tl.int64), value)
