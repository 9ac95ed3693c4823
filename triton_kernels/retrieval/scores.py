"""Scores of keys, centroids and pages: one number per row and column, in fp32.

    key_scores   scale <q, k>: a product of tiles; rows are the query rows of all heads of a KV
                 head, so that keys are read once for the group
    shares       s - log sum_j counts_j exp(s_j) of finished rows, in place: the log share of a key
                 of each cluster. One program per row, two passes over it
    page_scores  sum over channels of scale max(q low, q high), an upper bound of the logits of a
                 page. A program holds the bounds of BLOCK_N pages in registers and goes over the
                 rows, each element by itself: so infinite bounds behave as the formula says

Cost: 2 D flops per row and key, 4 D per row and page; each key, each bound is read once, each score
is written once. Bound by memory for few rows. Source: Quest (Tang et al., 2024) for the bound; the
code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.flash.decode import load_rows
from attnforge.triton_kernels.lang import dot
from attnforge.triton_kernels.pages import find, load_slots
from attnforge.triton_kernels.tensors import INF, LN2, LOG2E, head_ptr


@triton.jit
def in_use(used, b, columns):
    """Columns of a sequence that exist: all of them, or so many as ``used`` says."""
    if used is not None:
        columns = tl.minimum(tl.load(used + b), columns)
    return columns


@triton.jit(do_not_specialize=["tiles", "row_tiles"])
def key_scores(
    q, k, table, out, used, columns, scale, rows, heads, group, tiles, row_tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q is a View, k Pages (table None: sequences are the pages), out fp32 [B, Hq, Sq, columns]."""
    pid = tl.program_id(0)
    keys = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    packed = pid // tiles % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    h = pid // tiles // row_tiles % heads
    b = pid // tiles // row_tiles // heads
    real = packed < rows * group
    row = tl.where(real, packed // group, 0)
    head = h * group + packed % group
    found = find(table, b, keys, keys < in_use(used, b, columns))
    q_rows = head_ptr(q, b, head, row)
    k_head = k.ptr + tl.cast(h, tl.int64) * k.head
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in tl.static_range(0, D, BLOCK_D):
        q_tile = load_rows(q_rows, real, d, D, BLOCK_D)
        k_tile = load_slots(k_head, found, k, BLOCK_D, D - d, d)
        s = dot(q_tile, k_tile.T, s)
    s = tl.where(found[2][None, :], s * scale, -INF)
    to = ((tl.cast(b, tl.int64) * heads * group + head) * rows + row) * columns
    mask = real[:, None] & (keys < columns)[None, :]
    tl.store(out + to[:, None] + keys[None, :], s, mask=mask)


@triton.jit
def sized(scores, counts, start, columns, BLOCK: tl.constexpr):
    """(scores, counts) of columns ``start ..``; -inf where there is no key."""
    at = start + tl.arange(0, BLOCK)
    count = tl.load(counts + at, mask=at < columns, other=0)
    s = tl.load(scores + at, mask=at < columns, other=-INF)
    return tl.where(count > 0, s, -INF), tl.maximum(count, 0).to(tl.float32)


@triton.jit
def shares(out, counts, columns, rows, BLOCK: tl.constexpr):
    """out: fp32 [B * Hk, rows, columns]; counts: int32 [B * Hk, columns]."""
    pid = tl.program_id(0).to(tl.int64)
    scores = out + pid * columns
    counts += pid // rows * columns
    top = tl.full((), -INF, tl.float32)
    total = tl.zeros((), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        s, size = sized(scores, counts, start, columns, BLOCK)
        new = tl.maximum(top, tl.max(s, 0))
        base = tl.where(new == -INF, 0.0, new)
        total = total * tl.exp2((tl.where(top == -INF, base, top) - base) * LOG2E)
        total += tl.sum(size * tl.exp2((s - base) * LOG2E), 0)  # a NaN goes on to all
        top = new
    shift = tl.where(total == 0.0, 0.0, tl.where(top == -INF, 0.0, top) + tl.log2(total) * LN2)
    for start in tl.range(0, columns, BLOCK):
        s, _ = sized(scores, counts, start, columns, BLOCK)
        at = start + tl.arange(0, BLOCK)
        tl.store(scores + at, s - shift, mask=at < columns)


@triton.jit(do_not_specialize=["tiles"])
def page_scores(
    q, low, high, table, width, pages, out, used, columns, scale, rows, heads, group, tiles,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """low, high: Views of [B, columns, Hk, D], or by ``table`` [B, width] of [pages, Hk, D]."""
    pid = tl.program_id(0)
    columns_at = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    h = pid // tiles % heads
    b = pid // tiles // heads
    real = columns_at < in_use(used, b, columns)
    page = columns_at
    if table is not None:
        entry = tl.load(table + tl.cast(b, tl.int64) * width + columns_at, mask=real, other=0)
        page = tl.minimum(tl.maximum(entry, 0), pages - 1)
    channels = tl.arange(0, BLOCK_D)
    page = page.to(tl.int64)
    mask = real[:, None] & (channels < D)[None, :]
    at = page[:, None] * low.row + channels[None, :]
    least = tl.load(head_ptr(low, b, h, 0) + at, mask=mask, other=0.0).to(tl.float32)
    at = page[:, None] * high.row + channels[None, :]
    most = tl.load(head_ptr(high, b, h, 0) + at, mask=mask, other=0.0).to(tl.float32)
    for n in tl.range(0, rows * group):
        head = h * group + n // rows
        row = head_ptr(q, b, head, n % rows) + channels
        x = tl.load(row, mask=channels < D, other=0.0).to(tl.float32)[None, :] * scale
        a, c = x * least, x * most
        # tl.maximum would drop a NaN
        bound = tl.sum(tl.where((a > c) | (a != a), a, c), 1)
        to = ((tl.cast(b, tl.int64) * heads * group + head) * rows + n % rows) * columns
        tl.store(out + to + columns_at, tl.where(real, bound, -INF), mask=columns_at < columns)
