"""Attention to listed keys, backward: without atomics.

    P = exp(S - LSE), dS = P (dO V^T - delta), delta = rowsum(dO O) - dLSE
    dQ = scale dS K, dK += scale dS^T Q, dV += P^T dO, dlog_bias = sum over rows of dS

    rows       a program owns a tile of rows that share a list and walks the list: dQ
    entries    a program owns BLOCK_N entries of a list and walks its rows: what each entry adds to
               its key and value, in an fp32 workspace, and its dlog_bias
    keys       a program owns BLOCK_N keys of a KV head and adds up the entries that name them, in
               ascending order, by the inverse lists

Every sum has one owner and one order: the result is deterministic, ids that stand twice included.
Keys that no list names cost nothing but their zeros.

Cost: 2 (4 D + 3 Dv) flops per row and entry. Workspace: 4 (D + Dv) bytes per entry of a list and KV
head. Sources: FlashAttention-2 (Dao, 2023) for the formulas; the code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.block_sparse.lists import listing_rows
from attnforge.triton_kernels.flash.decode import load_rows
from attnforge.triton_kernels.lang import dot, row_lse
from attnforge.triton_kernels.pages import find, load_slots
from attnforge.triton_kernels.retrieval.lists import entries_at, list_of, packed_rows
from attnforge.triton_kernels.tensors import INF, head_ptr, inside, stat_ptr, tile_ptr


@triton.jit
def load_stats(lse, deltas, lists, b, head, rows, real):
    """(base-2 LSE, delta) of rows; an LSE of +inf where there are no probabilities."""
    stat = row_lse(lse, b, head, 0, tl.where(real, rows, lists.rows), lists.rows)
    return stat, tl.load(stat_ptr(deltas, b, head, 0) + rows, mask=real, other=0.0)


@triton.jit(do_not_specialize=["tiles"])
def dq(
    q, k, v, dout, grad, lse, deltas, lists, scale, softmax_scale, heads, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """q, dout and grad (dQ) are Views, k and v Pages; the rest as in the forward."""
    pid = tl.program_id(0)
    tile = pid % tiles
    h = pid // tiles % heads
    b = pid // tiles // heads
    rows, head, real = packed_rows(lists, h, tile * BLOCK_M, BLOCK_M)
    first, count, n_keys = list_of(lists, b, h)
    q_tile = load_rows(head_ptr(q, b, head, rows), real, 0, D, BLOCK_D)
    d_tile = load_rows(head_ptr(dout, b, head, rows), real, 0, DV, BLOCK_DV)
    stat, rest = load_stats(lse, deltas, lists, b, head, rows, real)
    kv_head = tl.cast(h * lists.pack // lists.group, tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, count, BLOCK_N):
        keys, bias, seen = entries_at(lists, first, start, count, n_keys, BLOCK_N)
        found = find(None, b, keys, seen)
        k_tile = load_slots(k.ptr + kv_head * k.head, found, k, BLOCK_D, D)
        v_tile = load_slots(v.ptr + kv_head * v.head, found, v, BLOCK_DV, DV)
        s = dot(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        p = tl.exp2(s * scale + bias[None, :] - stat[:, None])
        dp = dot(d_tile, v_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        visible = seen[None, :] & (stat != INF)[:, None]
        ds = tl.where(visible, p * (dp - rest[:, None]), 0.0)
        acc = dot(ds.to(k_tile.dtype), k_tile, acc)
    columns = tl.arange(0, BLOCK_D)
    to = head_ptr(grad, b, head, rows)[:, None] + columns[None, :]
    mask = real[:, None] & (columns < D)[None, :]
    tl.store(to, (acc * softmax_scale).to(grad.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def entries(
    q, k, v, dout, entry_k, entry_v, dbias, lse, deltas, lists, scale, softmax_scale, heads, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """entry_k, entry_v: Views of fp32 [B, slots, row heads, D]; dbias: fp32 [B, row heads, slots].

    dbias is None without a bias. Behind the end of a list nothing is written.
    """
    pid = tl.program_id(0)
    start = pid % tiles * BLOCK_N
    h = pid // tiles % heads
    b = pid // tiles // heads
    first, count, n_keys = list_of(lists, b, h)
    if start >= count:
        return
    keys, bias, seen = entries_at(lists, first, start, count, n_keys, BLOCK_N)
    found = find(None, b, keys, seen)
    kv_head = tl.cast(h * lists.pack // lists.group, tl.int64)
    k_tile = load_slots(k.ptr + kv_head * k.head, found, k, BLOCK_D, D)
    v_tile = load_slots(v.ptr + kv_head * v.head, found, v, BLOCK_DV, DV)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    acc_b = tl.zeros([BLOCK_N], tl.float32)
    for at in tl.range(0, lists.rows * lists.pack, BLOCK_M):
        rows, head, real = packed_rows(lists, h, at, BLOCK_M)
        q_tile = load_rows(head_ptr(q, b, head, rows), real, 0, D, BLOCK_D)
        d_tile = load_rows(head_ptr(dout, b, head, rows), real, 0, DV, BLOCK_DV)
        stat, rest = load_stats(lse, deltas, lists, b, head, rows, real)
        s = dot(k_tile, q_tile.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))  # [BN, BM]
        visible = seen[:, None] & (real & (stat != INF))[None, :]
        p = tl.where(visible, tl.exp2(s * scale + bias[:, None] - stat[None, :]), 0.0)
        dp = dot(v_tile, d_tile.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        ds = tl.where(visible, p * (dp - rest[None, :]), 0.0)
        acc_v = dot(p.to(d_tile.dtype), d_tile, acc_v)
        acc_k = dot(ds.to(q_tile.dtype), q_tile, acc_k)
        acc_b += tl.sum(ds, 1)
    to_k = tile_ptr(head_ptr(entry_k, b, h, 0), start, entry_k, BLOCK_N, BLOCK_D)
    to_v = tile_ptr(head_ptr(entry_v, b, h, 0), start, entry_v, BLOCK_N, BLOCK_DV)
    tl.store(to_k, acc_k * softmax_scale, mask=inside(start, count, BLOCK_N, BLOCK_D, D))
    tl.store(to_v, acc_v, mask=inside(start, count, BLOCK_N, BLOCK_DV, DV))
    if dbias is not None:
        n = start + tl.arange(0, BLOCK_N)
        to = (tl.cast(b, tl.int64) * heads + h) * lists.slots
        tl.store(dbias + to + n, acc_b, mask=n < count)


@triton.jit
def add_entries(
    part, grad, listing, count, b, h, first, n_keys,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes to ``grad`` the sums over the entries that name keys ``first ..``.

    part: the View [B, entries, KV heads, SIZE] of what they add.
    """
    columns = tl.arange(0, WIDTH)
    rows = head_ptr(part, b, h, 0)
    acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for n in tl.range(0, tl.max(count, 0)):
        some = n < count
        at = tl.load(listing + n, mask=some, other=0).to(tl.int64) * part.row
        mask = some[:, None] & (columns < SIZE)[None, :]
        acc += tl.load(rows + at[:, None] + columns[None, :], mask=mask, other=0.0)
    to = tile_ptr(head_ptr(grad, b, h, 0), first, grad, BLOCK_N, WIDTH)
    mask = inside(first, n_keys, BLOCK_N, WIDTH, SIZE)
    tl.store(to, acc.to(grad.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def keys(
    entry_k, entry_v, dk, dv, inverse, n_keys, heads, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """entry_k, entry_v: Views of fp32 [B, entries, KV heads, D]; dk, dv: Views.

    inverse: entries by the key that they name.
    """
    pid = tl.program_id(0)
    first = pid % tiles * BLOCK_N
    h = pid // tiles % heads
    b = pid // tiles // heads
    own = first + tl.arange(0, BLOCK_N)
    listing, count = listing_rows(inverse, b, h, tl.minimum(own, n_keys - 1))
    count = tl.where(own < n_keys, count, 0)
    add_entries(entry_k, dk, listing, count, b, h, first, n_keys, D, BLOCK_N, BLOCK_D)
    add_entries(entry_v, dv, listing, count, b, h, first, n_keys, DV, BLOCK_N, BLOCK_DV)
