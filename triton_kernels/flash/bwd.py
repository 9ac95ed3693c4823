"""Backward: gradients from recomputed probabilities, without atomics (FlashAttention-2; Dao, 2023).

Algorithm: with P = exp2(S - LSE) recomputed from Q, K and the forward's LSE,

    delta_i = <dO_i, O_i + low_i> - dlse_i              ``delta``, one pass over the rows
    dS = P * (dO V^T - delta) * dlogit/dproduct
    dV = P^T dO,  dK = scale dS^T Q                     ``dkdv``: a program owns BLOCK_N keys
    dQ = scale dS K                                     ``dq``: a program owns BLOCK_M rows

``dkdv`` walks the rows that see its keys, over all query heads of its KV head, so that GQA needs no
reduction; ``dq`` walks the keys its rows see. Both ranges come from one function. Every sum has one
owner and one order: the result is deterministic.

Tiling: ``dkdv`` keeps K, V, dK, dV of its keys and streams Q, dO; it works on transposed tiles, so
that P^T and dS^T are left operands. ``dq`` keeps Q, dO, dQ and streams K, V. Tiles seen whole run
without masks. delta is [B, Hq, Sq] fp32, from the unrounded output (out_lo).

Cost: 7 products per visible pair instead of 5, as S and dP are computed twice: the price of having
no atomics. 2 (4 D + 3 Dv) flops; Q, K, V, dO are each read from L2 once per opposite tile.

Numerics: P and dS are rounded to the inputs' dtype for the products; sums are fp32.
Limits: as the forward. Source: the paper above; the code is our own.
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
    row_range,
    scaled,
    seen,
    seen_range,
    slope_of,
    span,
    tame,
    unleash,
)
from attnforge.triton_kernels.rope import load_turned
from attnforge.triton_kernels.tensors import INF, head_ptr, inside, load_tile, stat_ptr, tile_ptr
from attnforge.triton_kernels.weights import probability, score_gradient


@triton.jit(do_not_specialize=["rows", "tiles"])
def delta(
    dout, out, low, dlse, lse, result, rows, heads, tiles,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """result = <dout, out + low> - dlse per row, 0 for rows that saw nothing.

    dout, out, low (or None) are Views; dlse (or None), lse (None: all rows count), result are
    Stats. Grid: tiles * heads * batch; packed sequences count as one, since rows do not depend on
    each other.
    """
    pid = tl.program_id(0)
    first = pid % tiles * BLOCK_M
    h = pid // tiles % heads
    b = pid // tiles // heads
    at = first + tl.arange(0, BLOCK_M)
    d_head, o_head = head_ptr(dout, b, h, 0), head_ptr(out, b, h, 0)
    d = load_tile(d_head, first, rows, dout, BLOCK_M, BLOCK_DV, DV, False).to(tl.float32)
    o = load_tile(o_head, first, rows, out, BLOCK_M, BLOCK_DV, DV, False).to(tl.float32)
    if low is not None:
        low_head = head_ptr(low, b, h, 0)
        o += load_tile(low_head, first, rows, low, BLOCK_M, BLOCK_DV, DV, False).to(tl.float32)
    total = tl.sum(d * o, 1)
    if dlse is not None:
        total -= tl.load(stat_ptr(dlse, b, h, at), mask=at < rows, other=0.0)
    if lse is not None:
        stat = tl.load(stat_ptr(lse, b, h, at), mask=at < rows, other=-INF)
        total = tl.where(stat == -INF, 0.0, total)
    tl.store(stat_ptr(result, b, h, at), total, mask=at < rows)


@triton.jit
def through_rows(
    state, k_tile, v_tile, keys, slope, lo, hi, n_rows, n_keys, q, dout, q_head, d_head,
    lse, deltas, b, h, first_row, scores, place, sums,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys after the rows ``lo .. hi`` of query head ``h``.

    State: acc_k [BN, BLOCK_D], acc_v [BN, BLOCK_DV], sums of dS over rows [BN] (if ``sums`` is not
    None), all fp32, and what ``tame`` found in Q or dO.
    """
    acc_k, acc_v, columns, bad = state
    shift = n_keys - n_rows
    for start in tl.range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_tile = load_turned(
            q_head, start, n_rows, q, scores.rope, place, True, BLOCK_M, BLOCK_D, D, not MASKED
        )
        d_tile = load_tile(d_head, start, n_rows, dout, BLOCK_M, BLOCK_DV, DV, not MASKED)
        stat = row_lse(lse, b, h, first_row, rows, n_rows)
        rest = tl.load(stat_ptr(deltas, b, h, first_row) + rows, mask=rows < n_rows, other=0.0)
        s = dot(k_tile, q_tile.T, tl.zeros([k_tile.shape[0], BLOCK_M], tl.float32))  # [BN, BM]
        s, factor = logits(s, rows[None, :], keys[:, None], shift, slope, scores, place)
        p, tilt, sign = probability(s, stat[None, :], scores)
        dp = dot(v_tile, d_tile.T, tl.zeros([k_tile.shape[0], BLOCK_M], tl.float32))
        p = drop(p, rows[None, :], keys[:, None], scores, place)
        dp = drop(dp, rows[None, :], keys[:, None], scores, place)
        plain = score_gradient(tilt, sign, dp, rest[None, :], scores)
        ds = scaled(plain * factor, rows[None, :], scores, place)
        if MASKED:
            visible = seen(rows[None, :], keys[:, None], n_rows, n_keys, scores, place)
            visible = visible & (stat != INF)[None, :]
            p = tl.where(visible, p, 0.0)
            ds = tl.where(visible, ds, 0.0)
            plain = tl.where(visible, plain, 0.0)
            q_tile, found_q = tame(q_tile)
            d_tile, found_d = tame(d_tile)
            bad = bad | found_q | found_d
        if sums is not None:
            columns += tl.sum(plain, 1)
        acc_v = dot(p.to(d_tile.dtype), d_tile, acc_v)
        acc_k = dot(ds.to(q_tile.dtype), q_tile, acc_k)
    return acc_k, acc_v, columns, bad


