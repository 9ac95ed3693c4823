"""Forward: flash attention over the keys of listed blocks.

Algorithm: a program owns a tile of rows that share a list: consecutive queries of one list row,
with all query heads of the list's head. It walks the stream of the list's keys (``lists``) in tiles
of BLOCK_N, gathered row by row: S = Q K^T, online softmax in base 2, O += P V. Lists ascend, so
that tiles which every row sees whole are a range of the stream and run without masks.

Lists of few rows share a tile where blocks are whole tiles of keys: the program walks the union of
their lists, and a row hides the blocks that its own list does not name. Neighbours have blocks in
common (all queries of a block have that one), and each row alone would take a product of 16 rows.

Cost: 2 (D + Dv) flops per pair of a row and a listed key of its tile, and K and V of the listed
blocks once per tile. Other lists of few rows are padded to 16.

Numerics: as flash's forward. Rows without keys give 0 and -inf.
Sources: Native Sparse Attention (Yuan et al., 2025), section 4, for the rows of a group in a tile;
SeerAttention (Gao et al., 2024) for larger blocks of rows; the code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.block_sparse.lists import (
    at_places,
    listed_blocks,
    listed_by,
    load_rows,
    own_blocks,
    places,
    row_tile,
    store_rows,
    unleash_listed,
)
from attnforge.triton_kernels.lang import (
    dot,
    logits,
    result,
    seen,
    seen_range,
    slope_of,
    span,
    start_state,
    tame,
)
from attnforge.triton_kernels.tensors import INF, head_ptr, stat_ptr
from attnforge.triton_kernels.weights import weigh


@triton.jit
def attend(
    state, q, rows, slope, ids, count, lo, hi, n_rows, n_keys, k, v, k_head, v_head, scores,
    D: tl.constexpr, DV: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, own=None,
):  # fmt: skip
    """Online softmax over places ``lo .. hi`` of the stream of keys: ``lang.attend`` of lists.

    own: blocks of each row [BM, slots], where they are not those of the stream; a tile then lies in
    one block and is MASKED.
    """
    top, total, acc, bad = state
    shift = n_keys - n_rows
    for start in tl.range(lo, hi, BLOCK_N):
        keys, _ = at_places(ids, count, start, 1, KV_BLOCK, BLOCK_N)
        k_tile = load_rows(k_head, keys, n_keys, k, BLOCK_D, D)
        s = dot(q, k_tile.T, tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        s, _ = logits(s, rows[:, None], keys[None, :], shift, slope[:, None], scores)
        if MASKED:
            visible = seen(rows[:, None], keys[None, :], n_rows, n_keys, scores)
            if own is not None:
                visible = visible & listed_by(own, tl.load(ids + start // KV_BLOCK))[:, None]
            s = tl.where(visible, s, -INF)
        p, alpha, top, total = weigh(s, top, total, scores)
        acc = acc * alpha[:, None]
        v_tile = load_rows(v_head, keys, n_keys, v, BLOCK_DV, DV)
        if MASKED:
            v_tile, found = tame(v_tile)
            bad = bad | found
        acc = dot(p.to(v_tile.dtype), v_tile, acc)
    return top, total, acc, bad


@triton.jit(do_not_specialize=["seq", "scores"])
def fwd(
    q, k, v, out, low, lse, seq, scores, lists, single, max_rows, heads, pack, group,
    D: tl.constexpr, DV: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SHARE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """q, k, v, out and low (out_lo, or None) are Views, lse is a Stat.

    heads * pack are the query heads: ``pack`` of them share a list, ``group`` a KV head.
    lists: of Q_BLOCK queries. single: the lists of Q_BLOCK / SHARE queries, of at most SLOTS slots,
    that ``lists`` are the unions of; None for a SHARE of 1.
    """
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
    k_head = head_ptr(k, b, h * pack // group, first_key)
    v_head = head_ptr(v, b, h * pack // group, first_key)
    slope = tl.zeros([BLOCK_M], tl.float32) + slope_of(scores, b, head)
    own = None
    if SHARE > 1:
        own = own_blocks(single, b, h, rows // (Q_BLOCK // SHARE), real, SLOTS)
        whole_lo = hi
        whole_hi = hi
    top, total = start_state(scores, head, BLOCK_M)
    state = (top, total, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), 0)
    if scores.front is not None or SHARE > 1:
        state = attend(
            state, q_tile, rows, slope, ids, count, lo, whole_lo, n_rows, n_keys, k, v, k_head,
            v_head, scores, D, DV, KV_BLOCK, BLOCK_N, BLOCK_D, BLOCK_DV, True, own,
        )  # fmt: skip
    state = attend(
        state, q_tile, rows, slope, ids, count, whole_lo, whole_hi, n_rows, n_keys, k, v, k_head,
        v_head, scores, D, DV, KV_BLOCK, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    top, total, acc, bad = attend(
        state, q_tile, rows, slope, ids, count, whole_hi, hi, n_rows, n_keys, k, v, k_head,
        v_head, scores, D, DV, KV_BLOCK, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    if bad != 0:
        acc = unleash_listed(
            acc, rows, ids, count, lo, hi, n_rows, n_keys, v_head, v, scores, 1, 0,
            KV_BLOCK, BLOCK_DV, DV, True, own,
        )  # fmt: skip
    o, stat = result(top, total, acc, scores, None)
    store_rows(head_ptr(out, b, head, first_row), rows, real, out, o, BLOCK_DV, DV)
    if low is not None:
        rest = o - o.to(out.ptr.dtype.element_ty).to(tl.float32)
        store_rows(head_ptr(low, b, head, first_row), rows, real, low, rest, BLOCK_DV, DV)
    tl.store(stat_ptr(lse, b, head, first_row) + rows, stat, mask=real)
