"""The n best of a stream of scores per row: candidates that order like (score, id), and their keep.

A candidate is one 64-bit integer, the score's bits in an order that integers have above a number
that breaks ties, so that no two are equal and the larger one is better.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(1 << 63))  # with a place added still below the candidate of -inf
EVERYTHING = tl.constexpr((1 << 63) - 1)
LOW = tl.constexpr((1 << 31) - 1)


@triton.jit
def as_candidates(s, ranks):
    """int64 [BM, BN] of fp32 scores and ranks [BN] in 0 .. 2^31 - 1; NaN is above all."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)  # -0 ties with 0
    order = tl.where(bits < 0, bits ^ LOW, bits)
    order = tl.where(s != s, LOW, order)
    return (order.to(tl.int64) << 32) | ranks[None, :].to(tl.int64)


@triton.jit
def keep_best(best, worst, found):
    """(best, worst) after the candidates ``found``: each row's best ones take the worst's place.

    best [BM, KEPT], distinct and in no order; worst [BM]: their least.
    """
    top = tl.max(found, 1)
    while tl.max((top > worst).to(tl.int32), 0) != 0:
        enters = (top > worst)[:, None] & (best == worst[:, None])
        best = tl.where(enters, top[:, None], best)
        worst = tl.min(best, 1)
        found = tl.where(found == top[:, None], NOTHING, found)
        top = tl.max(found, 1)
    return best, worst
