"""Selection of columns: the k largest, those at or above a threshold, the fewest with a share of
the softmax. All end in ascending ids and a length, without a sort and without a synchronisation.

Algorithm: one program per row. A score's rank is its bits, turned so that they compare as integers;
-inf and NaN have none. Bit by bit, from the top, the largest rank is found at and above which
scores still weigh enough: one each, or exp(s - max). Of the columns that have that very rank the
last ones are taken, as the later column wins a tie. A last pass numbers what is chosen by prefix
sums. A threshold needs that pass alone. Forced columns come first and count.

Cost: about 35 passes over a row, which stays in the L1 or L2 cache; sums of counts are exact, those
of weights fp64 and each in one order. Source: radix selection is folklore, top-p as Twilight (Lin
et al., 2025); the code is our own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.candidates import LOW
from attnforge.triton_kernels.tensors import INF, LOG2E

TOP_K = tl.constexpr(0)
THRESHOLD = tl.constexpr(1)
TOP_P = tl.constexpr(2)
SIGN = tl.constexpr(1 << 31)
EVERY = tl.constexpr(1 << 32)  # above all ranks


class Row(NamedTuple):
    """The columns of a row: those before ``first_end`` and from ``last_begin`` on are forced."""

    scores: Any
    used: Any
    first_end: Any
    last_begin: Any


@triton.jit
def ranks_at(row, start, BLOCK: tl.constexpr):
    """(columns, scores, ranks, which are forced) [BLOCK]; rank 0 is never chosen by itself."""
    columns = start + tl.arange(0, BLOCK)
    real = columns < row.used
    s = tl.load(row.scores + columns, mask=real, other=-INF)
    bits = s.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ LOW, bits).to(tl.int64) + SIGN
    rank = tl.where((s != s) | (s == -INF), 0, rank)
    forced = real & ((columns < row.first_end) | (columns >= row.last_begin))
    return columns, s, rank, forced


@triton.jit
def weights_of(s, top, KIND: tl.constexpr):
    """What scores count: 1, or their share of the softmax up to a factor."""
    if KIND == TOP_P:
        weight = tl.where(s == top, 1.0, tl.exp2((s - top) * LOG2E)).to(tl.float64)
    else:
        weight = tl.full(s.shape, 1, tl.int32)
    return weight


@triton.jit
def weigh_row(row, least, most, top, FORCED: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the weights of free columns of ranks ``least .. most``; FORCED: of forced ones."""
    if KIND == TOP_P:
        total = tl.zeros([BLOCK], tl.float64)
    else:
        total = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, row.used, BLOCK):
        _, s, rank, forced = ranks_at(row, start, BLOCK)
        counts = (rank >= least) & (rank <= most) & (forced == FORCED)
        total += tl.where(counts, weights_of(s, top, KIND), 0)
    return tl.sum(total, 0)


@triton.jit
def find_rank(row, want, top, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The largest rank at and above which free columns weigh ``want``; 0 if all are too light."""
    found = tl.zeros((), tl.int64)
    bit = tl.full((), SIGN, tl.int64)
    for _ in tl.range(0, 32):
        trial = found + bit
        weight = weigh_row(row, trial, EVERY, top, False, KIND, BLOCK)
        found = tl.where(weight >= want, trial, found)
        bit = bit // 2
    return found


@triton.jit
def choose_k(row, k, BLOCK: tl.constexpr):
    """(rank, how many columns of that very rank are taken) of the k best columns."""
    forced = row.first_end + row.used - row.last_begin
    want = k - forced
    rank = find_rank(row, want, 0.0, TOP_K, BLOCK)
    above = weigh_row(row, rank + 1, EVERY, 0.0, False, TOP_K, BLOCK)
    return rank, want - above


@triton.jit
def choose_mass(row, mass, BLOCK: tl.constexpr):
    """(rank, how many columns of that very rank are taken) of the fewest with a share ``mass``."""
    top = tl.full([BLOCK], -INF, tl.float32)
    for start in tl.range(0, row.used, BLOCK):
        _, s, rank, _ = ranks_at(row, start, BLOCK)
        top = tl.maximum(top, tl.where(rank > 0, s, -INF))
    top = tl.max(top, 0)
    free = weigh_row(row, 1, EVERY, top, False, TOP_P, BLOCK)
    forced = weigh_row(row, 1, EVERY, top, True, TOP_P, BLOCK)
    want = mass * (free + forced) - forced
    rank = find_rank(row, want, top, TOP_P, BLOCK)
    above = weigh_row(row, rank + 1, EVERY, top, False, TOP_P, BLOCK)
    equal = weigh_row(row, rank, rank, top, False, TOP_K, BLOCK)
    order = (rank - SIGN).to(tl.int32)
    score = tl.where(order < 0, order ^ LOW, order).to(tl.float32, bitcast=True)
    one = weights_of(score, top, TOP_P)
    one = tl.where(one > 0.0, one, 1.0)
    taken = ((want - above) / one).to(tl.int32)
    taken += (taken * one < want - above).to(tl.int32)
    return rank, tl.minimum(tl.maximum(taken, 1), equal)


@triton.jit(do_not_specialize=["columns", "slots", "k", "first", "last", "mass"])
def select_columns(
    scores, used, threshold, each, ids, lens, columns, slots, k, mass, first, last,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores fp32 [rows, columns], ids int32 [rows, slots], lens int32 [rows]; a program per row.

    threshold: fp32, ``each`` elements from row to row. mass: in units of 2^-60, as a kernel takes
    no fp64 number. first, last: so many columns at either end of those in use are forced.
    """
    n = tl.program_id(0).to(tl.int64)
    count = columns
    if used is not None:
        count = tl.minimum(tl.maximum(tl.load(used + n), 0), columns)
    first_end = tl.minimum(first, count)
    row = Row(scores + n * columns, count, first_end, tl.maximum(count - last, first_end))
    rank = tl.zeros((), tl.int64)
    equal = tl.zeros((), tl.int32)
    limit = tl.full((), -INF, tl.float32)
    if KIND == TOP_K:
        rank, equal = choose_k(row, k, BLOCK)
    elif KIND == TOP_P:
        rank, equal = choose_mass(row, mass.to(tl.float64) * 8.673617379884035e-19, BLOCK)
    else:
        limit = tl.load(threshold + n * each)
    skip = 0
    if KIND != THRESHOLD:
        skip = weigh_row(row, rank, rank, 0.0, False, TOP_K, BLOCK) - equal
    found = 0
    for start in tl.range(0, count, BLOCK):
        column, s, own, forced = ranks_at(row, start, BLOCK)
        ties = ((own == rank) & ~forced).to(tl.int32)
        late = tl.cumsum(ties, 0) > skip  # of those that tie, all but the first ``skip``
        skip -= tl.sum(ties, 0)
        chosen = (own > rank) | ((ties > 0) & late & (rank > 0))
        chosen = forced | (chosen & (s >= limit))
        place = found + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(ids + n * slots + place, column, mask=chosen & (place < slots))
        found += tl.sum(chosen.to(tl.int32), 0)
    found = tl.minimum(found, slots)
    tl.store(lens + n, found)
    for start in tl.range(found, slots, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(ids + n * slots + place, -1, mask=place < slots)
