"""Features of single scores: row bounds, masks, biases, forget gates, a row's scale, dropout.

Functions take ``mods``, rows and keys that broadcast against each other, and a place: (batch entry,
query head, first row, first key, rows, keys, KV head) of the sequence. In a decode the query head
is a column [BM, 1], since the rows of a tile belong to several; then what belongs to heads comes as
[BM, BN]. Everything of the docs' formula that is added to a logit is in ``added``, all that hides a
pair is in ``unhidden``, and what tiles need not be walked is in ``narrow_keys`` and
``narrow_rows``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.tensors import LOG2E, head_ptr, stat_ptr

FAR = tl.constexpr((1 << 31) - 1)


class Mods(NamedTuple):
    """A field is None if its feature is off; strides are 0 where a size of 1 broadcasts."""

    bounds: Any  # View of int32 [B, Hq, Sq, 2]: row i sees keys lo <= j < hi only
    mask: Any  # View of uint8 [B, Hq, Sq, covered]: 0 hides one of the last keys
    covered: Any
    ids_q: Any  # Stat of int32 [B, 1, Sq]; a row sees keys of its own id
    ids_k: Any
    key_bias: Any  # Stat of fp32 [B, Hq, Sk]
    bias: Any  # View of [B, Hq, Sq, Sk]
    rel_bias: Any  # Stat of fp32 [1, Hq, 2 radius + 1]
    radius: Any
    decay: Any  # Stat of fp64 [B, Hq, Sk]
    row_scale: Any  # Stat of fp32 [B, Hq, Sq]
    seed: Any  # of the Philox key, in 63 bits
    offset: Any  # the counter's last word
    dropped: Any  # a weight whose word is below it is dropped
    boost: Any  # 1 / (1 - p) for the others
    heads: Any  # query heads of a batch entry, for dropout's counters
    qk_descale: Any  # fp32 [B, heads_kv]: what products of fp8 rows are multiplied by
    v_descale: Any  # the same of outputs
    heads_kv: Any


@triton.jit
def row_bounds(mods, rows, place):
    """(first key, end, which rows exist) of each row; a row that does not exist: 0, 0."""
    b, h, first_row, _, n_rows, _, _ = place
    at = head_ptr(mods.bounds, b, h, first_row) + rows.to(tl.int64) * mods.bounds.row
    real = rows < n_rows
    return tl.load(at, mask=real, other=0), tl.load(at + 1, mask=real, other=0), real


@triton.jit
def narrow_keys(ranges, rows, mods, place, BLOCK: tl.constexpr):
    """Tiles of keys (lo, whole_lo, whole_hi, hi) that a tile of rows sees, as ``seen_range``."""
    lo, whole_lo, whole_hi, hi = ranges
    n_keys = place[5]
    if mods.bounds is not None:
        start, end, real = row_bounds(mods, rows, place)
        start = tl.minimum(start, n_keys)
        end = tl.minimum(end, n_keys)
        first = tl.min(tl.where(real, start, n_keys))
        lo = tl.maximum(lo, first // BLOCK * BLOCK)
        hi = tl.maximum(tl.minimum(hi, tl.max(end)), lo)
        whole_lo = tl.maximum(whole_lo, tl.cdiv(tl.max(start), BLOCK) * BLOCK)
        whole_lo = tl.minimum(tl.maximum(whole_lo, lo), hi)
        least = tl.min(tl.where(real, end, n_keys))
        whole_hi = tl.maximum(tl.minimum(whole_hi, least // BLOCK * BLOCK), whole_lo)
    if mods.mask is not None:  # of the last keys: a tree of drafts leaves the cache before it whole
        free = tl.maximum(n_keys - mods.covered, 0) // BLOCK * BLOCK
        whole_hi = tl.maximum(tl.minimum(whole_hi, free), whole_lo)
    if mods.ids_q is not None:
        whole_lo = lo
        whole_hi = lo
    return lo, whole_lo, whole_hi, hi


@triton.jit
def narrow_rows(ranges, first, last, mods, place, BLOCK: tl.constexpr):
    """The same for the rows that see keys ``first .. last``: a scan over the rows' bounds."""
    lo, whole_lo, whole_hi, hi = ranges
    if mods.bounds is not None:
        low = hi
        high = lo
        for at in tl.range(lo, hi, BLOCK):
            rows = at + tl.arange(0, BLOCK)
            start, end, real = row_bounds(mods, rows, place)
            sees = real & (start <= last) & (end > first)
            low = tl.minimum(low, tl.min(tl.where(sees, rows, FAR)))
            high = tl.maximum(high, tl.max(tl.where(sees, rows + 1, 0)))
        lo = tl.maximum(lo, low // BLOCK * BLOCK)
        hi = tl.maximum(tl.minimum(hi, high), lo)
    if mods.bounds is not None or mods.mask is not None or mods.ids_q is not None:
        whole_lo = lo
        whole_hi = lo
    return lo, whole_lo, whole_hi, hi


@triton.jit
def unhidden(visible, rows, keys, mods, place):
    """``visible`` without the pairs that row bounds, segments or a mask hide."""
    b, h, first_row, first_key, n_rows, n_keys, _ = place
    if mods.bounds is not None:
        start, end, _ = row_bounds(mods, rows, place)
        visible = visible & (keys >= start) & (keys < end)
    if mods.ids_q is not None:
        id_q = tl.load(stat_ptr(mods.ids_q, b, 0, first_row) + rows, mask=rows < n_rows, other=0)
        id_k = tl.load(stat_ptr(mods.ids_k, b, 0, first_key) + keys, mask=keys < n_keys, other=0)
        visible = visible & (id_q == id_k)
    if mods.mask is not None:
        column = keys - (n_keys - mods.covered)
        at = head_ptr(mods.mask, b, h, 0) + rows.to(tl.int64) * mods.mask.row + column
        visible = visible & (tl.load(at, mask=visible & (column >= 0), other=1) != 0)
    return visible


@triton.jit
def row_scale(rows, mods, place):
    """What multiplies the rows' products, in the shape of ``rows``."""
    b, h, first_row, _, n_rows, _, _ = place
    at = stat_ptr(mods.row_scale, b, h, first_row) + rows
    return tl.load(at, mask=rows < n_rows, other=0.0)


@triton.jit
def descale(x, mods, place):
    """``x``, one of the descales, of the KV head of a place."""
    return tl.load(x + tl.cast(place[0], tl.int64) * mods.heads_kv + place[6])


@triton.jit
def added(s, rows, keys, mods, place):
    """Base-2 logits ``s`` and all biases."""
    if place is not None:
        b, h, first_row, first_key, n_rows, n_keys, _ = place
    if mods.key_bias is not None:
        at = stat_ptr(mods.key_bias, b, h, first_key) + keys
        s = s + tl.load(at, mask=keys < n_keys, other=0.0) * LOG2E
    if mods.bias is not None:
        at = head_ptr(mods.bias, b, h, first_row) + rows.to(tl.int64) * mods.bias.row + keys
        value = tl.load(at, mask=(rows < n_rows) & (keys < n_keys), other=0.0)
        s = s + value.to(tl.float32) * LOG2E
    if mods.rel_bias is not None:
        distance = keys - rows - (n_keys - n_rows)
        distance = tl.minimum(tl.maximum(distance, -mods.radius), mods.radius) + mods.radius
        s = s + tl.load(stat_ptr(mods.rel_bias, 0, h, 0) + distance) * LOG2E
    if mods.decay is not None:
        # Both relative to the tile's first key and as pairs of fp32, since what is left of two
        # sums behind a shut gate is far smaller than they are.
        gates = stat_ptr(mods.decay, b, h, first_key)
        base = tl.load(gates + tl.minimum(tl.min(keys), tl.maximum(n_keys - 1, 0)))
        at = tl.minimum(tl.maximum(rows + (n_keys - n_rows), 0), tl.maximum(n_keys - 1, 0))
        here = tl.load(gates + at, mask=rows < n_rows, other=0.0) - base
        there = tl.load(gates + keys, mask=keys < n_keys, other=0.0) - base
        here_high = here.to(tl.float32)
        there_high = there.to(tl.float32)
        here_low = (here - here_high.to(tl.float64)).to(tl.float32)
        there_low = (there - there_high.to(tl.float64)).to(tl.float32)
        s = s + ((here_high - there_high) + (here_low - there_low)) * LOG2E
    return s


@triton.jit
def kept(rows, keys, mods, place):
    """Which weights dropout leaves: the choice of ``reference.scores.dropout_keep``."""
    b, h, _, _, _, _, _ = place
    zero = tl.zeros_like(rows + keys)
    counter = (((keys >> 6) << 4) | (keys & 15)) + zero
    head = b * mods.heads + h + zero
    last = (tl.cast(mods.offset, tl.int64) + zero).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        mods.seed, counter.to(tl.uint32), (rows + zero).to(tl.uint32), head.to(tl.uint32), last
    )
    which = (keys >> 4) & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return word.to(tl.int64) >= mods.dropped
