"""Diagonal scan h_t = e^{g_t} h_{t-1} + x_t, channel by channel, and its gradients.

    dx_t = dh_t + e^{g_{t+1}} dx_{t+1}      dg_t = e^{g_t} h_{t-1} dx_t      dh_0 = e^{g_0} dx_0

Algorithm: a program owns BLOCK_D channels of a sequence and walks BLOCK_T tokens at a time with an
associative scan of (decay, value) pairs; products of factors only, so no gate overflows, and one
below RESET is exactly 0. The backward keeps h before every block in a workspace from a walk forward
and scans each block again with the one from the right, so h is never taken from a rounded output.
Bytes: x, g, out once; backward x twice, g 4 times, the rest once, and D / BLOCK_T states a token.
Flops: about 3 log2(BLOCK_T) per element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import packed_span
from attnforge.triton_kernels.linear.decays import factor_of


@triton.jit
def after(a, x, b, y):
    """The pair of one stretch of tokens followed by another."""
    return a * b, x * b + y


@triton.jit
def place(ends, count, tiles, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(sequence, first row of all, length, channels [1, BLOCK_D]) of this program."""
    pid = tl.program_id(0)
    n = pid // tiles
    first, length = packed_span(ends, count, n)
    row = tl.cast(first, tl.int64)
    if ends is None:
        row += tl.cast(n, tl.int64) * count
    return n, row, length, (pid % tiles * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]


@triton.jit
def block(
    x, g, row, start, length, c, h, D: tl.constexpr, BLOCK_T: tl.constexpr, BEFORE: tl.constexpr
):
    """[BLOCK_T, BLOCK_D] states behind each token of a block, or BEFORE it; h [1, BLOCK_D]: of its
    start."""
    t = start + tl.arange(0, BLOCK_T)[:, None] - BEFORE
    at, mask = (row + t) * D + c, (t >= start) & (t < length) & (c < D)
    factor = factor_of(tl.load(g + at, mask=mask, other=0.0).to(tl.float32))
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    passed, own = tl.associative_scan((factor, value), 0, after)
    return passed * h + own


@triton.jit
def last_row(x, BLOCK_T: tl.constexpr, AT: tl.constexpr):
    """Row AT of a tile, [1, BLOCK_D]."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_T)[:, None] == AT, x, 0.0), 0)[None, :]


@triton.jit(do_not_specialize=["count", "tiles"])
def diag_scan_fwd(
    x, g, out, initial, final, ends, count, tiles,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x, g, out contiguous [B, T, D]; initial, final fp32 [N, D] or None."""
    n, row, length, c = place(ends, count, tiles, D, BLOCK_D)
    h = tl.zeros([1, BLOCK_D], tl.float32)
    if initial is not None:
        h = tl.load(initial + tl.cast(n, tl.int64) * D + c, mask=c < D, other=0.0)
    for start in tl.range(0, length, BLOCK_T):
        values = block(x, g, row, start, length, c, h, D, BLOCK_T, 0)
        t = start + tl.arange(0, BLOCK_T)[:, None]
        tl.store(out + (row + t) * D + c, values, mask=(t < length) & (c < D))
        h = last_row(values, BLOCK_T, BLOCK_T - 1)
    if final is not None:
        tl.store(final + tl.cast(n, tl.int64) * D + c, h, mask=c < D)


@triton.jit(do_not_specialize=["count", "tiles"])
def diag_scan_bwd(
    dout, x, g, dx, dg, initial, dfinal, dinitial, kept, ends, count, tiles,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """kept: fp32 [blocks, D], the state before each block; see ``delta_bwd`` for its place."""
    n, row, length, c = place(ends, count, tiles, D, BLOCK_D)
    h = tl.zeros([1, BLOCK_D], tl.float32)
    if initial is not None:
        h = tl.load(initial + tl.cast(n, tl.int64) * D + c, mask=c < D, other=0.0)
    own = kept + (row // BLOCK_T + n) * D + c
    blocks = tl.cdiv(length, BLOCK_T)
    for s in tl.range(0, blocks):
        tl.store(own + tl.cast(s, tl.int64) * D, h, mask=c < D)
        values = block(x, g, row, s * BLOCK_T, length, c, h, D, BLOCK_T, 0)
        h = last_row(values, BLOCK_T, BLOCK_T - 1)
    tl.debug_barrier()
    carry = tl.zeros([1, BLOCK_D], tl.float32)  # what comes from the right, with its factor
    if dfinal is not None:
        carry = tl.load(dfinal + tl.cast(n, tl.int64) * D + c, mask=c < D, other=0.0)
    for i in tl.range(0, blocks):
        s = blocks - 1 - i
        start = s * BLOCK_T
        t = start + tl.arange(0, BLOCK_T)[:, None]
        at, mask = (row + t) * D + c, (t < length) & (c < D)
        h = tl.load(own + tl.cast(s, tl.int64) * D, mask=c < D, other=0.0)
        before = block(x, g, row, start, length, c, h, D, BLOCK_T, 1)
        factor = factor_of(tl.load(g + at, mask=mask, other=0.0).to(tl.float32))
        # The factor of the token behind each; that of the next block is in the carry.
        inside = (t + 1 < length) & (t + 1 < start + BLOCK_T) & (c < D)
        behind = factor_of(tl.load(g + at + D, mask=inside, other=0.0).to(tl.float32))
        given = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        passed, sums = tl.associative_scan((behind, given), 0, after, reverse=True)
        grads = sums + passed * carry
        tl.store(dx + at, grads, mask=mask)
        tl.store(dg + at, factor * before * grads, mask=mask)
        carry = last_row(grads * factor, BLOCK_T, 0)
    if dinitial is not None:
        tl.store(dinitial + tl.cast(n, tl.int64) * D + c, carry, mask=c < D)
