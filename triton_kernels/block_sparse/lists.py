"""Lists of blocks in kernels, and the stream of positions that a list stands for.

A list holds ascending numbers of blocks of ``EACH`` positions. Its stream is the positions of its
blocks, one after the other: place t of the stream is position t % EACH of block t // EACH. Tiles
are cut from the stream, so one covers several small blocks or a part of a large one, and is full
whatever the size of blocks is. Streams ascend, so that a range of positions is a range of places.

The same functions serve rows that walk listed keys, and keys that walk the rows which list them;
there a position of the stream holds ``pack`` query heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import seen
from attnforge.triton_kernels.tensors import INF

FAR = tl.constexpr(1 << 30)  # a position that no sequence has
CHUNK = tl.constexpr(128)


class Lists(NamedTuple):
    """Blocks of keys per list row: int32 ids [B|1, H|1, rows, slots], ascending ones first."""

    ids: Any
    counts: Any  # int32 [B|1, H|1, rows]
    batch: Any  # list rows from batch entry to batch entry and from head to head; 0 broadcasts
    head: Any
    slots: Any
    first: Any  # int32 [B + 1]: where list rows of packed sequences begin; or None


class Inverse(NamedTuple):
    """List rows per block of keys: int32 rows [B|1, H|1, entries], by block and ascending."""

    rows: Any  # counted from the first list row of their sequence
    starts: Any  # int32 [B|1, H|1, blocks + 1]: where the rows of a block begin
    batch: Any  # lists from batch entry to batch entry and from head to head; 0 broadcasts
    head: Any
    entries: Any
    blocks: Any  # of all sequences together where they are packed
    each: Any  # blocks from sequence to sequence, 0 where they are not packed


@triton.jit
def listed_blocks(lists, b, h, row):
    """(pointer to the ids, their number) of list row ``row`` of a sequence."""
    at = row
    if lists.first is not None:
        at += tl.load(lists.first + b)
    at = tl.cast(b, tl.int64) * lists.batch + tl.cast(h, tl.int64) * lists.head + at
    return lists.ids + at * lists.slots, tl.load(lists.counts + at)


@triton.jit
def own_blocks(lists, b, h, rows, real, SLOTS: tl.constexpr):
    """int32 [len(rows), SLOTS]: the ids of several list rows of a sequence; -1 for none."""
    at = rows
    if lists.first is not None:
        at += tl.load(lists.first + b)
    at = tl.cast(b, tl.int64) * lists.batch + tl.cast(h, tl.int64) * lists.head + at
    slot = tl.arange(0, SLOTS)[None, :]
    inside = real[:, None] & (slot < lists.slots)
    return tl.load(lists.ids + at[:, None] * lists.slots + slot, mask=inside, other=-1)


@triton.jit
def listed_by(own, number):
    """bool [BM]: whose ids ``own`` [BM, SLOTS] hold a block."""
    return tl.max((own == number).to(tl.int32), 1) > 0


@triton.jit
def listing_rows(inverse, b, h, block):
    """(pointer to the list rows, their number) that name a block of a sequence."""
    at = tl.cast(b, tl.int64) * inverse.batch + tl.cast(h, tl.int64) * inverse.head
    start = inverse.starts + at * (inverse.blocks + 1) + b * inverse.each + block
    first = tl.load(start)
    return inverse.rows + at * inverse.entries + first, tl.load(start + 1) - first


@triton.jit
def below(numbers, count, bound):
    """How many of ``count`` ascending numbers are less than ``bound``."""
    total = 0
    for start in tl.range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        some = tl.load(numbers + at, mask=at < count, other=FAR)
        total += tl.sum((some < bound).to(tl.int32), 0)
    return total


@triton.jit
def places(numbers, count, ranges, pack, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Ranges of positions (lo, whole_lo, whole_hi, hi) as places of the stream.

    From a multiple of BLOCK; tiles between the middle two hold positions of the middle range alone.
    """
    size = EACH * pack
    lo, whole_lo, whole_hi, hi = ranges
    first = below(numbers, count, lo // EACH) * size // BLOCK * BLOCK
    last = tl.maximum(below(numbers, count, tl.cdiv(hi, EACH)) * size, first)
    whole_first = tl.cdiv(below(numbers, count, tl.cdiv(whole_lo, EACH)) * size, BLOCK) * BLOCK
    whole_last = below(numbers, count, whole_hi // EACH) * size // BLOCK * BLOCK
    whole_first = tl.minimum(whole_first, last)
    return first, whole_first, tl.minimum(tl.maximum(whole_last, whole_first), last), last


@triton.jit
def at_places(numbers, count, start, pack, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """(positions, heads of the pack) at places ``start ..`` of a stream; FAR behind its end."""
    size = EACH * pack
    at = start + tl.arange(0, BLOCK)
    slot = at // size
    number = tl.load(numbers + slot, mask=slot < count, other=-1)
    inside = at - slot * size
    return tl.where(number < 0, FAR, number * EACH + inside // pack), inside % pack


@triton.jit
def load_rows(base, rows, count, x, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Rows of a View as [len(rows), WIDTH], 0 at and past row ``count`` and column SIZE.

    base: of the head, or one pointer per row.
    """
    columns = tl.arange(0, WIDTH)
    pointers = (base + rows.to(tl.int64) * x.row)[:, None] + columns[None, :]
    return tl.load(pointers, mask=(rows < count)[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, real, x, tile, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Writes the rows of ``tile`` that are real; see ``load_rows``."""
    columns = tl.arange(0, WIDTH)
    pointers = (base + rows.to(tl.int64) * x.row)[:, None] + columns[None, :]
    mask = real[:, None] & (columns < SIZE)[None, :]
    tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_tile(lists, seq_rows, pid, heads, pack, Q_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """(list row, row head, batch entry, rows, heads of the pack, which are real) of a program.

    A tile is a part of one list row: its queries, position by position, each with the query heads
    that share the list. The real ones may still lie behind the end of their sequence.
    """
    parts = tl.cdiv(Q_BLOCK * pack, BLOCK_M)
    list_rows = tl.cdiv(seq_rows, Q_BLOCK)
    row = pid // parts % list_rows
    h = pid // parts // list_rows % heads
    b = pid // parts // list_rows // heads
    at = pid % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, h, b, row * Q_BLOCK + at // pack, at % pack, at < Q_BLOCK * pack


@triton.jit
def unleash_listed(
    acc, at, numbers, count, lo, hi, n_rows, n_keys, base, x, scores, pack, heads_at,
    EACH: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, own=None,
):  # fmt: skip
    """``lang.unleash`` for places ``lo .. hi`` of a stream: acc + NaN and infinities seen there.

    KEYS: the stream is of keys. heads_at: elements of ``x`` from head to head of the pack. own: see
    ``fwd.attend``.
    """
    columns = tl.arange(0, WIDTH)
    for place in tl.range(lo, hi):
        slot = place // (EACH * pack)
        inside = place - slot * EACH * pack
        n = tl.load(numbers + slot) * EACH + inside // pack
        limit = n_rows
        if KEYS:
            limit = n_keys
        row = base + tl.cast(n, tl.int64) * x.row + inside % pack * heads_at + columns
        value = tl.load(row, mask=(columns < SIZE) & (n < limit), other=0.0).to(tl.float32)
        wild = tl.where(tl.abs(value) < INF, 0.0, value)
        if KEYS:
            visible = seen(at, n, n_rows, n_keys, scores)
        else:
            visible = seen(n, at, n_rows, n_keys, scores)
        if own is not None:
            visible = visible & listed_by(own, tl.load(numbers + slot))
        acc += tl.where(visible[:, None], wild[None, :], 0.0)
    return acc
