"""dS itself, for the gradients of biases per pair: dbias, and drel_bias by its diagonals.

Algorithm: a program owns one tile of rows and keys of the result and adds up dS of it over the
batch entries and heads that share the bias, in their order: no atomics, no workspace beside the
result. S and dP are recomputed from Q, K, V, dO, the forward's LSE and delta.

For a bias by distance the launcher gives a ``skewed`` result of one batch entry: rows are one
element shorter than they lie apart, so that all pairs of a distance fall into one column, which is
summed outside. There only visible pairs are written, into zeros.

Cost: 2 (D + Dv) flops per pair of tiles that somebody sees, once more than ``dkdv`` and ``dq``; it
runs only where such a gradient is wanted.
Source: our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import (
    dot,
    drop,
    key_range,
    logits,
    row_lse,
    seen,
    slope_of,
    span,
)
from attnforge.triton_kernels.rope import load_turned
from attnforge.triton_kernels.tensors import INF, head_ptr, load_tile, stat_ptr
from attnforge.triton_kernels.weights import probability, score_gradient


@triton.jit
def pair_gradient(
    q, k, v, dout, lse, deltas, first, start, scores, place,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dS [BM, BN] of rows ``first ..`` and keys ``start ..``, 0 for hidden pairs."""
    b, h, first_row, first_key, n_rows, n_keys, h_kv = place
    rows = first + tl.arange(0, BLOCK_M)
    row, key = rows[:, None], (start + tl.arange(0, BLOCK_N))[None, :]
    q_head = head_ptr(q, b, h, first_row)
    k_head = head_ptr(k, b, h_kv, first_key)
    q_tile = load_turned(
        q_head, first, n_rows, q, scores.rope, place, True, BLOCK_M, BLOCK_D, D, False
    )
    k_tile = load_turned(
        k_head, start, n_keys, k, scores.rope, place, False, BLOCK_N, BLOCK_D, D, False
    )
    d_head = head_ptr(dout, b, h, first_row)
    v_head = head_ptr(v, b, h_kv, first_key)
    d_tile = load_tile(d_head, first, n_rows, dout, BLOCK_M, BLOCK_DV, DV, False)
    v_tile = load_tile(v_head, start, n_keys, v, BLOCK_N, BLOCK_DV, DV, False)
    stat = row_lse(lse, b, h, first_row, rows, n_rows)
    rest = tl.load(stat_ptr(deltas, b, h, first_row) + rows, mask=rows < n_rows, other=0.0)
    s = dot(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    s, _ = logits(s, row, key, n_keys - n_rows, slope_of(scores, b, h), scores, place)
    _, tilt, sign = probability(s, stat[:, None], scores)
    dp = dot(d_tile, v_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    dp = drop(dp, row, key, scores, place)
    ds = score_gradient(tilt, sign, dp, rest[:, None], scores)
    visible = seen(row, key, n_rows, n_keys, scores, place) & (stat != INF)[:, None]
    return tl.where(visible, ds, 0.0)


@triton.jit(do_not_specialize=["seq", "scores", "extent", "tiles", "skewed"])
def dbias(
    q, k, v, dout, grad, lse, deltas, seq, scores, group, extent, tiles, skewed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: row tiles * key tiles * heads * batch of the result, a View ``grad`` of [.., Sq, Sk].

    extent: (first batch entry, first head, heads of the result, batch entries and heads that one
    result adds up); tiles: (of rows, of keys). skewed: keys that the result has place for, or None.
    """
    first_batch, first_head, heads, sum_batch, sum_heads = extent
    row_tiles, key_tiles = tiles
    pid = tl.program_id(0)
    start = pid % key_tiles * BLOCK_N
    first = pid // key_tiles % row_tiles * BLOCK_M
    own_head = pid // key_tiles // row_tiles % heads
    own_batch = pid // key_tiles // row_tiles // heads
    rows = first + tl.arange(0, BLOCK_M)
    keys = start + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(first_batch + own_batch, first_batch + own_batch + sum_batch):
        first_row, n_rows, first_key, n_keys = span(seq, b)
        last = tl.minimum(first + BLOCK_M, n_rows) - 1
        for h in tl.range(first_head + own_head, first_head + own_head + sum_heads):
            place = (b, h, first_row, first_key, n_rows, n_keys, h // group)
            lo, _, _, hi = key_range(
                rows[:, None], first, last, n_rows, n_keys, scores, place, BLOCK_N
            )
            if (first < n_rows) & (start < hi) & (start + BLOCK_N > lo):
                total += pair_gradient(
                    q, k, v, dout, lse, deltas, first, start, scores, place,
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
    at = head_ptr(grad, own_batch, own_head, 0)
    at += rows[:, None].to(tl.int64) * grad.row + keys[None, :]
    if skewed is None:
        inside = (rows < seq.rows)[:, None] & (keys < seq.keys)[None, :]
        tl.store(at, total.to(grad.ptr.dtype.element_ty), mask=inside)
    else:
        _, n_rows, _, n_keys = span(seq, first_batch + own_batch)
        inside = (rows < n_rows)[:, None] & (keys < n_keys)[None, :]
        tl.store(at + (skewed - 1 - (n_keys - n_rows)), total, mask=inside)
