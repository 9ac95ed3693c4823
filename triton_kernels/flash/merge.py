"""Merge: attention over the union of disjoint sets of keys, from the states of the parts.

Algorithm: lse = log sum_n exp(lse_n), O = sum_n exp(lse_n - lse) O_n, in two passes over the parts:
the maximum, then the weighted sum, in the order of the parts. A part of LSE -inf is empty: its
output is not used, whatever it holds. For ``merge_states`` +inf means the same; for the splits of a
decode +inf is a sink of +inf, which takes all the weight. A single part comes out bit for bit,
which makes a decode independent of empty splits. Parts of a score function that does not normalise
(SUM) have an LSE of 0 or -inf, which only says whether they saw a key: their outputs are added up.
Of a plan's pieces (``pieces``) a sequence has its own, and the sink, a part without a value.

Tiling: one program per BLOCK_M rows of one head, all of Dv; grid (row tiles * heads * batch). Parts
come stacked, one stride apart.

Cost: every part is read once and nothing else counts: bound by memory.

Limits: Dv in one tile, padded to a power of two. Source: our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import packed_span
from attnforge.triton_kernels.pieces import left_by, pieces_of
from attnforge.triton_kernels.tensors import INF, head_ptr, inside, load_tile, stat_ptr, tile_ptr


@triton.jit
def part_lse(pointers, mask, INF_IS_EMPTY: tl.constexpr):
    """Natural LSE of one part for some rows, -inf where it is empty."""
    stat = tl.load(pointers, mask=mask, other=-INF)
    if INF_IS_EMPTY:
        stat = tl.where(stat == INF, -INF, stat)
    return stat


@triton.jit
def part_first(part, first_row):
    """Where packed rows from ``first_row`` on are in a View: a batch has them at its start."""
    return tl.where(part.batch == 0, first_row, 0)


@triton.jit(do_not_specialize=["rows", "parts", "tiles", "fewest", "most", "pieces"])
def merge(
    part, part_stat, out, lse, rows, heads, parts, tiles, next_part, next_stat,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, INF_IS_EMPTY: tl.constexpr,
    SUM: tl.constexpr, cu_rows=None, fewest=0, most=0, pieces=None, sinks=None,
):  # fmt: skip
    """part, out are Views and part_stat, lse Stats of the first part; next_*: to the next one.

    cu_rows: int32 [B + 1] boundaries of packed rows; sequences of ``fewest`` to ``most`` are
    merged, and their parts are packed as well, or a batch of their first rows (``part_first``).
    pieces: a Pieces; part n is then the first rows of piece n's sequence. sinks: fp32 [heads], of
    parts that have none.
    """
    pid = tl.program_id(0)
    first = pid % tiles * BLOCK_M
    h = pid // tiles % heads
    b = pid // tiles // heads
    at = first + tl.arange(0, BLOCK_M)
    first_row, rows = packed_span(cu_rows, rows, b)
    if cu_rows is not None:
        rows = tl.where((rows >= fewest) & (rows <= most), rows, 0)
        if first >= rows:
            return
    some = at < rows
    base_row = part_first(part, first_row)
    lo = 0
    hi = parts
    if pieces is not None:
        base_row = 0
        lo, hi = pieces_of(pieces, b)
    value = head_ptr(part, b, h, base_row)
    stat = stat_ptr(part_stat, b, h, base_row) + at

    top = tl.full([BLOCK_M], -INF, tl.float32)  # a NaN it drops stays in the weights
    if sinks is not None:
        sink = tl.load(sinks + h)
        top = tl.maximum(top, sink)
    for n in tl.range(lo, hi):
        x = part_lse(stat + tl.cast(n, tl.int64) * next_stat, some, INF_IS_EMPTY)
        if pieces is not None:
            x = left_by(x, pieces, n, b)
        top = tl.maximum(top, x)
    base = tl.where(top == -INF, 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        total = tl.where(sink == base, 1.0, tl.exp(sink - base))
        total = tl.where(sink == -INF, 0.0, total)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for n in tl.range(lo, hi):
        x = part_lse(stat + tl.cast(n, tl.int64) * next_stat, some, INF_IS_EMPTY)
        if pieces is not None:
            x = left_by(x, pieces, n, b)
        weight = tl.where(x == base, 1.0, tl.exp(x - base))
        tile = load_tile(
            value + tl.cast(n, tl.int64) * next_part,
            first,
            rows,
            part,
            BLOCK_M,
            BLOCK_DV,
            DV,
            False,
        )
        term = weight[:, None] * tile.to(tl.float32)
        acc += tl.where((x == -INF)[:, None], 0.0, term)
        total += weight
    if SUM:
        total = tl.minimum(total, 1.0)
    o = tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None])
    mask = inside(first, rows, BLOCK_M, BLOCK_DV, DV)
    o_head = head_ptr(out, b, h, first_row)
    tl.store(
        tile_ptr(o_head, first, out, BLOCK_M, BLOCK_DV), o.to(out.ptr.dtype.element_ty), mask=mask
    )
    tl.store(stat_ptr(lse, b, h, first_row) + at, base + tl.log(total), mask=some)
