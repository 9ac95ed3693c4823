"""Backward: gradients of listed pairs from recomputed probabilities, without atomics.

As flash's backward (its ``delta`` comes first), over the streams of ``lists``:

    dq     a program owns a tile of rows that share a list and walks the stream of its keys
    dkdv   a program owns BLOCK_N keys of one block and walks the rows that list the block, by the
           inverse lists, with all query heads of its KV head

Every sum has one owner and one ascending order: the result is deterministic.

Cost: 2 (4 D + 3 Dv) flops per listed pair. Blocks of fewer than 16 keys are padded to 16 in
``dkdv``.
Sources: FlashAttention-2 (Dao, 2023); the code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.block_sparse.lists import (
    at_places,
    listed_blocks,
    listing_rows,
    load_rows,
    places,
    row_tile,
    store_rows,
    unleash_listed,
)
from attnforge.triton_kernels.lang import (
    dot,
    logits,
    row_lse,
    seen,
    seen_range,
    slope_of,
    span,
    tame,
)
from attnforge.triton_kernels.tensors import INF, head_ptr, stat_ptr
from attnforge.triton_kernels.weights import probability, score_gradient


@triton.jit
def through_keys(
    state, q_tile, d_tile, stat, rest, rows, slope, ids, count, lo, hi, n_rows, n_keys, k, v,
    k_head, v_head, scores,
    D: tl.constexpr, DV: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(dQ / scale of a tile of rows, what ``tame`` found in K) after places ``lo .. hi``."""
    acc, bad = state
    shift = n_keys - n_rows
    for start in tl.range(lo, hi, BLOCK_N):
        keys, _ = at_places(ids, count, start, 1, KV_BLOCK, BLOCK_N)
        k_tile = load_rows(k_head, keys, n_keys, k, BLOCK_D, D)
        v_tile = load_rows(v_head, keys, n_keys, v, BLOCK_DV, DV)
        s = dot(q_tile, k_tile.T, tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32))
        s, factor = logits(s, rows[:, None], keys[None, :], shift, slope[:, None], scores)
        _, tilt, sign = probability(s, stat[:, None], scores)
        dp = dot(d_tile, v_tile.T, tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32))
        ds = score_gradient(tilt, sign, dp, rest[:, None], scores) * factor
        if MASKED:
            visible = seen(rows[:, None], keys[None, :], n_rows, n_keys, scores)
            ds = tl.where(visible & (stat != INF)[:, None], ds, 0.0)
            k_tile, found = tame(k_tile)
            bad = bad | found
        acc = dot(ds.to(k_tile.dtype), k_tile, acc)
    return acc, bad


