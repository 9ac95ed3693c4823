"""Writing new keys and values into pages: rotation, codes, and the bounds of pages.

Algorithm: a program takes BLOCK_T new rows of one KV head, whatever sequences they are of: a binary
search of the boundaries says which. A row goes to its slot as it is, or in fp32 through rotation
and codes: clamp(round(x / scale + zero)), ties to even, by correctly rounded division. A second
launch keeps the bounds of pages: the first new row of a page is its owner, reads what was stored,
and folds it, row by row, into the bounds, or into none if the page begins with it. So there are no
atomics, and a page's bounds do not depend on how many calls filled it.

Tiling: grid (row tiles * KV heads), and for bounds (rows * KV heads), of which owners alone do
anything.

Cost: every new row is read once and written once: bound by memory. Bounds read it once more.

Limits: up to 1024 channels, in one tile. Source: our own; bounds of pages are those of Quest (Tang
et al., 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.pages import CENTRE, code_numbers, load_slots
from attnforge.triton_kernels.rope import turn
from attnforge.triton_kernels.tensors import INF, head_ptr, stat_ptr

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no digits behind the point


@triton.jit
def sequence_of(ends, rows, seq_rows, batch):
    """(sequence, its first row) of packed rows; -1 for rows of no sequence.

    ends: int32 [batch + 1], or None for ``batch`` sequences of ``seq_rows`` rows.
    """
    if ends is None:
        b = rows // seq_rows
        first = b * seq_rows
    else:
        low = tl.zeros_like(rows)  # the number of boundaries, but the first, at or before a row
        high = low + batch
        while tl.max(high - low) > 0:
            middle = (low + high) // 2
            open_ = low < high
            past = tl.load(ends + 1 + middle, mask=open_, other=0) <= rows
            low = tl.where(open_ & past, middle + 1, low)
            high = tl.where(open_ & ~past, middle, high)
        first = tl.load(ends + tl.minimum(low, batch))
        b = tl.where((low < batch) & (first <= rows), low, -1)
    return b, first


@triton.jit
def slots_of(rows, total, ends, seq_rows, batch, table, lengths, h):
    """(sequence, its first row, key, (page, slot, real)) of new rows: where they go, if they do."""
    b, first = sequence_of(ends, rows, seq_rows, batch)
    real = (rows < total) & (b >= 0)
    b = tl.where(real, b, 0)
    key = tl.load(stat_ptr(lengths, b, h, 0), mask=real, other=0) + rows - first
    real = real & (key >= 0) & (key < table.width * table.size)
    entry = table.ptr + b.to(tl.int64) * table.batch + key // table.size
    page = tl.load(entry, mask=real, other=-1)
    real = real & (page >= 0) & (page < table.pages)
    slot = tl.where(real, key % table.size, 0)
    return b, first, key, (tl.where(real, page, 0).to(tl.int64), slot.to(tl.int64), real)


@triton.jit
def rounded(x):
    """fp32 of less than 2^22 to integers, ties to even."""
    return (x + ROUND) - ROUND


@triton.jit
def float8(x):
    """e4m3 bytes of fp32, to nearest even, clamped to +-448, NaN kept; by bits, for any GPU."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = rounded(size * 512.0).to(tl.uint32)  # subnormals are multiples of 2^-9
    code = tl.where(size < 0.015625, small, normal)
    return (tl.where(x == x, code, 0x7F) | sign).to(tl.uint8)


@triton.jit
def encoded(x, found, pages, h, FLOAT8: tl.constexpr):
    """Rows of fp32 as codes of ``pages``, those of int4 one to an element still."""
    if pages.scale is not None:
        scale = tl.where(found[2], code_numbers(pages.scale, found, pages, h), 1.0)
        x = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if FLOAT8:
        codes = float8(x)
    else:
        x = tl.where(x == x, x, 0.0)
        if pages.zero is not None:
            x = x + code_numbers(pages.zero, found, pages, h)[:, None]
        elif pages.pairs:
            x = x + CENTRE
        low = -128.0
        high = 127.0
        if pages.pairs:
            low = 0.0
            high = 15.0
        codes = rounded(tl.minimum(tl.maximum(x, low), high)).to(tl.int32)
    return codes


