"""Attention to listed keys, forward: decode over gathered rows.

Algorithm: rows that share a list are a tile, the query rows of all heads of a KV head where it has
one list, else those of one query head. A program walks one split of the list in tiles of BLOCK_N
entries: K and V are gathered row by row, S = Q K^T + bias, online softmax in base 2, O += P V.
States of several splits go to an fp32 workspace, and ``flash.merge`` adds them up in order.

Tiling: grid (splits * row tiles * row heads * batch). A split has ``split_entries`` entries, or its
share of a list that is longer than ``splits`` of those: a function of the list's length alone, so
that a sequence gets the same bits in any batch and with any room behind its lists.

Cost: 2 (D + Dv) flops per row and entry; (D + Dv) elements per entry and row tile, which is what
bounds decode, and 4 or 8 bytes of list. Query heads with lists of their own gather for themselves:
what their lists have in common comes from the L2 cache.

Limits: padded rows cost products (tensor cores take 16 rows), not bytes. Head dims above 512 are
multiplied in two tiles. Source: Flash-Decoding (Dao et al., 2023) for the splits; the code is our
own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.flash.decode import load_rows, store_rows
from attnforge.triton_kernels.lang import dot, finished
from attnforge.triton_kernels.pages import find, load_slots
from attnforge.triton_kernels.retrieval.lists import entries_at, list_of, packed_rows
from attnforge.triton_kernels.tensors import INF, head_ptr, stat_ptr
from attnforge.triton_kernels.weights import online


@triton.jit(do_not_specialize=["splits", "split_entries", "tiles"])
def indexed_fwd(
    q, k, v, table, out, low, lse, part_out, part_lse, lists, scale, heads, splits, split_entries,
    tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """q, out and low (out_lo, or None) are Views, k and v Pages, lse is a Stat.

    heads: row heads, of ``lists.pack`` query heads each. table: None where sequences are the pages.
    out, lse, part_*: see ``flash.decode``; low is of a single split. scale: in base 2.
    """
    pid = tl.program_id(0)
    split = pid % splits
    tile = pid // splits % tiles
    h = pid // splits // tiles % heads
    b = pid // splits // tiles // heads
    rows, head, real = packed_rows(lists, h, tile * BLOCK_M, BLOCK_M)
    first, count, n_keys = list_of(lists, b, h)
    size = tl.maximum(split_entries, tl.cdiv(tl.cdiv(count, splits), BLOCK_N) * BLOCK_N)
    lo = split * size
    hi = tl.minimum(lo + size, count)

    q_rows = head_ptr(q, b, head, rows)
    q_tile = load_rows(q_rows, real, 0, D, BLOCK_D)
    if D > BLOCK_D:
        tail = load_rows(q_rows, real, BLOCK_D, D, D - BLOCK_D)
    kv_head = tl.cast(h * lists.pack // lists.group, tl.int64)
    k_head = k.ptr + kv_head * k.head
    v_head = v.ptr + kv_head * v.head
    top = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N):
        keys, bias, seen = entries_at(lists, first, start, hi, n_keys, BLOCK_N)
        found = find(table, b, keys, seen)
        k_tile = load_slots(k_head, found, k, BLOCK_D, D)
        s = dot(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if D > BLOCK_D:
            rest = load_slots(k_head, found, k, D - BLOCK_D, D - BLOCK_D, BLOCK_D)
            s = dot(tail, rest.T, s)
        s = tl.where(found[2][None, :], s * scale + bias[None, :], -INF)
        p, alpha, top, total = online(s, top, total)
        v_tile = load_slots(v_head, found, v, BLOCK_DV, DV)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])
    o, stat = finished(top, total, acc)
    o_rows, l_rows = head_ptr(out, b, head, rows), stat_ptr(lse, b, head, rows)
    store_rows(o, stat, o_rows, l_rows, real, part_out, part_lse, split, DV)
    if low is not None:
        o -= o.to(out.ptr.dtype.element_ty).to(tl.float32)
        columns = tl.arange(0, BLOCK_DV)
        to = head_ptr(low, b, head, rows)[:, None] + columns[None, :]
        tl.store(to, o.to(low.ptr.dtype.element_ty), mask=real[:, None] & (columns < DV)[None, :])
