"""The store of keys in pages: how ``lang.walk`` reads K and V through a block table.

Key j of sequence b is slot j % size of page table[b, j // size]. A tile of keys is located once,
for K and V: by one entry of the table where tiles lie inside pages, else by one entry per key. Keys
of pages that do not exist are not real: they are loaded as 0 and hidden, in whole tiles too.

Codes are multiplied as they are, which 16-bit operands hold exactly. What they lack to values is
one scale and zero per key: products become (<q, c> - zero * sum q) * scale, and weights p become
w = p * scale / top, where top, the largest scale of the tile, keeps w inside fp16's range; the
rounded w decide what zeros take away, so that a large zero does not magnify their rounding. int4
codes stand around 8, which is taken off as they are unpacked; zeros of them are relative to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.tensors import INF, widened

CENTRE = tl.constexpr(8)  # of int4 codes


class Pages(NamedTuple):
    """K or V [P, page_size, Hk, X] with unit last stride; rows are slots."""

    ptr: Any
    page: Any  # strides in elements
    row: Any
    head: Any
    pairs: Any  # constexpr: an element is two int4 codes, the even channel in the low nibble
    of_k: Any  # constexpr: V is the first channels of K and tiles are as wide: one read serves both
    scale: Any  # fp32 [P|1, page_size|1, Hk] or None
    zero: Any
    scale_page: Any  # strides of both, 0 where the size is 1
    scale_row: Any


class Table(NamedTuple):
    """Where pages of sequences are. No field is None, so that a table may be compared with it."""

    ptr: Any  # int32 [B, width]
    batch: Any
    width: Any
    pages: Any  # that exist
    size: Any  # constexpr: slots of a page


@triton.jit
def locate(table, b, start, n_keys, BLOCK: tl.constexpr):
    """(pages, slots, which are real) [BLOCK] of keys ``start ..``; start is a multiple of BLOCK.

    n_keys: of the sequence, no more than the table has room for, and more than ``start``.
    """
    keys = start + tl.arange(0, BLOCK)
    real = keys < n_keys
    if table.size % BLOCK == 0:
        entries = table.ptr + tl.cast(b, tl.int64) * table.batch
        page = tl.load(entries + start // table.size) + tl.zeros([BLOCK], tl.int32)
        found = existing(table, page, start % table.size + tl.arange(0, BLOCK), real)
    else:
        found = find(table, b, keys, real)
    return found


@triton.jit
def find(table, b, keys, real):
    """``locate`` of keys that may lie anywhere. table: None where each sequence is one page."""
    if table is None:
        page = tl.zeros(keys.shape, tl.int64) + b
        found = (page, keys.to(tl.int64), real)
    else:
        entries = table.ptr + tl.cast(b, tl.int64) * table.batch
        page = tl.load(entries + keys // table.size, mask=real, other=-1)
        found = existing(table, page, keys % table.size, real)
    return found


@triton.jit
def existing(table, page, slot, real):
    """(pages, slots, which are real) where pages may be numbers that no page has."""
    real = real & (page >= 0) & (page < table.pages)
    return tl.where(real, page, 0).to(tl.int64), slot.to(tl.int64), real


@triton.jit
def load_slots(
    head, found, x, WIDTH: tl.constexpr, SIZE: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """[BLOCK, WIDTH] channels FIRST .. FIRST + SIZE - 1 of located keys, others 0.

    head: pointer to the KV head of page 0. fp8, as bytes, becomes bf16; integer codes become
    fp32, on their way to what they are multiplied with.
    """
    page, slot, real = found
    rows = head + page * x.page + slot * x.row
    if x.pairs:
        columns = tl.arange(0, WIDTH // 2)
        mask = real[:, None] & (columns < SIZE // 2)[None, :]
        both = tl.load(rows[:, None] + (FIRST // 2 + columns)[None, :], mask=mask, other=0x88)
        codes = tl.join((both & 15).to(tl.int8), (both >> 4).to(tl.int8)) - CENTRE
        tile = tl.reshape(codes.to(tl.float32), [page.shape[0], WIDTH])
    else:
        columns = tl.arange(0, WIDTH)
        mask = real[:, None]
        if SIZE < WIDTH:
            mask = mask & (columns < SIZE)[None, :]
        tile = widened(tl.load(rows[:, None] + (FIRST + columns)[None, :], mask=mask, other=0))
        if tile.dtype == tl.int8:
            tile = tile.to(tl.float32)
    return tile


@triton.jit
def code_numbers(numbers, found, x, h):
    """Scales or zeros of located keys, of KV head ``h``; 0 of those that are not real."""
    page, slot, real = found
    return tl.load(numbers + h + page * x.scale_page + slot * x.scale_row, mask=real, other=0.0)


@triton.jit
def code_zeros(found, x, h):
    """Zeros of located keys, relative to the codes that ``load_slots`` returns."""
    zero = code_numbers(x.zero, found, x, h)
    if x.pairs:
        zero = zero - CENTRE
    return zero


@triton.jit
def channel_sums(q, tail):
    """Sums over the channels of rows, which zeros of keys multiply."""
    sums = tl.sum(q.to(tl.float32), 1)
    if tail is not None:
        sums += tl.sum(tail.to(tl.float32), 1)
    return sums


@triton.jit
def decoded_products(s, q_sums, found, k, h):
    """Products [BM, BN] of rows with codes of keys, as they are with the keys."""
    if k.zero is not None:
        s = s - q_sums[:, None] * code_zeros(found, k, h)[None, :]
    if k.scale is not None:
        s = s * code_numbers(k.scale, found, k, h)[None, :]
    return s


@triton.jit
def add_values(acc, p, tile, found, v, h, visible):
    """acc + P V for weights [BM, BN] and a tile of V's codes. visible: of masked tiles, or None."""
    if v.scale is None:
        acc = tl.dot(p.to(tile.dtype), tile, acc, input_precision="ieee")
    else:
        scale = code_numbers(v.scale, found, v, h)
        if visible is not None:  # a hidden key's scale may be anything
            scale = tl.where(tl.max(visible.to(tl.int32), 0) != 0, scale, 0.0)
        size = tl.abs(scale)
        top = tl.max(tl.where(size < INF, size, 0.0))
        top = tl.where(top == 0.0, 1.0, top)
        weights = p * (scale / top)[None, :]
        if visible is not None:
            weights = tl.where(visible, weights, 0.0)
        weights = weights.to(tile.dtype)
        part = tl.dot(weights, tile, tl.zeros_like(acc), input_precision="ieee")
        if v.zero is not None:
            wide = weights.to(tl.float32) * code_zeros(found, v, h)[None, :]
            if visible is not None:
                wide = tl.where(visible, wide, 0.0)
            part -= tl.sum(wide, 1)[:, None]
        acc += part * top
    return acc
