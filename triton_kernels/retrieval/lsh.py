"""LSH: codes of vectors, and the keys that share at least min_hits buckets with a query.

    lsh_encode   signs of a product with random planes, as bits: never stored as numbers
    count_hits   a program goes over the buckets of some tables: one more for every key in them. The
                 one use of atomics: sums of integers, the same in any order
    collect      a program per query scans the counts: ids in ascending order, by prefix sums
    weigh        log_bias = -log(u + clip), where u is the probability to be hit: with
                 p = 1 - angle / pi and P = p^bits, u = 1 - (1 - P)^L - L P (1 - P)^(L - 1). Where
                 L P < 1 the difference cancels: the binomial tail is summed there

Keys and queries come through the same products, in fp32, so that they are rounded alike.

Cost: 2 D bits tables flops per code; about L n / 2^bits ids of 2 bytes, 8 bytes per key in use for
the counts, and the rows of K that are hit. Source: MagicPIG (Chen et al., 2024); the code is our
own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import dot
from attnforge.triton_kernels.tensors import head_ptr

LEAST = tl.constexpr(1e-12)  # of an inclusion probability that is a divisor
TERMS = tl.constexpr(12)  # of the binomial tail: the next one is below 1e-9 of the sum


@triton.jit(do_not_specialize=["tiles", "table_tiles"])
def lsh_encode(
    x, mean, planes, codes, rows, heads, bits, tables, tiles, table_tiles,
    D: tl.constexpr, BITS: tl.constexpr, TABLES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x: a View; mean: fp32 [B, H, D] or None; planes: fp32 [D, tables * bits].

    codes: int16 [B, H, rows, tables]. BITS: ``bits`` as a power of two; a tile has TABLES tables.
    """
    pid = tl.program_id(0)
    first_table = pid % table_tiles * TABLES
    first = pid // table_tiles % tiles * BLOCK_M
    h = pid // table_tiles // tiles % heads
    b = pid // table_tiles // tiles // heads
    column = tl.arange(0, TABLES * BITS)
    table = first_table + column // BITS
    bit = column % BITS
    real = (table < tables) & (bit < bits)
    row = first + tl.arange(0, BLOCK_M)
    x_rows = head_ptr(x, b, h, 0) + row.to(tl.int64) * x.row
    acc = tl.zeros([BLOCK_M, TABLES * BITS], tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        channel = d + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (channel < D)[None, :]
        tile = tl.load(x_rows[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if mean is not None:
            centre = mean + (tl.cast(b, tl.int64) * heads + h) * D
            tile -= tl.load(centre + channel, mask=channel < D, other=0.0)[None, :]
        at = channel[:, None] * (tables * bits) + (table * bits + bit)[None, :]
        mask = (channel < D)[:, None] & real[None, :]
        acc = dot(tile, tl.load(planes + at, mask=mask, other=0.0), acc)
    signs = tl.where((acc > 0.0) & real[None, :], 1 << bit[None, :], 0)
    code = tl.sum(tl.reshape(signs, [BLOCK_M, TABLES, BITS]), 2)
    table = first_table + tl.arange(0, TABLES)
    to = (tl.cast(b, tl.int64) * heads + h) * rows + row
    mask = (row < rows)[:, None] & (table < tables)[None, :]
    tl.store(codes + to[:, None] * tables + table[None, :], code.to(tl.int16), mask=mask)


class Tables(NamedTuple):
    """Keys by code; see ``attnforge.reference.lsh``."""

    starts: Any  # int32 [B, Hk, segments, tables, buckets + 1]
    ids: Any  # int16 [B, Hk, segments, tables, segment], of unsigned numbers
    heads: Any
    segments: Any
    tables: Any
    segment: Any
    buckets: Any


class Query(NamedTuple):
    """Which keys the queries of ``lsh_retrieve`` may be given."""

    begin: Any  # int32 [B]
    end: Any
    keys: Any  # that there are
    heads: Any  # query heads, ``group`` to a KV head
    group: Any


@triton.jit
def may_hit(query, b):
    """(first key, last + 1) that may be sampled."""
    begin = tl.maximum(tl.load(query.begin + b), 0)
    return begin, tl.minimum(tl.load(query.end + b), query.keys)


@triton.jit(do_not_specialize=["chunks"])
def count_hits(tables, codes, query, counts, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """codes int16 [B, Hq, tables], counts int32 [B, Hq, keys], zeros; CHUNK tables a program."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    s = pid // chunks % tables.segments
    h = pid // chunks // tables.segments % query.heads
    b = pid // chunks // tables.segments // query.heads
    begin, end = may_hit(query, b)
    if (begin >= (s + 1) * tables.segment) | (end <= s * tables.segment):
        return
    row = tl.cast(b, tl.int64) * query.heads + h
    unit = (tl.cast(b, tl.int64) * tables.heads + h // query.group) * tables.segments + s
    for n in tl.range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tables.tables)):
        code = tl.load(codes + row * tables.tables + n).to(tl.int32) & (tables.buckets - 1)
        table = unit * tables.tables + n
        bucket = tables.starts + table * (tables.buckets + 1) + code
        last = tl.minimum(tl.load(bucket + 1), tables.segment)
        for at in tl.range(tl.maximum(tl.load(bucket), 0), last, BLOCK):
            place = at + tl.arange(0, BLOCK)
            local = tl.load(tables.ids + table * tables.segment + place, mask=place < last, other=0)
            key = s * tables.segment + (local.to(tl.int32) & 0xFFFF)
            mask = (place < last) & (key >= begin) & (key < end)
            tl.atomic_add(counts + row * query.keys + key, 1, mask=mask, sem="relaxed")


@triton.jit
def collect(counts, query, ids, lens, min_hits, BLOCK: tl.constexpr):
    """ids int32 [B, Hq, keys] of the columns of counts that are at least min_hits, lens [B, Hq]."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = may_hit(query, tl.program_id(0) // query.heads)
    found = 0
    for start in tl.range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        count = tl.load(counts + row * query.keys + key, mask=key < end, other=0)
        hit = (count >= min_hits) & (key < end)
        place = found + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(ids + row * query.keys + place, key, mask=hit)
        found += tl.sum(hit.to(tl.int32), 0)
    tl.store(lens + row, found)


@triton.jit
def collision(c):
    """1 - acos(c) / pi for c in [-1, 1], relative error below 1e-6 for either sign.

    Abramowitz and Stegun 4.4.46 gives acos of |c|, what is left of pi for a negative one.
    """
    x = tl.abs(c)
    p = -0.0012624911 * x + 0.0066700901
    p = p * x - 0.0170881256
    p = p * x + 0.0308918810
    p = p * x - 0.0501743046
    p = p * x + 0.0889789874
    p = p * x - 0.2145988016
    p = p * x + 1.5707963050
    part = p * tl.sqrt(1.0 - x) * 0.31830988618
    return tl.where(c < 0.0, part, 1.0 - part)


@triton.jit
def power(x, n):
    """x^n for n in 0 .. 1023."""
    y = tl.full(x.shape, 1.0, tl.float32)
    for _ in tl.static_range(10):
        y = tl.where(n % 2 == 1, y * x, y)
        x = x * x
        n = n // 2
    return y


@triton.jit
def inclusion(c, bits, tables, min_hits):
    """The probability that a key at cosine ``c`` is hit at least min_hits (1 or 2) times."""
    p = power(collision(c), bits)
    miss = 1.0 - p
    none = power(miss, tables - 1)
    term = tables * p * none
    sure = 1.0 - none * miss - tl.where(min_hits == 2, term, 0.0)
    tail = tl.where(min_hits == 1, term, 0.0)
    ratio = tl.where(miss > 0.0, p / tl.where(miss > 0.0, miss, 1.0), 0.0)
    for j in tl.static_range(1, TERMS + 1):  # from the term of j hits to that of j + 1
        term = term * ratio * ((tables - j) * (1.0 / (j + 1)))
        tail += term
    return tl.where(p * tables < 1.0, tail, sure)


@triton.jit(do_not_specialize=["tiles"])
def weigh(
    q, k, mean, norms, norm_stride, query, ids, lens, log_bias, bits, tables, min_hits, clip, tiles,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q [B, 1, Hq, D] and k are Views; norms: fp32 [B, Hk, norm_stride] of the centred keys."""
    pid = tl.program_id(0)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    h = pid // tiles % query.heads
    b = pid // tiles // query.heads
    row = tl.cast(b, tl.int64) * query.heads + h
    real = n < tl.load(lens + row)
    if pid % tiles * BLOCK_N >= tl.load(lens + row):
        return
    kv_head = h // query.group
    unit = tl.cast(b, tl.int64) * (query.heads // query.group) + kv_head
    channel = tl.arange(0, BLOCK_D)
    inside = channel < D
    x = tl.load(head_ptr(q, b, h, 0) + channel, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 0)  # squares of what is scaled by it neither overflow nor vanish
    x = tl.where(most > 0.0, x / tl.where(most > 0.0, most, 1.0), 0.0)
    key = tl.load(ids + row * query.keys + n, mask=real, other=0).to(tl.int64)
    at = head_ptr(k, b, kv_head, 0) + key[:, None] * k.row + channel[None, :]
    tile = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
    product = tl.sum(tile * x[None, :], 1)
    if mean is not None:
        centre = tl.load(mean + unit * D + channel, mask=inside, other=0.0)
        product -= tl.sum(centre * x, 0)
    size = tl.load(norms + unit * norm_stride + key, mask=real, other=0.0)
    size = size * tl.sqrt(tl.sum(x * x, 0))
    cosine = tl.where(size > 0.0, product / tl.where(size > 0.0, size, 1.0), 0.0)
    cosine = tl.where(cosine == cosine, tl.minimum(tl.maximum(cosine, -1.0), 1.0), 0.0)
    u = inclusion(cosine, bits, tables, min_hits) + clip
    u = tl.minimum(tl.maximum(u, LEAST), 1.0)
    tl.store(log_bias + row * query.keys + n, -tl.log(u), mask=real)