@triton.jit(do_not_specialize=["seq", "scores", "tiles"])
def dkdv(
    q, k, v, dout, dk, dv, lse, deltas, seq, scores, sums, scale, heads, group, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: key tiles * KV heads * batch. Slots of a cache behind the used keys get zeros.

    sums: a Stat of fp32 [B, Hq, Sk], column sums of dS per query head for the keys in use; or None.
    """
    pid = tl.program_id(0)
    first = pid % tiles * BLOCK_N
    h = pid // tiles % heads
    b = pid // tiles // heads
    first_row, n_rows, first_key, n_keys = span(seq, b)
    slots = n_keys
    if seq.cu_q is None:
        slots = seq.keys
    if first >= slots:
        return
    keys = first + tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_N, n_keys) - 1
    reach = tl.where(first < n_keys, n_rows, 0)  # nobody sees a tile of unused slots
    ranges = seen_range(first, last, reach, n_rows - n_keys, scores.right, scores.left, BLOCK_M)
    k_head = head_ptr(k, b, h, first_key)
    v_head = head_ptr(v, b, h, first_key)
    home = (b, h * group, first_row, first_key, n_rows, n_keys, h)
    k_tile = load_turned(
        k_head, first, n_keys, k, scores.rope, home, False, BLOCK_N, BLOCK_D, D, False
    )
    v_tile = load_tile(v_head, first, n_keys, v, BLOCK_N, BLOCK_DV, DV, False)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    bad = 0
    for head in tl.range(h * group, h * group + group):
        q_head = head_ptr(q, b, head, first_row)
        d_head = head_ptr(dout, b, head, first_row)
        slope = slope_of(scores, b, head)
        place = (b, head, first_row, first_key, n_rows, n_keys, h)
        lo, whole_lo, whole_hi, hi = row_range(ranges, first, last, scores, place, BLOCK_M)
        columns = tl.zeros([BLOCK_N], tl.float32)
        state = (acc_k, acc_v, columns, bad)
        if scores.right is not None:
            state = through_rows(
                state, k_tile, v_tile, keys, slope, lo, whole_lo, n_rows, n_keys, q, dout,
                q_head, d_head, lse, deltas, b, head, first_row, scores, place, sums,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
        state = through_rows(
            state, k_tile, v_tile, keys, slope, whole_lo, whole_hi, n_rows, n_keys, q, dout,
            q_head, d_head, lse, deltas, b, head, first_row, scores, place, sums,
            D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
        acc_k, acc_v, columns, bad = through_rows(
            state, k_tile, v_tile, keys, slope, whole_hi, hi, n_rows, n_keys, q, dout,
            q_head, d_head, lse, deltas, b, head, first_row, scores, place, sums,
            D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
        if sums is not None:
            at = stat_ptr(sums, b, head, first_key) + keys
            tl.store(at, columns, mask=keys < n_keys)
    if bad != 0:
        for head in tl.range(h * group, h * group + group):
            place = (b, head, first_row, first_key, n_rows, n_keys, h)
            lo, _, _, hi = row_range(ranges, first, last, scores, place, BLOCK_M)
            q_head = head_ptr(q, b, head, first_row)
            d_head = head_ptr(dout, b, head, first_row)
            acc_k = unleash(
                acc_k, keys, lo, hi, n_rows, n_keys, q_head, q, scores, place, scores.rope,
                BLOCK_D, D, False,
            )  # fmt: skip
            acc_v = unleash(
                acc_v, keys, lo, hi, n_rows, n_keys, d_head, dout, scores, place, None,
                BLOCK_DV, DV, False,
            )  # fmt: skip
    used = (keys < n_keys)[:, None]
    acc_k = tl.where(used, acc_k * scale, 0.0).to(dk.ptr.dtype.element_ty)
    acc_v = tl.where(used, acc_v, 0.0).to(dv.ptr.dtype.element_ty)
    dk_head = head_ptr(dk, b, h, first_key)
    dv_head = head_ptr(dv, b, h, first_key)
    tl.store(
        tile_ptr(dk_head, first, dk, BLOCK_N, BLOCK_D), acc_k,
        mask=inside(first, slots, BLOCK_N, BLOCK_D, D),
    )  # fmt: skip
    tl.store(
        tile_ptr(dv_head, first, dv, BLOCK_N, BLOCK_DV), acc_v,
        mask=inside(first, slots, BLOCK_N, BLOCK_DV, DV),
    )  # fmt: skip


@triton.jit
def through_keys(
    state, q_tile, d_tile, stat, rest, rows, slope, lo, hi, n_rows, n_keys, k, v, k_head, v_head,
    scores, place, sums, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ / scale of a tile of rows after the keys ``lo .. hi``.

    State: acc [BM, BLOCK_D], sums of dS over keys [BM] (if ``sums`` is not None), both fp32, and
    what ``tame`` found in K. stat, rest [BM]: LSE and delta.
    """
    acc, total, bad = state
    shift = n_keys - n_rows
    for start in tl.range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_turned(
            k_head, start, n_keys, k, scores.rope, place, False, BLOCK_N, BLOCK_D, D, not MASKED
        )
        v_tile = load_tile(v_head, start, n_keys, v, BLOCK_N, BLOCK_DV, DV, not MASKED)
        s = dot(q_tile, k_tile.T, tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32))  # [BM, BN]
        s, factor = logits(s, rows[:, None], keys[None, :], shift, slope, scores, place)
        _, tilt, sign = probability(s, stat[:, None], scores)
        dp = dot(d_tile, v_tile.T, tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32))
        dp = drop(dp, rows[:, None], keys[None, :], scores, place)
        plain = score_gradient(tilt, sign, dp, rest[:, None], scores)
        ds = plain * factor
        if MASKED:
            visible = seen(rows[:, None], keys[None, :], n_rows, n_keys, scores, place)
            visible = visible & (stat != INF)[:, None]
            ds = tl.where(visible, ds, 0.0)
            plain = tl.where(visible, plain, 0.0)
            k_tile, found = tame(k_tile)
            bad = bad | found
        if sums is not None:
            total += tl.sum(plain, 1)
        acc = dot(ds.to(k_tile.dtype), k_tile, acc)
    return acc, total, bad


