"""CoPE, forward: the tiles of flash from right to left, with a running sum of gates per row.

Algorithm: one program holds BLOCK_M query rows of one head and walks the keys that they see in
tiles of BLOCK_N from the last to the first. A row carries its sum of gates beside the state of
online softmax; the position of a key is that sum and a scan over the tile. The table <q, e_n> of
each row lies in memory, [B, Hq, Sq, N] fp32, made by one product before.

Cost: 2 (D + Dv) flops per visible pair; a logistic function, a scan and two look-ups per score
while a row's gates are open. Memory besides: the tables, linear in Sq.
Numerics: as flash; sums of gates are fp32 and never much larger than the last position.
Limits: padded head dims as flash. Source: the paper's formula; the code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.cope.positions import is_open, placed, products, table_rows
from attnforge.triton_kernels.lang import dot, seen, seen_range, span, tame, unleash
from attnforge.triton_kernels.tensors import (
    INF,
    LN2,
    LOG2E,
    head_ptr,
    inside,
    load_tile,
    stat_ptr,
    tile_ptr,
)
from attnforge.triton_kernels.weights import online


@triton.jit(do_not_specialize=["seq", "tiles", "scale"])
def fwd(
    q, k, v, table, out, low, lse, seq, sight, scale, heads, group, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """q, k, v, out and low (or None) are Views, lse is a Stat, table a Table."""
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * BLOCK_M
    h = pid // tiles % heads
    b = pid // tiles // heads
    first_row, n_rows, first_key, n_keys = span(seq, b)
    if first >= n_rows:
        return
    rows = first + tl.arange(0, BLOCK_M)
    real = rows < n_rows
    k_head = head_ptr(k, b, h // group, first_key)
    v_head = head_ptr(v, b, h // group, first_key)
    q_tile = load_tile(head_ptr(q, b, h, first_row), first, n_rows, q, BLOCK_M, BLOCK_D, D, False)
    entries = table_rows(table, b, h, first_row, rows)
    far = tl.load(entries + table.top, mask=real[:, None], other=0.0)
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    lo, _whole_lo, _whole_hi, hi = seen_range(
        first, last, n_keys, n_keys - n_rows, sight.left, sight.right, BLOCK_N
    )
    top = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    carry = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    bad = 0
    count = tl.cdiv(hi - lo, BLOCK_N)
    for n in tl.range(0, count):
        start = lo + (count - 1 - n) * BLOCK_N
        keys = start + tl.arange(0, BLOCK_N)
        x, _k = products(q_tile, k_head, start, n_keys, k, scale, D, BLOCK_N, BLOCK_D)
        visible = seen(rows[:, None], keys[None, :], n_rows, n_keys, sight)
        s = x + far
        if is_open(carry, real, table.top):
            s, _at, _slope, _gate, carry = placed(x, visible, carry, entries, real, table.top)
        s = tl.where(visible, s * LOG2E, -INF)
        p, alpha, top, total = online(s, top, total)
        v_tile, found = tame(load_tile(v_head, start, n_keys, v, BLOCK_N, BLOCK_DV, DV, False))
        bad = bad | found
        acc = dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])
    if bad != 0:
        acc = unleash(
            acc, rows, lo, hi, n_rows, n_keys, v_head, v, sight, None, None, BLOCK_DV, DV, True
        )
    o = tl.where(total[:, None] == 0.0, 0.0, acc / total[:, None])
    mask = inside(first, n_rows, BLOCK_M, BLOCK_DV, DV)
    high = o.to(out.ptr.dtype.element_ty)
    o_head = head_ptr(out, b, h, first_row)
    tl.store(tile_ptr(o_head, first, out, BLOCK_M, BLOCK_DV), high, mask=mask)
    if low is not None:
        rest = (o - high.to(tl.float32)).to(out.ptr.dtype.element_ty)
        low_head = head_ptr(low, b, h, first_row)
        tl.store(tile_ptr(low_head, first, low, BLOCK_M, BLOCK_DV), rest, mask=mask)
    stat = (top + tl.log2(total)) * LN2
    tl.store(stat_ptr(lse, b, h, first_row) + rows, stat, mask=real)
