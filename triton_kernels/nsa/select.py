"""Block importance of attention to compressed keys, and NSA's top-n blocks by it.

    P_hi = 2^(s_hi - lse_h)                      windows that the query sees, 0 for others
    p_j  = sum_i overlap(i, j) sum_h P_hi        h over the query heads of a KV head

Algorithm: a program holds BLOCK_M queries of a KV head. For BLOCKS blocks at a time it walks the
windows that overlap them, S = Q K^T head by head with K held, adds up P over the heads, and
multiplies the sums by the overlaps, a matrix that is made of indices. Windows that reach in from
the left are walked twice, in tiles of their own of HALO.

    importance    one program per BLOCKS blocks writes what it found
    choice        a program keeps the KEPT best of each query while it walks all blocks, as
                  ``reductions.topk`` does: no buffer of scores; more than KEPT take another walk

Cost: 2 D flops per (query, query head, visible window), 1 + HALO / (BLOCKS * ratio) times. Every
sum has one owner and one order. Sources: Yuan et al., 2025, equations 9 and 10; the streaming
choice follows flash-linear-attention's idea of a top-n without scores in memory; the code is our
own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.candidates import (
    EVERYTHING,
    LOW,
    NOTHING,
    as_candidates,
    keep_best,
)
from attnforge.triton_kernels.lang import dot, row_lse, span
from attnforge.triton_kernels.tensors import INF, head_ptr, load_tile

HALO = tl.constexpr(16)


class Problem(NamedTuple):
    """What importance is asked of. Window i is tokens [i * stride, i * stride + size)."""

    scale: Any  # softmax_scale * log2(e)
    size: Any  # tokens of a window, and from one to the next
    stride: Any
    block: Any  # tokens of a block
    blocks: Any  # an upper bound of the blocks of a sequence
    positions: Any  # int32: places of the queries among the tokens
    positions_batch: Any  # from batch entry to batch entry; 0 broadcasts


class Rows(NamedTuple):
    """The queries of a program, of one sequence and KV head."""

    b: Any
    h: Any  # KV head
    group: Any  # query heads of it
    start: Any  # of the sequence's first row in memory, of the program's in the sequence
    first: Any
    rows: Any  # [BM]
    count: Any  # of the sequence
    keys: Any
    first_key: Any
    at: Any  # [BM] positions; -1 for rows that do not exist


@triton.jit
def rows_of(seq, problem, pid, tiles, heads_kv, group, BLOCK_M: tl.constexpr):
    """The Rows of a program; late ones, which see most windows, come first."""
    tile = tiles - 1 - pid % tiles
    h = pid // tiles % heads_kv
    b = pid // tiles // heads_kv
    start, count, first_key, keys = span(seq, b)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.cast(b, tl.int64) * problem.positions_batch + start + rows
    at = tl.load(problem.positions + place, mask=rows < count, other=-1)
    return Rows(b, h, group, start, tile * BLOCK_M, rows, count, keys, first_key, at)


@triton.jit
def add_windows(
    acc, lo, hi, columns, q, k, lse, part, problem,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc [BM, BLOCKS] + what windows ``lo .. hi`` add to the importance of blocks ``columns``."""
    k_head = head_ptr(k, part.b, part.h, part.first_key)
    reach = problem.size // problem.stride
    ratio = problem.block // problem.stride
    for first in tl.range(lo, hi, BLOCK_N):
        windows = first + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_head, first, hi, k, BLOCK_N, BLOCK_D, D, False)
        ends = windows * problem.stride + (problem.size - 1)
        seen = (ends[None, :] <= part.at[:, None]) & (windows < hi)[None, :]
        total = tl.zeros([acc.shape[0], BLOCK_N], tl.float32)
        for n in tl.range(0, part.group):
            head = part.h * part.group + n
            q_head = head_ptr(q, part.b, head, part.start)
            q_tile = load_tile(q_head, part.first, part.count, q, acc.shape[0], BLOCK_D, D, False)
            stat = row_lse(lse, part.b, head, part.start, part.rows, part.count)
            s = dot(q_tile, k_tile.T, tl.zeros([acc.shape[0], BLOCK_N], tl.float32))
            total += tl.where(seen, tl.exp2(s * problem.scale - stat[:, None]), 0.0)
        shared = tl.minimum(windows[:, None] + reach, (columns[None, :] + 1) * ratio)
        shared = shared - tl.maximum(windows[:, None], columns[None, :] * ratio)
        share = tl.maximum(shared, 0).to(tl.float32)
        wild = ~(tl.abs(total) < INF)
        acc = dot(tl.where(wild, 0.0, total), share, acc)
        if tl.max(tl.max(wild.to(tl.int32), 1), 0) != 0:  # NaN is of the blocks of its window alone
            touched = dot(wild.to(tl.float32), share, tl.zeros(acc.shape, tl.float32)) > 0.0
            acc = tl.where(touched, float("nan"), acc)
    return acc


