"""Forward: exact attention in tiles (FlashAttention-2; Dao, 2023).

Algorithm: one program holds BLOCK_M query rows of one head and walks the keys they see in tiles of
BLOCK_N: S = Q K^T, online softmax in base 2 (Milakov and Gimelshein, 2018), O += P V. Tiles that
all rows see whole run a loop without masks; those on the edge of a mask or of the sequence run a
masked one before and behind it. The LSE is natural and includes the sink.

Tiling: grid (tiles * heads * batch). Tiles of one head are neighbours, so that their K and V are in
L2, and late ones, which see most keys under a causal mask, go first. Rows stay in registers; K and
V tiles pass through shared memory, ``num_stages`` of them in flight.

Cost: 2 (D + Dv) flops per visible pair; K and V are read ceil(Sq / BLOCK_M) times, from L2 mostly.

Numerics: 16-bit P for the second product, so its error is u16 sum_j p |v|, random in sign; all sums
are fp32. fp32 inputs take true fp32 products. fp8 is multiplied as bf16, or as what Q is. Hidden
NaN in V stays hidden (``lang.tame``).

Limits: head dims are padded to powers of two, the padding costs products but no memory traffic.
Source: the papers above; the code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import key_range, result, slope_of, span, start_state, walk
from attnforge.triton_kernels.rope import load_turned
from attnforge.triton_kernels.tensors import head_ptr, inside, stat_ptr, tile_ptr


@triton.jit(do_not_specialize=["seq", "scores", "tiles"])
def fwd(
    q, k, v, out, low, lse, seq, scores, heads, group, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """q, k, v, out and low (out_lo, or None) are Views, lse is a Stat. USE_TMA: see ``walk``."""
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * BLOCK_M
    h = pid // tiles % heads
    b = pid // tiles // heads
    first_row, n_rows, first_key, n_keys = span(seq, b)
    if first >= n_rows:
        return
    rows = first + tl.arange(0, BLOCK_M)
    q_head = head_ptr(q, b, h, first_row)
    k_head = head_ptr(k, b, h // group, first_key)
    v_head = head_ptr(v, b, h // group, first_key)
    slope = slope_of(scores, b, h)
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    place = (b, h, first_row, first_key, n_rows, n_keys, h // group)
    ranges = key_range(rows[:, None], first, last, n_rows, n_keys, scores, place, BLOCK_N)
    before = start_state(scores, h, BLOCK_M)
    q_tile = load_turned(
        q_head, first, n_rows, q, scores.rope, place, True, BLOCK_M, BLOCK_D, D, False
    )
    top, total, acc = walk(
        q_tile, rows, slope, before, ranges, n_rows, n_keys, k, v, k_head, v_head, scores, place,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, None, USE_TMA,
    )  # fmt: skip
    o, stat = result(top, total, acc, scores, place)
    mask = inside(first, n_rows, BLOCK_M, BLOCK_DV, DV)
    high = o.to(out.ptr.dtype.element_ty)
    o_head = head_ptr(out, b, h, first_row)
    tl.store(tile_ptr(o_head, first, out, BLOCK_M, BLOCK_DV), high, mask=mask)
    if low is not None:
        rest = (o - high.to(tl.float32)).to(out.ptr.dtype.element_ty)
        low_head = head_ptr(low, b, h, first_row)
        tl.store(tile_ptr(low_head, first, low, BLOCK_M, BLOCK_DV), rest, mask=mask)
    tl.store(stat_ptr(lse, b, h, first_row) + rows, stat, mask=rows < n_rows)
