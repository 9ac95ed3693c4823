"""Gradient of a gate that is one number: sums over time of q dq - k dk, from every token on.

    dg_t = sum_{i >= t} (q_i dq_i - k_i dk_i) + <dS_T, S_T>        begun anew at every reset

One program per sequence and head walks BLOCK_T tokens at a time from the end. A token's sum in its
block runs over pairs with no reset between them, so that nothing is subtracted; what later blocks
give is carried in fp64. Bytes: 8 per token and tile of columns; flops: BLOCK_T per token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import packed_span
from attnforge.triton_kernels.linear.decays import RESET
from attnforge.triton_kernels.tensors import head_ptr


@triton.jit(do_not_specialize=["count", "heads", "tiles", "stride"])
def over_time(
    q_terms, k_terms, gate, end, out, ends, count, heads, tiles, stride, BLOCK_T: tl.constexpr
):
    """q_terms, k_terms: Views of [B, T, HV] of the first tile, ``stride`` elements from the next.

    gate, out: Views of fp32 [B, T, HV]; end: fp32 [N, HV] or None.
    """
    pid = tl.program_id(0)
    h = pid % heads
    n = pid // heads
    b = n
    if ends is not None:
        b = 0
    first, length = packed_span(ends, count, n)
    i = tl.arange(0, BLOCK_T)
    carry = tl.full([1], 0.0, tl.float64)
    if end is not None:
        carry += tl.load(end + pid).to(tl.float64)
    blocks = tl.cdiv(length, BLOCK_T)
    for t in tl.range(0, blocks):
        rows = (blocks - 1 - t) * BLOCK_T + i
        real = rows < length
        row = rows.to(tl.int64)
        terms = tl.zeros([BLOCK_T], tl.float32)
        for tile in tl.range(0, tiles):
            far = tl.cast(tile, tl.int64) * stride + row * q_terms.row
            terms += tl.load(head_ptr(q_terms, b, h, first) + far, mask=real, other=0.0)
            terms -= tl.load(head_ptr(k_terms, b, h, first) + far, mask=real, other=0.0)
        log = tl.load(head_ptr(gate, b, h, first) + row * gate.row, mask=real, other=0.0)
        reset = (log < RESET).to(tl.int32)
        before = tl.cumsum(reset, 0)
        # of i: resets at it and up to each later row
        between = before[None, :] - (before - reset)[:, None]
        seen = (i[:, None] <= i[None, :]) & (between == 0)
        sums = tl.sum(tl.where(seen, terms[None, :], 0.0), 1)
        to_end = tl.sum(reset, 0) - (before - reset) == 0
        sums = sums.to(tl.float64) + tl.where(to_end, carry, 0.0)
        carry = tl.zeros([1], tl.float64) + tl.sum(tl.where(i == 0, sums, 0.0), 0)
        tl.store(head_ptr(out, b, h, first) + row * out.row, sums.to(tl.float32), mask=real)
