"""The vocabulary of the Triton kernels: sequences, ranges, masks, scores, online softmax, products.

A kernel takes few arguments, most of them named tuples: ``View`` for a tensor, ``Stat`` for
statistics per row, ``Sequences`` for where sequences lie, ``Scores`` for what makes a logit of a
dot product. A field that is None is a feature that is off: Triton specialises on it, so that
neither a flag nor an instruction is left of it. A new feature of the scores is one field, and its
lines in ``logits`` (values) or in ``seen_range`` and ``seen`` (masks), or for tensors that act on
single scores in ``mods``, which these call: forward, backward and decode share the functions.
A place is what ``mods`` needs to find them; kernels that take no mods leave it out.

Rows are queries, keys are keys. Logits are in base 2: ``Scores`` holds log2(e). Offsets into
tensors are 64-bit. Functions on tiles work by broadcasting, so a transposed tile takes rows as
[1, BM] and keys as [BN, 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.mods import (
    added,
    descale,
    kept,
    narrow_keys,
    narrow_rows,
    row_scale,
    unhidden,
)
from attnforge.triton_kernels.pages import (
    add_values,
    channel_sums,
    decoded_products,
    load_slots,
    locate,
)
from attnforge.triton_kernels.rope import load_turned
from attnforge.triton_kernels.tensors import INF, LN2, LOG2E, load_tile, stat_ptr, widened
from attnforge.triton_kernels.weights import start_total, weigh


class Sequences(NamedTuple):
    """Where sequences lie: dense ones all alike, packed ones by prefix sums."""

    cu_q: Any  # int32 [B + 1] or None
    cu_k: Any
    used: Any  # int32 [B] or None: keys at or past it do not exist
    rows: Any  # of each sequence; packed: of the whole tensor
    keys: Any


class Scores(NamedTuple):
    """What turns <q, k> into a base-2 logit."""

    scale: Any  # softmax_scale * log2(e)
    gain: Any  # softmax_scale / softcap, or None
    cap: Any  # softcap * log2(e), or None
    slopes: Any  # fp32 [Hq] or [B, Hq], or None
    slope_batch: Any  # its batch stride: 0 or Hq, or None
    sinks: Any  # fp32 [Hq], or None
    left: Any  # keys a row sees before and after its own position; None is all
    right: Any
    front: Any  # 1: masked tiles may come before the whole ones of a row; or None
    mods: Any  # a Mods; Triton cannot compare a tuple that holds None with None
    hides: Any  # 1: something of mods hides pairs; or None
    rope: Any  # a Rope, or None
    sigmoid: Any  # 1: the score function instead of softmax; or None
    relu: Any
    softplus: Any
    signed_softmax: Any


@triton.jit
def packed_span(ends, count, b):
    """(first, length) of sequence ``b`` of ``count`` packed rows, clamped to them.

    ends: int32 [B + 1], or None for sequences of ``count`` rows each.
    """
    first = 0  # of the tensor
    length = count
    if ends is not None:
        first = tl.minimum(tl.maximum(tl.load(ends + b), 0), count)
        length = tl.minimum(tl.maximum(tl.load(ends + b + 1), first), count) - first
    return first, length


@triton.jit
def span(seq, b):
    """(first row, rows, first key, keys) of sequence ``b``, clamped to what there is."""
    first_row, rows = packed_span(seq.cu_q, seq.rows, b)
    first_key, keys = packed_span(seq.cu_k, seq.keys, b)
    if seq.used is not None:
        keys = tl.minimum(keys, tl.maximum(tl.load(seq.used + b), 0))
    return first_row, rows, first_key, keys


@triton.jit
def seen_range(first, last, count, shift, back, ahead, BLOCK: tl.constexpr):
    """Tiles of the other side that positions ``first .. last`` see: (lo, whole_lo, whole_hi, hi).

    Position p sees ``p + shift - back .. p + shift + ahead`` of ``count``. [lo, hi) covers what any
    of them sees, from a multiple of BLOCK; the tiles of [whole_lo, whole_hi) are seen whole by all
    of them and need no mask. Keys of rows: shift = keys - rows, (left, right); rows of keys: the
    negative shift and (right, left).
    """
    lo = 0
    hi = count
    whole_lo = 0
    whole_hi = count
    if back is not None:
        lo = tl.maximum(first + shift - back, 0)
        whole_lo = tl.maximum(last + shift - back, 0)
    if ahead is not None:
        hi = tl.minimum(last + shift + ahead + 1, count)
        whole_hi = tl.minimum(first + shift + ahead + 1, count)
    lo = lo // BLOCK * BLOCK
    hi = tl.maximum(hi, lo)
    whole_lo = tl.minimum(tl.cdiv(whole_lo, BLOCK) * BLOCK, hi)
    whole_hi = tl.maximum(whole_hi // BLOCK * BLOCK, whole_lo)
    return lo, whole_lo, whole_hi, hi


@triton.jit
def within(ranges, begin, end):
    """The part of ``ranges`` inside [begin, end); begin is a multiple of the block."""
    lo, whole_lo, whole_hi, hi = ranges
    lo = tl.maximum(lo, begin)
    hi = tl.maximum(tl.minimum(hi, end), lo)
    whole_lo = tl.minimum(tl.maximum(whole_lo, lo), hi)
    whole_hi = tl.maximum(tl.minimum(whole_hi, hi), whole_lo)
    return lo, whole_lo, whole_hi, hi


@triton.jit
def key_range(rows, first, last, n_rows, n_keys, scores, place, BLOCK: tl.constexpr):
    """``seen_range`` of the tile of ``rows`` between ``first`` and ``last``."""
    ranges = seen_range(first, last, n_keys, n_keys - n_rows, scores.left, scores.right, BLOCK)
    return narrow_keys(ranges, rows, scores.mods, place, BLOCK)


@triton.jit
def row_range(ranges, first, last, scores, place, BLOCK: tl.constexpr):
    """``ranges`` of the rows that see keys ``first .. last``, for one query head."""
    return narrow_rows(ranges, first, last, scores.mods, place, BLOCK)


@triton.jit
def seen(rows, keys, n_rows, n_keys, scores, place=None):
    """Which keys each row sees, for the tiles that ``seen_range`` does not call whole."""
    visible = (rows < n_rows) & (keys < n_keys)
    at = rows + (n_keys - n_rows)
    if scores.left is not None:
        visible = visible & (keys >= at - scores.left)
    if scores.right is not None:
        visible = visible & (keys <= at + scores.right)
    if scores.hides is not None:
        visible = unhidden(visible, rows, keys, scores.mods, place)
    return visible


@triton.jit
def slope_of(scores, b, h):
    """ALiBi slope of head ``h`` in base 2 (0 without ALiBi); ``h`` may be a vector."""
    slope = 0.0
    if scores.slopes is not None:
        slope = tl.load(scores.slopes + tl.cast(b, tl.int64) * scores.slope_batch + h) * LOG2E
    return slope


@triton.jit
def logits(products, rows, keys, shift, slope, scores, place=None):
    """Base-2 logits of a tile of dot products, and their derivative up to the row's scale."""
    products = scaled(products, rows, scores, place)
    if scores.gain is None:
        s = products * scores.scale
        factor = 1.0
    else:
        # tanh by exp2: absolutely exact to 1e-7, which is what a logit of size cap needs.
        t = 1.0 - 2.0 / (1.0 + tl.exp2(products * (scores.gain * (2 * LOG2E))))
        s = t * scores.cap
        factor = 1.0 - t * t
    if scores.slopes is not None:
        s = s - slope * tl.abs(rows + shift - keys).to(tl.float32)
    s = added(s, rows, keys, scores.mods, place)
    return s, factor


