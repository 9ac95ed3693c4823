"""Decays of a chunk of tokens, from its log gates: one number per token, or one per channel.

With b the inclusive sum of gates from the start of the chunk, a walk needs

    ahead    what a state has kept when row i reads it    forwards e^{b_i}, backwards e^{B - b_i}
    behind   what is left of row j's write at the end     forwards e^{B - b_j}, backwards e^{b_j}
    between  of rows i and j that see each other          e^{b_i - b_j}, backwards e^{b_j - b_i}
    whole    of the state over the chunk                  e^B

Numbers: sums are fp64, their differences are taken in pairs of fp32, and the mask comes before the
exponential, so that no pair overflows and decays are as exact after a reset as before. Channels:
a decay between two rows is a running product of factors, from one row to the next; no difference of
sums is taken at all. A gate below RESET is a reset: its factor is exactly 0. Rows past the end have
decay 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.tensors import head_ptr

RESET = tl.constexpr(-88.0)  # e^-88 is no normal fp32 number
_FLOOR = tl.constexpr(-1000.0)  # of a reset in a sum: e^-1000 is 0, and sums of it are exact enough


@triton.jit
def triangle(BLOCK_T: tl.constexpr, BACKWARD: tl.constexpr):
    """[BLOCK_T, BLOCK_T]: whether row i sees row j."""
    i = tl.arange(0, BLOCK_T)[:, None]
    j = tl.arange(0, BLOCK_T)[None, :]
    if BACKWARD:
        seen = i <= j
    else:
        seen = i >= j
    return seen


@triton.jit
def of_numbers(gate, b, h, first, start, length, BLOCK_T: tl.constexpr, BACKWARD: tl.constexpr):
    """(between, ahead, behind, whole); between is 0 where row i does not see j."""
    seen = triangle(BLOCK_T, BACKWARD)
    if gate is None:
        between = tl.where(seen, 1.0, 0.0)
        ahead = tl.full([BLOCK_T], 1.0, tl.float32)
        behind = ahead
        whole = 1.0
    else:
        rows = start + tl.arange(0, BLOCK_T)
        at = head_ptr(gate, b, h, first) + rows.to(tl.int64) * gate.row
        log = tl.load(at, mask=rows < length, other=0.0)
        log = tl.where(log < RESET, _FLOOR, log).to(tl.float64)
        sums, total = tl.cumsum(log, 0), tl.sum(log, 0)
        high = sums.to(tl.float32)
        low = (sums - high.to(tl.float64)).to(tl.float32)
        gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        ahead, behind = tl.exp(high), tl.exp((total - sums).to(tl.float32))
        whole = tl.exp(total.to(tl.float32))
        if BACKWARD:
            gap = -gap
            ahead, behind = behind, ahead
        between = tl.exp(tl.where(seen, gap, float("-inf")))
    return between, ahead, behind, whole


@triton.jit
def factor_of(log):
    """Decays of log gates."""
    return tl.where(log < RESET, 0.0, tl.exp(log))


@triton.jit
def channel_factor(gate_head, gate, row, length, channels, SIZE: tl.constexpr):
    """[W] factors of ``channels`` at one row of a sequence, 1 past its end."""
    at = gate_head + tl.cast(row, tl.int64) * gate.row + channels
    log = tl.load(at, mask=(channels < SIZE) & (row < length), other=0.0)
    return factor_of(log)


@triton.jit
def no_decays(BLOCK_T: tl.constexpr, WIDTH: tl.constexpr):
    """Decays of channels before the first call of ``next_decays``.

    (from row j to each row i [BLOCK_T, WIDTH], behind [BLOCK_T, WIDTH], the last row's factor,
    the product of all factors).
    """
    one = tl.full([WIDTH], 1.0, tl.float32)
    zero = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    return zero, zero, one, one


@triton.jit
def next_decays(decays, own, j, BLOCK_T: tl.constexpr, BACKWARD: tl.constexpr):
    """Decays at row ``j``, whose factors are ``own``: forwards the rows come from the last one."""
    between, behind, factor, passed = decays
    i = tl.arange(0, BLOCK_T)[:, None]
    here = i == j
    if BACKWARD:
        between = tl.where(i < j, between * own[None, :], tl.where(here, 1.0, 0.0))
        passed = passed * own
        behind = tl.where(here, passed[None, :], behind)
    else:
        between = tl.where(i > j, between * factor[None, :], tl.where(here, 1.0, 0.0))
        behind = tl.where(here, passed[None, :], behind)
        passed = passed * own
    return between, behind, own, passed


@triton.jit
def channel_edges(decays, BACKWARD: tl.constexpr):
    """(ahead, behind, whole) after the chunk's last call of ``next_decays``."""
    between, behind, factor, passed = decays
    if not BACKWARD:
        between = between * factor[None, :]
    return between, behind, passed
