"""What the reductions share: one tile of logits, or of log2 P."""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import dot, logits, row_lse, seen
from attnforge.triton_kernels.tensors import INF, load_tile

__all__ = ["logit_tile", "row_stats", "score_tile"]


@triton.jit
def row_stats(lse, b, h, rows, n_rows, BLOCK_M: tl.constexpr):
    """Base-2 LSE of rows: +inf for rows without probabilities, 0 where logits are wanted."""
    stat = tl.zeros([BLOCK_M], tl.float32)
    if lse is not None:
        stat = row_lse(lse, b, h, 0, rows, n_rows)
    return stat


@triton.jit
def logit_tile(q_tile, k_tile, rows, start, n_rows, n_keys, slope, scores, BLOCK_N: tl.constexpr):
    """(base-2 logits [BM, BLOCK_N] of keys ``start ..``, their derivative, which are seen)."""
    keys = start + tl.arange(0, BLOCK_N)
    s = dot(q_tile, k_tile.T, tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32))
    s, factor = logits(s, rows[:, None], keys[None, :], n_keys - n_rows, slope, scores)
    return s, factor, seen(rows[:, None], keys[None, :], n_rows, n_keys, scores)


@triton.jit
def score_tile(
    q_tile, stat, rows, start, n_rows, n_keys, slope, k, k_head, scores,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BM, BLOCK_N] of S - stat for keys ``start ..``, -inf where a pair does not count."""
    k_tile = load_tile(k_head, start, n_keys, k, BLOCK_N, BLOCK_D, D, False)
    s, _, counts = logit_tile(q_tile, k_tile, rows, start, n_rows, n_keys, slope, scores, BLOCK_N)
    counts = counts & ~(stat == INF)[:, None]
    return tl.where(counts, s - stat[:, None], -INF)
