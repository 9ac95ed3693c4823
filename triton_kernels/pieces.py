"""Keys in planned pieces in place of splits of one length, and the states that they leave.

A plan is data: piece n is keys begin[n] .. end[n] - 1 of sequence[n], and those of sequence b are
pieces first[b] .. first[b + 1] - 1. A grid has as many pieces as the plan has room for, so that a
captured one follows its numbers. Nobody has looked at them: pieces of no sequence are left alone,
ends are clamped, and what another sequence left in a piece is not added up.

Ends inside a key tile move to its start, the same for the piece that ends and the one that begins
there. Sinks are added where pieces are, so that a sequence without a piece has them too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import within
from attnforge.triton_kernels.tensors import INF


class Pieces(NamedTuple):
    """Where pieces are. No field is None, so that a plan may be compared with it."""

    sequence: Any  # int32 [count]
    begin: Any
    end: Any
    first: Any  # int32 [batch + 1]
    count: Any
    batch: Any


@triton.jit
def owner(pieces, n):
    """(sequence of piece ``n``, whether there is one); some sequence where there is none."""
    b = tl.load(pieces.sequence + n, mask=n < pieces.count, other=-1)
    real = (b >= 0) & (b < pieces.batch)
    return tl.where(real, b, 0), real


@triton.jit
def _aligned(at, n_keys, BLOCK: tl.constexpr):
    return tl.where(at >= n_keys, n_keys, tl.maximum(at, 0) // BLOCK * BLOCK)


@triton.jit
def in_piece(ranges, pieces, n, n_keys, BLOCK: tl.constexpr):
    """The part of ``ranges`` that lies in piece ``n`` of a sequence of ``n_keys``."""
    begin = _aligned(tl.load(pieces.begin + n), n_keys, BLOCK)
    end = _aligned(tl.load(pieces.end + n), n_keys, BLOCK)
    return within(ranges, begin, end)


@triton.jit
def pieces_of(pieces, b):
    """The pieces (first, end) of a sequence."""
    first = tl.minimum(tl.maximum(tl.load(pieces.first + b), 0), pieces.count)
    end = tl.minimum(tl.maximum(tl.load(pieces.first + b + 1), first), pieces.count)
    return first, end


@triton.jit
def left_by(stat, pieces, n, b):
    """LSEs that piece ``n`` has, -inf unless it is sequence ``b``'s."""
    return tl.where(tl.load(pieces.sequence + n) == b, stat, -INF)
