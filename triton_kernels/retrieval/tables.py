"""Hash tables of keys: new ids behind the others of their bucket, and buckets cut down.

    place_ids    a program goes over BLOCK places of a table as it will be. Bisection of the new
                 starts gives a place's bucket; its id is one of those that were there or, behind
                 them, one of the new ones, which a stable sort by (segment, code) has put in order
    kept_sizes   a program goes over BLOCK buckets: ids ascend, so those below a length are a
                 prefix, and bisection finds its end

Ids are gathered from a copy of the table, so that no order of programs matters. The layout of
tables is that of ``attnforge.reference.lsh``.

Cost: an id of 2 bytes read and written per place of the tables that change, bits + 3 loads beside
it, from L1. Bound by memory. The code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_table", "chunk", "rows", "tiles"])
def place_ids(
    old_starts, old_ids, starts, ids, fresh, fresh_starts, first, heads, segments, tables, segment,
    first_table, chunk, rows, tiles,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """starts, ids: of all ``tables``; the others of the ``chunk`` tables from first_table on.

    fresh: int32 [B * H, chunk, rows] of row numbers, fresh_starts [B * H, chunk, segments * buckets
    + 1]; both None where nothing is new. first: int32 [B], the key of row 0.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    t = pid // tiles % chunk
    s = pid // tiles // chunk % segments
    unit = tl.cast(pid // tiles // chunk // segments, tl.int64)
    buckets: tl.constexpr = 1 << BITS
    new = starts + ((unit * segments + s) * tables + first_table + t) * (buckets + 1)
    own = (unit * segments + s) * chunk + t
    old = old_starts + own * (buckets + 1)
    count = tl.load(new + buckets)
    if (count == tl.load(old + buckets)) | (tile * BLOCK >= count):
        return
    place = tile * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    code = tl.zeros([BLOCK], tl.int32)  # the last bucket that does not begin behind the place
    for n in tl.static_range(1, BITS + 1):
        begin = tl.load(new + code + (buckets >> n), mask=real, other=0)
        code = tl.where(begin <= place, code + (buckets >> n), code)
    offset = place - tl.load(new + code, mask=real, other=0)
    begin = tl.load(old + code, mask=real, other=0)
    size = tl.load(old + code + 1, mask=real, other=0) - begin
    stays = real & (offset < size)
    local = tl.load(old_ids + own * segment + begin + offset, mask=stays, other=0).to(tl.int32)
    if fresh is not None:
        list_of = unit * chunk + t
        at = fresh_starts + list_of * (segments * buckets + 1) + s * buckets + code
        at = tl.load(at, mask=real, other=0) + offset - size
        row = tl.load(fresh + list_of * rows + at, mask=real & ~stays, other=0)
        key = tl.load(first + unit // heads) + row - s * segment
        local = tl.where(stays, local, key)
    to = ids + ((unit * segments + s) * tables + first_table + t) * segment
    tl.store(to + place, local.to(tl.int16), mask=real)


@triton.jit(do_not_specialize=["tiles"])
def kept_sizes(
    starts, ids, length, sizes, heads, segments, tables, segment, tiles,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sizes: int32 [tables of all, buckets]: of the ids of a bucket those below a length [B]."""
    pid = tl.program_id(0)
    table = tl.cast(pid // tiles, tl.int64)
    s = table // tables % segments
    keep = tl.load(length + table // tables // segments // heads) - s * segment
    buckets: tl.constexpr = 1 << BITS
    code = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    real = code < buckets
    at = starts + table * (buckets + 1) + code
    begin = tl.load(at, mask=real, other=0)
    low, high = begin, tl.load(at + 1, mask=real, other=0)
    for _ in tl.static_range(17):  # of 65,536 ids at most
        open = low < high
        middle = (low + high) // 2
        local = tl.load(ids + table * segment + middle, mask=open, other=0).to(tl.int32) & 0xFFFF
        below = open & (local < keep)
        high = tl.where(open & ~below, middle, high)
        low = tl.where(below, middle + 1, low)
    tl.store(sizes + table * buckets + code, low - begin, mask=real)
