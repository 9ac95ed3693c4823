"""CoPE, backward: gradients through scores, positions and gates, without atomics.

    dS = P (dP - delta);  dp_ij = dS_ij z'(p_ij)
    dx_it = dS_it + g_it (1 - g_it) sum of dp_ij over j <= t
    dT_i[n] = sum_j dS_ij max(0, 1 - |p_ij - n|)   (the last position takes all that lies beyond it)

Algorithm: ``rows`` owns BLOCK_M rows. It walks the keys from right to left for the sums of gates
alone, then from left to right for dS, the sums of dp, dQ and dT. Both sums are left in a workspace
at the edge of every key tile, from where ``keys``, which owns BLOCK_N keys, takes them. The
launcher calls the two for some rows at a time, so that the workspace stays bounded, and ``keys``
adds to fp32 sums. The launcher multiplies dT by the embeddings and by Q.

Cost: 8 products per visible pair where gates are open, 7 elsewhere; dT takes N steps per open tile.
Numerics: P and dX are rounded to the inputs' dtype for products; sums are fp32. Every sum has one
owner and one order. Limits and source: as the forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.cope.positions import (
    gates,
    is_open,
    placed,
    products,
    table_rows,
)
from attnforge.triton_kernels.lang import dot, seen, seen_range, span, tame, unleash
from attnforge.triton_kernels.tensors import INF, head_ptr, inside, load_tile, stat_ptr, tile_ptr


@triton.jit
def weights(x, score, visible, stat, rest, dp):
    """(P, dS) of a tile; rest: delta."""
    visible = visible & (stat != INF)[:, None]
    p = tl.where(visible, tl.exp(score - stat[:, None]), 0.0)
    return p, tl.where(visible, p * (dp - rest[:, None]), 0.0)


@triton.jit
def row_stats(lse, deltas, b, h, first_row, rows, n_rows):
    """(LSE, delta) of rows; +inf for rows without probabilities."""
    stat = tl.load(stat_ptr(lse, b, h, first_row) + rows, mask=rows < n_rows, other=-INF)
    rest = tl.load(stat_ptr(deltas, b, h, first_row) + rows, mask=rows < n_rows, other=0.0)
    return tl.where(stat == -INF, INF, stat), rest


@triton.jit
def edges(view, b, h, first_row, rows, from_row):
    """[BLOCK_M] pointers into a workspace that begins at row ``from_row`` of each sequence."""
    return head_ptr(view, b, h, 0) + (rows - from_row).to(tl.int64) * view.row


@triton.jit(do_not_specialize=["seq", "tiles", "scale", "from_row"])
def rows(
    q, k, v, dout, table, dq, dtable, right, left, lse, deltas, seq, sight, scale, from_row,
    heads, group, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dQ without what comes through the table, dtable (a View like the table's, zeros), the edges.

    right, left: Views [B, R, Hq, key tiles] of the workspace, for rows from ``from_row`` on.
    """
    pid = tl.program_id(0)
    first = from_row + pid % tiles * BLOCK_M
    h = pid // tiles % heads
    b = pid // tiles // heads
    first_row, n_rows, first_key, n_keys = span(seq, b)
    if first >= n_rows:
        return
    at = first + tl.arange(0, BLOCK_M)
    real = at < n_rows
    k_head = head_ptr(k, b, h // group, first_key)
    v_head = head_ptr(v, b, h // group, first_key)
    q_tile = load_tile(head_ptr(q, b, h, first_row), first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
    d_tile = load_tile(
        head_ptr(dout, b, h, first_row), first, n_rows, dout, BLOCK_M, BLOCK_DV, DV, False
    )
    entries = table_rows(table, b, h, first_row, at)
    sums = head_ptr(dtable, b, h, first_row) + at.to(tl.int64) * dtable.row
    far = tl.load(entries + table.top, mask=real[:, None], other=0.0)
    stat, rest = row_stats(lse, deltas, b, h, first_row, at, n_rows)
    right_edge = edges(right, b, h, first_row, at, from_row)
    left_edge = edges(left, b, h, first_row, at, from_row)
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    lo, _whole_lo, _whole_hi, hi = seen_range(
        first, last, n_keys, n_keys - n_rows, sight.left, sight.right, BLOCK_N
    )
    carry = tl.zeros([BLOCK_M], tl.float32)
    count = tl.cdiv(hi - lo, BLOCK_N)
    for n in tl.range(0, count):
        start = lo + (count - 1 - n) * BLOCK_N
        tl.store(right_edge + start // BLOCK_N, carry, mask=real)
        if is_open(carry, real, table.top):
            keys = start + tl.arange(0, BLOCK_N)
            x, _k = products(q_tile, k_head, start, n_keys, k, scale, D, BLOCK_N, BLOCK_D)
            visible = seen(at[:, None], keys[None, :], n_rows, n_keys, sight)
            carry += tl.sum(gates(x, visible), 1)
    tl.debug_barrier()
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    moved = tl.zeros([BLOCK_M], tl.float32)
    beyond = tl.zeros([BLOCK_M], tl.float32)
    bad = 0
    for start in tl.range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        tl.store(left_edge + start // BLOCK_N, moved, mask=real)
        carry = tl.load(right_edge + start // BLOCK_N, mask=real, other=0.0)
        x, k_tile = products(q_tile, k_head, start, n_keys, k, scale, D, BLOCK_N, BLOCK_D)
        visible = seen(at[:, None], keys[None, :], n_rows, n_keys, sight)
        v_tile = load_tile(v_head, start, n_keys, v, BLOCK_N, BLOCK_DV, DV, False)
        dp = dot(d_tile, v_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if is_open(carry, real, table.top):
            s, place, slope, gate, _carry = placed(x, visible, carry, entries, real, table.top)
            _p, ds = weights(x, s, visible, stat, rest, dp)
            moves = ds * slope
            dx = ds + gate * (1.0 - gate) * (tl.cumsum(moves, 1) + moved[:, None])
            dx = tl.where(visible, dx, 0.0)
            moved += tl.sum(moves, 1)
            for position in tl.range(0, table.top + 1):
                share = tl.maximum(1.0 - tl.abs(place - position), 0.0)
                part = tl.sum(tl.where(visible, ds * share, 0.0), 1)
                before = tl.load(sums + position, mask=real, other=0.0)
                tl.store(sums + position, before + part, mask=real)
        else:
            _p, dx = weights(x, x + far, visible, stat, rest, dp)
            beyond += tl.sum(dx, 1)
        k_tile, found = tame(k_tile)
        bad = bad | found
        acc = dot(dx.to(k_tile.dtype), k_tile, acc)
    before = tl.load(sums + table.top, mask=real, other=0.0)
    tl.store(sums + table.top, before + beyond, mask=real)
    if bad != 0:
        acc = unleash(
            acc, at, lo, hi, n_rows, n_keys, k_head, k, sight, None, None, BLOCK_D, D, True
        )
    mask = inside(first, n_rows, BLOCK_M, BLOCK_D, D)
    tl.store(
        tile_ptr(head_ptr(dq, b, h, first_row), first, dq, BLOCK_M, BLOCK_D), acc * scale, mask=mask
    )


@triton.jit(do_not_specialize=["seq", "tiles", "scale", "from_row", "to_row"])
def keys(
    q, k, v, dout, table, dk, dv, right, left, lse, deltas, seq, sight, scale, from_row, to_row,
    heads, group, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv, Views of fp32 sums, what rows ``from_row .. to_row`` give.

    heads: of KV.
    """
    pid = tl.program_id(0)
    start = pid % tiles * BLOCK_N
    h_kv = pid // tiles % heads
    b = pid // tiles // heads
    first_row, n_rows, first_key, n_keys = span(seq, b)
    if start >= n_keys:
        return
    at = start + tl.arange(0, BLOCK_N)
    k_head = head_ptr(k, b, h_kv, first_key)
    v_tile = load_tile(
        head_ptr(v, b, h_kv, first_key), start, n_keys, v, BLOCK_N, BLOCK_DV, DV, False
    )
    last = tl.minimum(start + BLOCK_N, n_keys) - 1
    lo, _whole_lo, _whole_hi, hi = seen_range(
        start, last, n_rows, n_rows - n_keys, sight.right, sight.left, BLOCK_M
    )
    lo = tl.maximum(lo, from_row)  # a multiple of BLOCK_M too
    hi = tl.maximum(tl.minimum(hi, to_row), lo)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in tl.range(0, group):
        h = h_kv * group + member
        q_head = head_ptr(q, b, h, first_row)
        d_head = head_ptr(dout, b, h, first_row)
        bad = 0
        for first in tl.range(lo, hi, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            real = row < n_rows
            q_tile = load_tile(q_head, first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
            d_tile = load_tile(d_head, first, n_rows, dout, BLOCK_M, BLOCK_DV, DV, False)
            entries = table_rows(table, b, h, first_row, row)
            stat, rest = row_stats(lse, deltas, b, h, first_row, row, n_rows)
            edge = edges(right, b, h, first_row, row, from_row) + start // BLOCK_N
            carry = tl.load(edge, mask=real, other=0.0)
            x, _k = products(q_tile, k_head, start, n_keys, k, scale, D, BLOCK_N, BLOCK_D)
            visible = seen(row[:, None], at[None, :], n_rows, n_keys, sight)
            dp = dot(d_tile, v_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            if is_open(carry, real, table.top):
                s, _at, slope, gate, _carry = placed(x, visible, carry, entries, real, table.top)
                p, ds = weights(x, s, visible, stat, rest, dp)
                edge = edges(left, b, h, first_row, row, from_row) + start // BLOCK_N
                moved = tl.load(edge, mask=real, other=0.0)
                sums = tl.cumsum(ds * slope, 1) + moved[:, None]
                dx = tl.where(visible, ds + gate * (1.0 - gate) * sums, 0.0)
            else:
                far = tl.load(entries + table.top, mask=real[:, None], other=0.0)
                p, dx = weights(x, x + far, visible, stat, rest, dp)
            q_tile, found_q = tame(q_tile)
            d_tile, found_d = tame(d_tile)
            bad = bad | found_q | found_d
            acc_v = dot(tl.trans(p).to(d_tile.dtype), d_tile, acc_v)
            acc_k = dot(tl.trans(dx).to(q_tile.dtype), q_tile, acc_k)
        if bad != 0:
            acc_k = unleash(
                acc_k, at, lo, hi, n_rows, n_keys, q_head, q, sight, None, None, BLOCK_D, D, False
            )
            acc_v = unleash(
                acc_v, at, lo, hi, n_rows, n_keys, d_head, dout, sight, None, None, BLOCK_DV, DV,
                False,
            )  # fmt: skip
    real_k = inside(start, n_keys, BLOCK_N, BLOCK_D, D)
    spot = tile_ptr(head_ptr(dk, b, h_kv, first_key), start, dk, BLOCK_N, BLOCK_D)
    tl.store(spot, tl.load(spot, mask=real_k, other=0.0) + acc_k * scale, mask=real_k)
    real_v = inside(start, n_keys, BLOCK_N, BLOCK_DV, DV)
    spot = tile_ptr(head_ptr(dv, b, h_kv, first_key), start, dv, BLOCK_N, BLOCK_DV)
    tl.store(spot, tl.load(spot, mask=real_v, other=0.0) + acc_v, mask=real_v)
