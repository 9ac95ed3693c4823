"""Positions counted by gates, for one tile of scores (CoPE; Golovneva et al., 2024).

Tiles are [BLOCK_M, BLOCK_N], rows are queries. A row carries the sum of the gates right of the
tile. Once it has reached the last position, all further left has that position, no gates and no
gradient through them: a tile whose rows all have got there is ``closed``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import dot
from attnforge.triton_kernels.tensors import head_ptr, load_tile

BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


class Sight(NamedTuple):
    """What ``lang.seen`` asks of the scores: a window; nothing else hides."""

    left: Any
    right: Any
    hides: Any


class Table(NamedTuple):
    """<q_i, e_n>: a View of fp32 [B, Sq, Hq, N], and the last position."""

    view: Any
    top: Any


def blocks(itemsize: int, width: int) -> dict[str, int]:
    """Tiles of all kernels. A [M, N] tile has several values per score: 64 x 64 spills everywhere.

    width: the larger padded head dim. No number here was measured on a device.
    """
    return {**BLOCKS, "BLOCK_M": 32 if itemsize == 2 and width <= 128 else 16}


@triton.jit
def table_rows(table, b, h, first_row, rows):
    """[BLOCK_M, 1] pointers to the tables of rows."""
    return (head_ptr(table.view, b, h, first_row) + rows.to(tl.int64) * table.view.row)[:, None]


@triton.jit
def products(q, k_head, start, n_keys, k, scale, D: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """(logits in natural units, the tile of K) of keys ``start ..``."""
    k_tile = load_tile(k_head, start, n_keys, k, BLOCK_N, BLOCK_D, D, False)
    s = dot(q, k_tile.T, tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    return s * scale, k_tile


@triton.jit
def gates(x, visible):
    """The logistic function of visible logits, 0 elsewhere."""
    tail = tl.exp(-tl.abs(x))
    return tl.where(visible, tl.where(x >= 0.0, 1.0, tail) / (1.0 + tail), 0.0)


@triton.jit
def placed(x, visible, carry, entries, real, top):
    """(scores, position, floor, slope, gate, carry after it) of a tile; entries: ``table_rows``."""
    gate = gates(x, visible)
    at = tl.minimum(tl.cumsum(gate, 1, reverse=True) + carry[:, None], top * 1.0)
    floor = tl.maximum(tl.minimum(at.to(tl.int32), top - 1), 0)
    low = tl.load(entries + floor, mask=real[:, None], other=0.0)
    high = tl.load(entries + tl.minimum(floor + 1, top), mask=real[:, None], other=0.0)
    score = x + low + (at - floor) * (high - low)
    slope = tl.where(at < top, high - low, 0.0)
    return score, at, slope, gate, carry + tl.sum(gate, 1)


@triton.jit
def is_open(carry, real, top):
    """Whether a row of the tile still counts."""
    return tl.min(tl.where(real, carry, top * 1.0)) < top
