"""Decode: few query rows over a long cache, split over keys (Flash-Decoding; Dao et al., 2023).

Algorithm: the rows of a tile are the query rows of all heads that share a KV head, position by
position: row r is query r // G of head r % G of the group. So K and V are read once for the group.
The keys are cut in splits, one program each, which run the forward's loop over their part; states
(O, LSE) of several splits go to an fp32 workspace, and ``merge`` adds them up in a fixed order, by
their LSE or, for score functions that do not normalise, as they are. The sink belongs to the first
split.

Tiling: grid (splits * row tiles * KV heads * batch). A split is a multiple of BLOCK_N keys: 2048 by
default, wherever it lies and whatever else is in the batch, so that a sequence gets the same bits
in any batch and any cache. Programs behind a sequence's end write an empty state and leave.

Cost: 2 Sk Hk D elements of cache per step, whatever the group; the workspace is (Dv + 1) fp32 per
row and split, 0.4 % of the cache that it stands for at D 128 and one row. Bound by memory.

Head dims above 512 (the latent vectors of MLA: 576 with Dv 512) are multiplied in two tiles.

Limits: padded rows cost products (tensor cores take 16 rows), not bytes.
Source: the papers above; the code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import (
    key_range,
    result,
    slope_of,
    span,
    start_state,
    walk,
    within,
)
from attnforge.triton_kernels.rope import turn
from attnforge.triton_kernels.tensors import INF, head_ptr, stat_ptr, widened


@triton.jit
def in_split(ranges, split, splits, split_keys, n_keys, BLOCK_N: tl.constexpr):
    """The part of ``ranges`` that lies in a split of ``split_keys`` keys, or one of equal ones."""
    if split_keys == 0:
        size = tl.cdiv(tl.cdiv(n_keys, splits), BLOCK_N) * BLOCK_N
    else:
        size = split_keys
    begin = split * size
    return within(ranges, begin, tl.minimum(begin + size, n_keys))


@triton.jit
def start_split(scores, head, split, BLOCK_M: tl.constexpr):
    """``start_state`` of a split: the sink belongs to the first one."""
    top, total = start_state(scores, head, BLOCK_M)
    if scores.sinks is not None:
        top = tl.where(split == 0, top, -INF)
        total = tl.where(split == 0, total, 0.0)
    return top, total


@triton.jit
def load_rows(q_rows, real, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[BM, WIDTH] channels FIRST .. SIZE - 1 of rows at pointers ``q_rows`` [BM], others 0."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = real[:, None] & (columns < SIZE)[None, :]
    return widened(tl.load(q_rows[:, None] + columns[None, :], mask=mask, other=0.0))


@triton.jit
def store_rows(o, stat, o_rows, l_rows, real, part_out, part_lse, split, DV: tl.constexpr):
    """O and LSE of a split to pointers of the first one; part_*: see ``decode``."""
    if part_out is not None:
        o_rows += tl.cast(split, tl.int64) * part_out
        l_rows += tl.cast(split, tl.int64) * part_lse
    columns = tl.arange(0, o.shape[1])
    tl.store(
        o_rows[:, None] + columns[None, :],
        o.to(o_rows.dtype.element_ty),
        mask=real[:, None] & (columns < DV)[None, :],
    )
    tl.store(l_rows, stat, mask=real)


@triton.jit(do_not_specialize=["seq", "scores", "splits", "split_keys"])
def decode(
    q, k, v, out, lse, part_out, part_lse, seq, scores, heads, group, splits, split_keys,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """q, k, v and out are Views, lse is a Stat; heads counts KV heads.

    out, lse: the results, or the workspace's first part, with the strides part_out and part_lse
    from split to split. split_keys: keys of a split, or 0 for ``splits`` equal ones.
    """
    pid = tl.program_id(0)
    split = pid % splits
    tiles = tl.cdiv(seq.rows * group, BLOCK_M)
    tile = pid // splits % tiles
    h = pid // splits // tiles % heads
    b = pid // splits // tiles // heads
    _, n_rows, _, n_keys = span(seq, b)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = packed // group
    head = h * group + packed % group
    real = packed < n_rows * group
    head = tl.where(real, head, 0)

    place = (b, head[:, None], 0, 0, n_rows, n_keys, h)
    first = tile * BLOCK_M // group
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, n_rows - 1)
    ranges = key_range(rows[:, None], first, last, n_rows, n_keys, scores, place, BLOCK_N)
    ranges = in_split(ranges, split, splits, split_keys, n_keys, BLOCK_N)
    before = start_split(scores, head, split, BLOCK_M)
    slope = slope_of(scores, b, head)
    if scores.slopes is not None:
        slope = slope[:, None]
    q_rows = head_ptr(q, b, head, rows)
    q_tile = load_rows(q_rows, real, 0, D, BLOCK_D)
    tail = None
    if D > BLOCK_D:
        tail = load_rows(q_rows, real, BLOCK_D, D, D - BLOCK_D)
    if scores.rope is not None:
        at = tl.load(stat_ptr(scores.rope.at_q, b, 0, rows), mask=real, other=0)
        q_tile = turn(q_tile, q_rows[:, None], real[:, None], at[:, None], scores.rope, h, BLOCK_D)
    top, total, acc = walk(
        q_tile, rows, slope, before, ranges, n_rows, n_keys,
        k, v, head_ptr(k, b, h, 0), head_ptr(v, b, h, 0), scores, place,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, tail,
    )  # fmt: skip
    o, stat = result(top, total, acc, scores, place)
    o_rows, l_rows = head_ptr(out, b, head, rows), stat_ptr(lse, b, head, rows)
    store_rows(o, stat, o_rows, l_rows, real, part_out, part_lse, split, DV)
