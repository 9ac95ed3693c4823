"""Tensors in kernels: named tuples of a pointer and strides, and tiles loaded through them.

Offsets into tensors are 64-bit. A stride of 0 broadcasts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class View(NamedTuple):
    """A tensor [B, S, H, X] with unit last stride; packed sequences [T, H, X] have batch = 0."""

    ptr: Any
    batch: Any  # strides in elements
    row: Any
    head: Any


class Stat(NamedTuple):
    """fp32 [B, H, S] or packed [H, T], one number per row, rows contiguous."""

    ptr: Any
    batch: Any
    head: Any


@triton.jit
def head_ptr(x, b, h, first):
    """Pointer to row ``first`` of a head of a View; ``h`` may be a vector."""
    at = tl.cast(b, tl.int64) * x.batch + tl.cast(first, tl.int64) * x.row
    return x.ptr + at + tl.cast(h, tl.int64) * x.head


@triton.jit
def stat_ptr(x, b, h, first):
    """Pointer to row ``first`` of a head of a Stat; ``h`` may be a vector."""
    return x.ptr + tl.cast(b, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head + first


@triton.jit
def tile_ptr(base, start, x, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK, WIDTH] pointers to rows ``start ..`` of the head at ``base``."""
    rows = (start + tl.arange(0, BLOCK)).to(tl.int64)
    return base + rows[:, None] * x.row + tl.arange(0, WIDTH)[None, :]


@triton.jit
def inside(start, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """[BLOCK, WIDTH] mask: rows below ``count``, columns below SIZE."""
    rows = start + tl.arange(0, BLOCK) < count
    return rows[:, None] & (tl.arange(0, WIDTH) < SIZE)[None, :]


@triton.jit
def widened(tile):
    """A tile of fp8 e4m3, which comes as bytes, in bf16 and exactly; any other as it is.

    By bits, so that it runs where a GPU has no such type: exponent and mantissa are those of an
    fp16 of 2^-8 the value, subnormals too; all ones are NaN.
    """
    if tile.dtype == tl.uint8:
        byte = tile.to(tl.uint16)
        half = (((byte & 0x7F) << 7) | ((byte & 0x80) << 8)).to(tl.float16, bitcast=True)
        value = tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
        tile = value.to(tl.bfloat16)
    return tile


@triton.jit
def load_tile(
    base, start, count, x,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows ``start ..`` as [BLOCK, WIDTH], 0 at and past row ``count`` and column SIZE.

    fp8, as bytes, becomes bf16. WHOLE promises that all rows exist, so that only columns need a
    mask, or nothing does.
    """
    pointers = tile_ptr(base, start, x, BLOCK, WIDTH)
    if WHOLE:
        if SIZE == WIDTH:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(tl.arange(0, WIDTH) < SIZE)[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=inside(start, count, BLOCK, WIDTH, SIZE), other=0.0)
    return widened(tile)
