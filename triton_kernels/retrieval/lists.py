"""Lists of keys in kernels: which entries of a list are seen, and where their keys lie.

Lists are data: an id that names no key in use is ignored wherever it stands. All rows of a tile
share a list, so that what is hidden is hidden from all of them: its key and value are loaded as 0,
and no NaN of a key that nobody lists can reach a sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.tensors import INF, LOG2E


class KeyLists(NamedTuple):
    """int32 ids [B, H, slots], and of which keys and rows they are."""

    ids: Any
    lens: Any  # int32 [B, H], or None: all slots count
    bias: Any  # fp32 like ids, added to natural logits; or None
    batch: Any  # lists from batch entry to batch entry, and from head to head; 0 is one for all
    head: Any
    slots: Any
    used: Any  # int32 [B] keys in use, or None
    room: Any  # keys that there are
    rows: Any  # of q
    pack: Any  # query heads that share a list and a KV head: rows of one tile
    group: Any  # query heads of a KV head


@triton.jit
def list_of(lists, b, h):
    """(number of the first entry, entries, keys in use) of the list of row head ``h``."""
    at = tl.cast(b, tl.int64) * lists.batch + h * lists.head
    count = lists.slots
    if lists.lens is not None:
        count = tl.minimum(tl.maximum(tl.load(lists.lens + at), 0), count)
    n_keys = lists.room
    if lists.used is not None:
        n_keys = tl.minimum(tl.load(lists.used + b), n_keys)
    return at * lists.slots, count, n_keys


@triton.jit
def entries_at(lists, first, start, count, n_keys, BLOCK: tl.constexpr):
    """(keys, base-2 biases, which are seen) [BLOCK] of entries ``start ..`` below ``count``."""
    n = start + tl.arange(0, BLOCK)
    real = n < count
    keys = tl.load(lists.ids + first + n, mask=real, other=-1)
    real = real & (keys >= 0) & (keys < n_keys)
    bias = tl.zeros([BLOCK], tl.float32)
    if lists.bias is not None:
        bias = tl.load(lists.bias + first + n, mask=real, other=-INF) * LOG2E
        real = real & (bias != -INF)
    return tl.where(real, keys, 0), bias, real


@triton.jit
def packed_rows(lists, h, start, BLOCK: tl.constexpr):
    """(rows, query heads, which are real) [BLOCK] of a row head, position by position."""
    packed = start + tl.arange(0, BLOCK)
    real = packed < lists.rows * lists.pack
    head = h * lists.pack + packed % lists.pack
    return tl.where(real, packed // lists.pack, 0), tl.where(real, head, 0), real