@triton.jit
def scaled(x, rows, scores, place):
    """``x`` times the scale of its rows and the descale of its KV head, if they have one."""
    if scores.mods.row_scale is not None:
        x = x * row_scale(rows, scores.mods, place)
    if scores.mods.qk_descale is not None:
        x = x * descale(scores.mods.qk_descale, scores.mods, place)
    return x


@triton.jit
def drop(p, rows, keys, scores, place):
    """``p`` without the weights that dropout drops, the others scaled up."""
    if scores.mods.seed is not None:
        p = tl.where(kept(rows, keys, scores.mods, place), p * scores.mods.boost, 0.0)
    return p


@triton.jit
def dot(a, b, acc):
    """acc + a b, fp32 accumulation: tensor cores for 16-bit operands, true fp32 for fp32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tame(x):
    """(``x`` with 0 for NaN and infinities, 1 if there were any): a factor of partly hidden terms.

    The other factor is 0 where a term is hidden, but 0 * NaN is NaN. So masked tiles multiply tame
    factors, and ``unleash`` adds afterwards what visible terms lost.
    """
    finite = tl.abs(x.to(tl.float32)) < INF
    bad = 1 - tl.min(tl.min(finite.to(tl.int32), 1), 0)
    return tl.where(finite, x, tl.zeros_like(x)), bad


@triton.jit
def unleash(
    acc, at, lo, hi, n_rows, n_keys, base, x, scores, place, rope,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, table=None,
):  # fmt: skip
    """acc + every NaN and infinity of x[lo .. hi) that position ``at`` of the other side sees.

    acc [BLOCK, WIDTH]; at [BLOCK]. KEYS: x holds keys, ``at`` are rows; else the other way round.
    rope: None unless rows of x are turned. table: of x in pages, see ``walk``.
    One row of x at a time: this runs where ``tame`` found something, and costs hot loops nothing.
    Between lo and hi there may be whole tiles, whose infinities are in acc already: once more is
    the same.
    """
    columns = tl.arange(0, WIDTH)
    if scores.hides is not None:
        at = at[:, None]  # of the head in a decode's place
    for n in tl.range(lo, hi):
        if table is not None:
            slots = load_slots(base, locate(table, place[0], n, hi, 1), x, WIDTH, SIZE)
            value = tl.reshape(slots, [WIDTH]).to(tl.float32)
        elif rope is None:
            row = base + tl.cast(n, tl.int64) * x.row + columns
            value = widened(tl.load(row, mask=columns < SIZE, other=0.0)).to(tl.float32)
        else:
            turned = load_turned(base, n, n + 1, x, rope, place, not KEYS, 1, WIDTH, SIZE, False)
            value = tl.reshape(turned, [WIDTH]).to(tl.float32)
        wild = tl.where(tl.abs(value) < INF, 0.0, value)
        if KEYS:
            visible = seen(at, n, n_rows, n_keys, scores, place)
        else:
            visible = seen(n, at, n_rows, n_keys, scores, place)
        if scores.hides is None:
            visible = visible[:, None]
        acc += tl.where(visible, wild[None, :], 0.0)
    return acc


@triton.jit
def row_lse(lse, b, h, first_row, rows, n_rows):
    """Base-2 LSE of rows of the forward, +inf for rows without probabilities: exp2(s - it) is 0."""
    stat = tl.load(stat_ptr(lse, b, h, first_row) + rows, mask=rows < n_rows, other=-INF)
    return tl.where(stat == -INF, INF, stat * LOG2E)


@triton.jit
def start_state(scores, h, BLOCK_M: tl.constexpr):
    """(top, total) before any key: a sink is a key of value 0 that every row of head ``h`` sees."""
    top, total = start_total(scores, BLOCK_M)
    if scores.sinks is not None:
        top = total + tl.load(scores.sinks + h) * LOG2E
        total = tl.where(top == -INF, 0.0, 1.0)
    return top, total


@triton.jit
def attend(
    state, q, rows, slope, lo, hi, n_rows, n_keys, k, v, k_head, v_head, scores, place,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, tail=None, boxes=None, table=None,
):  # fmt: skip
    """Online softmax over the key tiles from ``lo`` to ``hi``: the state after them.

    State: top, total [BM], acc [BM, BLOCK_DV] fp32, and whether ``tame`` found anything. q
    [BM, BLOCK_D]; rows [BM] are positions in the sequence. Unless MASKED, every row sees every key.
    tail: q's channels [BM, D - BLOCK_D] from BLOCK_D on, where D is larger. boxes: descriptors of K
    and V, table: of their pages, see ``walk``.
    """
    top, total, acc, bad = state
    shift = n_keys - n_rows
    if table is not None:
        q_sums = channel_sums(q, tail)
    for start in tl.range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if table is not None:
            found = locate(table, place[0], start, n_keys, BLOCK_N)
            k_tile = load_slots(k_head, found, k, BLOCK_D, D)
        elif boxes is None:
            k_tile = load_turned(
                k_head, start, n_keys, k, scores.rope, place, False, BLOCK_N, BLOCK_D, D, not MASKED
            )
        else:
            k_tile = boxes[0].load([start, 0])
        k_tile = k_tile.to(q.dtype)  # another beside fp8 keys and codes alone
        s = dot(q, k_tile.T, tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if tail is not None:
            if table is not None:
                rest = load_slots(k_head, found, k, D - BLOCK_D, D - BLOCK_D, BLOCK_D)
            else:
                rest = load_tile(
                    k_head + BLOCK_D, start, n_keys, k, BLOCK_N, D - BLOCK_D, D - BLOCK_D,
                    not MASKED,
                )  # fmt: skip
            s = dot(tail, rest.to(q.dtype).T, s)
        if table is not None:
            s = decoded_products(s, q_sums, found, k, place[6])
        s, _ = logits(s, rows[:, None], keys[None, :], shift, slope, scores, place)
        if MASKED:
            visible = seen(rows[:, None], keys[None, :], n_rows, n_keys, scores, place)
            if table is not None:
                visible = visible & found[2][None, :]
            s = tl.where(visible, s, -INF)
        elif table is not None:
            s = tl.where(found[2][None, :], s, -INF)
        p, alpha, top, total = weigh(s, top, total, scores)
        p = drop(p, rows[:, None], keys[None, :], scores, place)
        acc = acc * alpha[:, None]
        if table is not None:
            if v.of_k:
                v_tile = k_tile
            else:
                v_tile = load_slots(v_head, found, v, BLOCK_DV, DV)
        elif boxes is None:
            v_tile = load_tile(v_head, start, n_keys, v, BLOCK_N, BLOCK_DV, DV, not MASKED)
        else:
            v_tile = boxes[1].load([start, 0])
        v_tile = v_tile.to(q.dtype)
        if MASKED:
            v_tile, wild = tame(v_tile)
            bad = bad | wild
        if table is not None:
            if MASKED:
                acc = add_values(acc, p, v_tile, found, v, place[6], visible)
            else:
                acc = add_values(acc, p, v_tile, found, v, place[6], None)
        else:
            acc = dot(p.to(v_tile.dtype), v_tile, acc)
    return top, total, acc, bad


@triton.jit
def walk(
    q, rows, slope, before, ranges, n_rows, n_keys, k, v, k_head, v_head, scores, place,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, tail=None, USE_TMA: tl.constexpr = 0, table=None,
):  # fmt: skip
    """(top, total, acc) after all keys that the rows see.

    ranges: (lo, whole_lo, whole_hi, hi) from ``key_range``; before: (top, total) from
    ``start_state``; tail: see ``attend``. USE_TMA: tiles of K and V come by descriptors, which need
    base and strides in multiples of 16 bytes and know no rope. The results are the same. table: a
    Table, if K and V are ``Pages``; None: they are Views.
    """
    boxes = None
    if USE_TMA:
        k_box = tl.make_tensor_descriptor(
            k_head, shape=[n_keys, D], strides=[k.row, 1], block_shape=[BLOCK_N, BLOCK_D]
        )
        v_box = tl.make_tensor_descriptor(
            v_head, shape=[n_keys, DV], strides=[v.row, 1], block_shape=[BLOCK_N, BLOCK_DV]
        )
        boxes = (k_box, v_box)
    lo, whole_lo, whole_hi, hi = ranges
    top, total = before
    state = (top, total, tl.zeros([q.shape[0], BLOCK_DV], tl.float32), 0)
    if scores.front is not None:
        state = attend(
            state, q, rows, slope, lo, whole_lo, n_rows, n_keys, k, v, k_head, v_head, scores,
            place, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, tail, boxes, table,
        )  # fmt: skip
    state = attend(
        state, q, rows, slope, whole_lo, whole_hi, n_rows, n_keys, k, v, k_head, v_head, scores,
        place, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, tail, boxes, table,
    )  # fmt: skip
    top, total, acc, bad = attend(
        state, q, rows, slope, whole_hi, hi, n_rows, n_keys, k, v, k_head, v_head, scores,
        place, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, tail, boxes, table,
    )  # fmt: skip
    if bad != 0:
        acc = unleash(
            acc, rows, lo, hi, n_rows, n_keys, v_head, v, scores, place, None, BLOCK_DV, DV, True,
            table,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def result(top, total, acc, scores, place):
    """``finished``, times the descale of the KV head's values if they have one."""
    out, lse = finished(top, total, acc)
    if scores.mods.v_descale is not None:
        out = out * descale(scores.mods.v_descale, scores.mods, place)
    return out, lse


@triton.jit
def finished(top, total, acc):
    """(O, natural LSE) of finished sums; a row that saw nothing has 0 and -inf."""
    out = tl.where(total[:, None] == 0.0, 0.0, acc / total[:, None])
    return out, (top + tl.log2(total)) * LN2