@triton.jit(do_not_specialize=["seq", "scores"])
def dq(
    q, k, v, dout, grad, lse, deltas, seq, scores, lists, scale, max_rows, heads, pack, group,
    D: tl.constexpr, DV: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """grad is the View of dQ; heads, pack and group as in the forward."""
    row, h, b, rows, at, real = row_tile(
        lists, max_rows, tl.program_id(0), heads, pack, Q_BLOCK, BLOCK_M
    )
    first_row, n_rows, first_key, n_keys = span(seq, b)
    if row * Q_BLOCK >= n_rows:
        return
    head = h * pack + at
    real = real & (rows < n_rows)
    rows = tl.where(real, rows, n_rows)
    first = tl.min(rows, 0)
    last = tl.max(tl.where(real, rows, 0), 0)
    ids, count = listed_blocks(lists, b, h, row)
    ranges = seen_range(first, last, n_keys, n_keys - n_rows, scores.left, scores.right, 1)
    lo, whole_lo, whole_hi, hi = places(ids, count, ranges, 1, KV_BLOCK, BLOCK_N)
    q_tile = load_rows(head_ptr(q, b, head, first_row), rows, n_rows, q, BLOCK_D, D)
    d_tile = load_rows(head_ptr(dout, b, head, first_row), rows, n_rows, dout, BLOCK_DV, DV)
    k_head = head_ptr(k, b, h * pack // group, first_key)
    v_head = head_ptr(v, b, h * pack // group, first_key)
    slope = tl.zeros([BLOCK_M], tl.float32) + slope_of(scores, b, head)
    stat = row_lse(lse, b, head, first_row, rows, n_rows)
    rest = tl.load(stat_ptr(deltas, b, head, first_row) + rows, mask=real, other=0.0)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), 0)
    if scores.front is not None:
        state = through_keys(
            state, q_tile, d_tile, stat, rest, rows, slope, ids, count, lo, whole_lo, n_rows,
            n_keys, k, v, k_head, v_head, scores, D, DV, KV_BLOCK, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    state = through_keys(
        state, q_tile, d_tile, stat, rest, rows, slope, ids, count, whole_lo, whole_hi, n_rows,
        n_keys, k, v, k_head, v_head, scores, D, DV, KV_BLOCK, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    acc, bad = through_keys(
        state, q_tile, d_tile, stat, rest, rows, slope, ids, count, whole_hi, hi, n_rows,
        n_keys, k, v, k_head, v_head, scores, D, DV, KV_BLOCK, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    if bad != 0:
        acc = unleash_listed(
            acc, rows, ids, count, lo, hi, n_rows, n_keys, k_head, k, scores, 1, 0,
            KV_BLOCK, BLOCK_D, D, True,
        )  # fmt: skip
    store_rows(head_ptr(grad, b, head, first_row), rows, real, grad, acc * scale, BLOCK_D, D)


@triton.jit
def through_rows(
    state, k_tile, v_tile, keys, listing, count, lo, hi, n_rows, n_keys, q, dout, lse, deltas,
    b, h, pack, first_row, scores,
    D: tl.constexpr, DV: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(dK / scale, dV, what ``tame`` found in Q or dO) after places ``lo .. hi`` of the rows."""
    acc_k, acc_v, bad = state
    shift = n_keys - n_rows
    for start in tl.range(lo, hi, BLOCK_M):
        rows, at = at_places(listing, count, start, pack, Q_BLOCK, BLOCK_M)
        head = h * pack + at
        q_tile = load_rows(head_ptr(q, b, head, first_row), rows, n_rows, q, BLOCK_D, D)
        d_tile = load_rows(head_ptr(dout, b, head, first_row), rows, n_rows, dout, BLOCK_DV, DV)
        slope = tl.zeros([BLOCK_M], tl.float32) + slope_of(scores, b, head)
        stat = row_lse(lse, b, head, first_row, rows, n_rows)
        rest = tl.load(stat_ptr(deltas, b, head, first_row) + rows, mask=rows < n_rows, other=0.0)
        s = dot(k_tile, q_tile.T, tl.zeros([k_tile.shape[0], BLOCK_M], tl.float32))  # [BN, BM]
        s, factor = logits(s, rows[None, :], keys[:, None], shift, slope[None, :], scores)
        p, tilt, sign = probability(s, stat[None, :], scores)
        dp = dot(v_tile, d_tile.T, tl.zeros([k_tile.shape[0], BLOCK_M], tl.float32))
        ds = score_gradient(tilt, sign, dp, rest[None, :], scores) * factor
        if MASKED:
            visible = seen(rows[None, :], keys[:, None], n_rows, n_keys, scores)
            visible = visible & (stat != INF)[None, :]
            p = tl.where(visible, p, 0.0)
            ds = tl.where(visible, ds, 0.0)
            q_tile, found_q = tame(q_tile)
            d_tile, found_d = tame(d_tile)
            bad = bad | found_q | found_d
        acc_v = dot(p.to(d_tile.dtype), d_tile, acc_v)
        acc_k = dot(ds.to(q_tile.dtype), q_tile, acc_k)
    return acc_k, acc_v, bad


@triton.jit(do_not_specialize=["seq", "scores"])
def dkdv(
    q, k, v, dout, dk, dv, lse, deltas, seq, scores, inverse, scale, blocks, heads, pack, group,
    D: tl.constexpr, DV: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: parts of blocks * blocks * KV heads * batch. Slots behind the used keys get zeros.

    heads counts KV heads; blocks: of the longest sequence.
    """
    parts = tl.cdiv(KV_BLOCK, BLOCK_N)
    pid = tl.program_id(0)
    block = pid // parts % blocks
    h = pid // parts // blocks % heads
    b = pid // parts // blocks // heads
    first_row, n_rows, first_key, n_keys = span(seq, b)
    slots = n_keys
    if seq.cu_q is None:
        slots = seq.keys
    first = block * KV_BLOCK + pid % parts * BLOCK_N
    if first >= slots:
        return
    end = tl.minimum((block + 1) * KV_BLOCK, slots)  # of the block; a part may reach over it
    keys = first + tl.arange(0, BLOCK_N)
    own = keys < end
    keys = tl.where(own & (keys < n_keys), keys, n_keys)
    last = tl.minimum(tl.minimum(first + BLOCK_N, end), n_keys) - 1
    reach = tl.where(first < n_keys, n_rows, 0)  # nobody sees a part of unused slots
    ranges = seen_range(first, last, reach, n_rows - n_keys, scores.right, scores.left, 1)
    k_tile = load_rows(head_ptr(k, b, h, first_key), keys, n_keys, k, BLOCK_D, D)
    v_tile = load_rows(head_ptr(v, b, h, first_key), keys, n_keys, v, BLOCK_DV, DV)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for row_head in tl.range(h * group // pack, (h + 1) * group // pack):
        listing, count = listing_rows(inverse, b, row_head, block)
        lo, whole_lo, whole_hi, hi = places(listing, count, ranges, pack, Q_BLOCK, BLOCK_M)
        state = (acc_k, acc_v, 0)
        if scores.right is not None:
            state = through_rows(
                state, k_tile, v_tile, keys, listing, count, lo, whole_lo, n_rows, n_keys, q, dout,
                lse, deltas, b, row_head, pack, first_row, scores,
                D, DV, Q_BLOCK, BLOCK_M, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
        state = through_rows(
            state, k_tile, v_tile, keys, listing, count, whole_lo, whole_hi, n_rows, n_keys, q,
            dout, lse, deltas, b, row_head, pack, first_row, scores,
            D, DV, Q_BLOCK, BLOCK_M, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
        acc_k, acc_v, bad = through_rows(
            state, k_tile, v_tile, keys, listing, count, whole_hi, hi, n_rows, n_keys, q, dout,
            lse, deltas, b, row_head, pack, first_row, scores,
            D, DV, Q_BLOCK, BLOCK_M, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
        if bad != 0:
            acc_k = unleash_listed(
                acc_k, keys, listing, count, lo, hi, n_rows, n_keys,
                head_ptr(q, b, row_head * pack, first_row), q, scores, pack, q.head,
                Q_BLOCK, BLOCK_D, D, False,
            )  # fmt: skip
            acc_v = unleash_listed(
                acc_v, keys, listing, count, lo, hi, n_rows, n_keys,
                head_ptr(dout, b, row_head * pack, first_row), dout, scores, pack, dout.head,
                Q_BLOCK, BLOCK_DV, DV, False,
            )  # fmt: skip
    used = (keys < n_keys)[:, None]
    at = first + tl.arange(0, BLOCK_N)
    acc_k = tl.where(used, acc_k * scale, 0.0)
    acc_v = tl.where(used, acc_v, 0.0)
    store_rows(head_ptr(dk, b, h, first_key), at, own, dk, acc_k, BLOCK_D, D)
    store_rows(head_ptr(dv, b, h, first_key), at, own, dv, acc_v, BLOCK_DV, DV)