@triton.jit
def importance_of(
    start, q, k, lse, part, problem,
    D: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BLOCKS]: importance of blocks ``start ..`` to the rows of a program."""
    columns = start + tl.arange(0, BLOCKS)
    ratio = problem.block // problem.stride
    past = tl.max(part.at, 0) + 1 - problem.size
    hi = tl.where(past >= 0, past // problem.stride + 1, 0)  # windows that any row sees
    hi = tl.minimum(tl.minimum(hi, part.keys), (start + BLOCKS) * ratio)
    own = start * ratio
    lo = tl.maximum(own - problem.size // problem.stride + 1, 0)
    acc = tl.zeros([part.rows.shape[0], BLOCKS], tl.float32)
    acc = add_windows(
        acc, lo, tl.minimum(own, hi), columns, q, k, lse, part, problem, D, HALO, BLOCK_D
    )
    return add_windows(acc, own, hi, columns, q, k, lse, part, problem, D, BLOCK_N, BLOCK_D)


@triton.jit
def importance(
    q, k, lse, out, seq, problem, chunks, tiles, heads_kv, group,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """out: a View of fp32 [B, Sq, Hk, blocks], packed [T, Hk, blocks]."""
    start = tl.program_id(0) % chunks * BLOCKS
    part = rows_of(seq, problem, tl.program_id(0) // chunks, tiles, heads_kv, group, BLOCK_M)
    if part.first >= part.count:
        return
    acc = importance_of(start, q, k, lse, part, problem, D, BLOCKS, BLOCK_N, BLOCK_D)
    columns = start + tl.arange(0, BLOCKS)
    to = head_ptr(out, part.b, part.h, part.start) + part.rows.to(tl.int64)[:, None] * out.row
    inside = (part.rows < part.count)[:, None] & (columns < problem.blocks)[None, :]
    tl.store(to + columns[None, :], acc, mask=inside)


@triton.jit
def choose(
    q, k, lse, out, seq, problem, counts, tiles, heads_kv, group,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """out: a View of int32 [B, Sq, Hk, top_n], packed [T, Hk, top_n]: ids in no order, or LOW.

    LOW stands for no block. counts: (top_n, blocks that are always chosen at the front, and at the
    end). KEPT: a power of two. Of equal scores the larger id is better.
    """
    part = rows_of(seq, problem, tl.program_id(0), tiles, heads_kv, group, BLOCK_M)
    if part.first >= part.count:
        return
    top_n, front, back = counts
    own = tl.where(part.at >= 0, part.at // problem.block, -1)
    hi = tl.minimum(tl.max(own, 0) + 1, problem.blocks)
    places = tl.arange(0, KEPT)
    to = head_ptr(out, part.b, part.h, part.start) + part.rows.to(tl.int64)[:, None] * out.row
    limit = tl.full([BLOCK_M], EVERYTHING, tl.int64)
    for done in tl.range(0, top_n, KEPT):
        wanted = places < top_n - done
        best = tl.where(wanted, NOTHING, EVERYTHING) + tl.where(wanted, places, -places)
        best = tl.zeros([BLOCK_M, KEPT], tl.int64) + best[None, :]  # distinct, as candidates are
        worst = tl.min(best, 1)
        for start in tl.range(0, hi, BLOCKS):
            scores = importance_of(start, q, k, lse, part, problem, D, BLOCKS, BLOCK_N, BLOCK_D)
            columns = start + tl.arange(0, BLOCKS)
            forced = (columns < front)[None, :] | (columns[None, :] > (own - back)[:, None])
            scores = tl.where(forced, INF, scores)
            found = as_candidates(scores, columns)
            real = (columns[None, :] <= own[:, None]) & (columns < hi)[None, :]
            real = real & (scores == scores) & (found < limit[:, None])
            best, worst = keep_best(best, worst, tl.where(real, found, NOTHING))
        limit = worst
        ids = tl.where(best >= NOTHING + KEPT, (best & LOW).to(tl.int32), LOW)
        inside = (part.rows < part.count)[:, None] & wanted[None, :]
        tl.store(to + (done + places)[None, :], ids, mask=inside)