@triton.jit
def put(x, found, pages, h, CODES: tl.constexpr, FLOAT8: tl.constexpr, SIZE: tl.constexpr):
    """Rows [BLOCK_T, WIDTH] to their slots."""
    page, slot, real = found
    head = pages.ptr + tl.cast(h, tl.int64) * pages.head
    to = (head + page * pages.page + slot * pages.row)[:, None]
    if CODES:
        x = encoded(x.to(tl.float32), found, pages, h, FLOAT8)
    if pages.pairs:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        x = even | (odd << 4)
    size: tl.constexpr = SIZE // 2 if pages.pairs else SIZE
    columns = tl.arange(0, x.shape[1])[None, :]
    tl.store(to + columns, x.to(pages.ptr.dtype.element_ty), mask=real[:, None] & (columns < size))


@triton.jit(do_not_specialize=["total", "seq_rows", "batch", "tiles"])
def append(
    k, v, k_pages, v_pages, table, lengths, ends, positions, rope, total, seq_rows, batch, tiles,
    CODES: tl.constexpr, FLOAT8: tl.constexpr, VALUES: tl.constexpr, TURNED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """k, v: Views of packed rows; lengths: Stat of int32 keys before the call.

    total: rows; seq_rows: of a sequence where there are no boundaries ``ends``. positions: int32
    [total] rows of the tables in ``rope``, or None for cache positions. VALUES: v is written too.
    """
    rows = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(0) // tiles
    _, _, key, found = slots_of(rows, total, ends, seq_rows, batch, table, lengths, h)
    real = found[2][:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    source = head_ptr(k, 0, h, 0) + rows.to(tl.int64)[:, None] * k.row
    x = tl.load(source + columns, mask=real & (columns < D), other=0.0)
    if TURNED:
        at = key
        if positions is not None:
            at = tl.load(positions + rows, mask=rows < total, other=0)
        x = turn(x.to(tl.float32), source, real, at[:, None], rope, h, BLOCK_D)
    put(x, found, k_pages, h, CODES, FLOAT8, D)
    if VALUES:
        columns = tl.arange(0, BLOCK_DV)[None, :]
        source = head_ptr(v, 0, h, 0) + rows.to(tl.int64)[:, None] * v.row
        x = tl.load(source + columns, mask=real & (columns < DV), other=0.0)
        put(x, found, v_pages, h, CODES, FLOAT8, DV)


@triton.jit(do_not_specialize=["total", "seq_rows", "batch"])
def bounds(
    pages, table, lengths, ends, low, high, total, seq_rows, batch,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold what ``append`` stored into low and high, Views of [P, 1, Hk, D]."""
    row = tl.program_id(0) % total
    h = tl.program_id(0) // total
    rows = row + tl.arange(0, 1)
    b, first, _, found = slots_of(rows, total, ends, seq_rows, batch, table, lengths, h)
    slot = tl.sum(found[1])
    owner = found[2] & ((found[1] == 0) | (rows == first))
    if tl.sum(owner.to(tl.int32)) == 0:
        return
    page = tl.sum(found[0])
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    low_at = head_ptr(low, page, h, 0) + columns
    high_at = head_ptr(high, page, h, 0) + columns
    held = mask & (slot > 0)
    least = tl.load(low_at, mask=held, other=INF).to(tl.float32)
    most = tl.load(high_at, mask=held, other=-INF).to(tl.float32)
    if ends is None:
        last = tl.sum(first) + seq_rows
    else:
        last = tl.minimum(tl.sum(tl.load(ends + 1 + b)), total)
    head = pages.ptr + tl.cast(h, tl.int64) * pages.head
    for n in tl.range(0, tl.minimum(table.size - slot, last - row)):
        here = (found[0], found[1] + n, found[2])
        x = load_slots(head, here, pages, BLOCK_D, D).to(tl.float32)
        if pages.zero is not None:
            zero = code_numbers(pages.zero, here, pages, h)[:, None]
            if pages.pairs:
                x = x + CENTRE
            x = x - zero
        if pages.scale is not None:
            x = x * code_numbers(pages.scale, here, pages, h)[:, None]
        x = tl.reshape(x, [BLOCK_D])
        least = tl.minimum(least, x, propagate_nan=tl.PropagateNan.ALL)
        most = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
    tl.store(low_at, least.to(low.ptr.dtype.element_ty), mask=mask)
    tl.store(high_at, most.to(high.ptr.dtype.element_ty), mask=mask)
