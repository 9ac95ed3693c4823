"""Rotary embedding at load: rows of Q or K turned by the angles of their positions.

A channel and its partner are loaded, the second by a masked load that meets the first one's cache
lines, and turned in fp32; the result is rounded to the tensor's dtype once, as products take it.
Gradients come out with respect to the turned rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.tensors import load_tile, stat_ptr, widened


class Rope(NamedTuple):
    """Tables and positions. A head stride of 0: one table for all heads."""

    cos: Any  # fp32 [Hk, length, half]
    sin: Any
    head: Any  # elements from head to head
    length: Any
    half: Any
    at_q: Any  # Stat of int32 [B, 1, Sq]
    at_k: Any
    step: Any  # between partners: 1 for channels (2 n, 2 n + 1), half for (n, n + half)


@triton.jit
def turn(tile, rows_ptr, real, at, rope, h, WIDTH: tl.constexpr):
    """``tile`` [BLOCK, WIDTH] with its first 2 * half channels turned.

    rows_ptr [BLOCK, 1]: channel 0 of each row; real [BLOCK, 1]: rows that exist; at [BLOCK, 1]:
    their positions; h: KV head.
    """
    columns = tl.arange(0, WIDTH)[None, :]
    low = columns // rope.step % 2 == 0
    partner = tl.where(low, columns + rope.step, columns - rope.step)
    angle = columns // (2 * rope.step) * rope.step + columns % rope.step
    turns = real & (columns < 2 * rope.half)
    other = widened(tl.load(rows_ptr + partner, mask=turns, other=0.0)).to(tl.float32)
    at = tl.minimum(tl.maximum(at, 0), rope.length - 1).to(tl.int64)
    entry = tl.cast(h, tl.int64) * rope.head + at * rope.half + angle
    cos = tl.load(rope.cos + entry, mask=turns, other=1.0)
    sin = tl.load(rope.sin + entry, mask=turns, other=0.0)
    turned = tile.to(tl.float32) * cos + other * tl.where(low, -sin, sin)
    return turned.to(tile.dtype)


@triton.jit
def load_turned(
    base, start, count, x, rope, place, QUERY: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``load_tile`` of Q (QUERY) or K, turned unless ``rope`` is None; place: see ``mods``."""
    tile = load_tile(base, start, count, x, BLOCK, WIDTH, SIZE, WHOLE)
    if rope is not None:
        rows = (start + tl.arange(0, BLOCK))[:, None]
        real = rows < count
        if QUERY:
            positions = stat_ptr(rope.at_q, place[0], 0, place[2])
        else:
            positions = stat_ptr(rope.at_k, place[0], 0, place[3])
        at = tl.load(positions + rows, mask=real, other=0)
        tile = turn(tile, base + rows.to(tl.int64) * x.row, real, at, rope, place[6], WIDTH)
    return tile