@triton.jit(do_not_specialize=["seq", "scores", "tiles"])
def dq(
    q, k, v, dout, grad, lse, deltas, seq, scores, sums, by_scale, scale, heads, group, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: row tiles * query heads * batch, late tiles first. grad is the View of dQ.

    sums, by_scale: Stats of fp32 [B, Hq, Sq], row sums of dS and the gradient of a row's scale; or
    None.
    """
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * BLOCK_M
    h = pid // tiles % heads
    b = pid // tiles // heads
    first_row, n_rows, first_key, n_keys = span(seq, b)
    if first >= n_rows:
        return
    rows = first + tl.arange(0, BLOCK_M)
    q_head = head_ptr(q, b, h, first_row)
    d_head = head_ptr(dout, b, h, first_row)
    k_head = head_ptr(k, b, h // group, first_key)
    v_head = head_ptr(v, b, h // group, first_key)
    slope = slope_of(scores, b, h)
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    place = (b, h, first_row, first_key, n_rows, n_keys, h // group)
    lo, whole_lo, whole_hi, hi = key_range(
        rows[:, None], first, last, n_rows, n_keys, scores, place, BLOCK_N
    )
    q_tile = load_turned(
        q_head, first, n_rows, q, scores.rope, place, True, BLOCK_M, BLOCK_D, D, False
    )
    d_tile = load_tile(d_head, first, n_rows, dout, BLOCK_M, BLOCK_DV, DV, False)
    stat = row_lse(lse, b, h, first_row, rows, n_rows)
    rest = tl.load(stat_ptr(deltas, b, h, first_row) + rows, mask=rows < n_rows, other=0.0)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32), 0)
    if scores.front is not None:
        state = through_keys(
            state, q_tile, d_tile, stat, rest, rows, slope, lo, whole_lo, n_rows, n_keys,
            k, v, k_head, v_head, scores, place, sums, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    state = through_keys(
        state, q_tile, d_tile, stat, rest, rows, slope, whole_lo, whole_hi, n_rows, n_keys,
        k, v, k_head, v_head, scores, place, sums, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    acc, total, bad = through_keys(
        state, q_tile, d_tile, stat, rest, rows, slope, whole_hi, hi, n_rows, n_keys,
        k, v, k_head, v_head, scores, place, sums, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    if bad != 0:
        acc = unleash(
            acc, rows, lo, hi, n_rows, n_keys, k_head, k, scores, place, scores.rope,
            BLOCK_D, D, True,
        )  # fmt: skip
    if sums is not None:
        tl.store(stat_ptr(sums, b, h, first_row) + rows, total, mask=rows < n_rows)
    acc = acc * scale
    if by_scale is not None:
        each = tl.where(acc == 0.0, 0.0, acc * q_tile.to(tl.float32))  # a hidden NaN of Q
        at = stat_ptr(by_scale, b, h, first_row) + rows
        tl.store(at, tl.sum(each, 1), mask=rows < n_rows)
    acc = scaled(acc, rows[:, None], scores, place).to(grad.ptr.dtype.element_ty)
    pointers = tile_ptr(head_ptr(grad, b, h, first_row), first, grad, BLOCK_M, BLOCK_D)
    tl.store(pointers, acc, mask=inside(first, n_rows, BLOCK_M, BLOCK_D, D))
