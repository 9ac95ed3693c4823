"""Paged attention: new rows of sequences over keys that a block table says where to find.

Algorithm: that of ``flash.decode``. The rows of a tile are the query rows of all heads that share a
KV head, position by position, so that pages are read once for the group; a long cache is cut into
splits whose states ``flash.merge`` adds up; tiles of keys come from the store in ``pages``. Decode,
chunks of a prefill, and mixtures are one call of up to three launches, each of which takes the
sequences whose number of rows lies in its range, with a tile and splits for them. So how a sequence
is computed depends on its own rows and keys alone. A plan (``pieces``) cuts keys in its own way, of
decode and of more rows alike where they are split.

Tiling: grid (splits * row tiles * KV heads * batch), or as many pieces as a plan has room for in
place of splits and batch; programs of rows that a sequence does not have, or of no piece, leave at
once.

Cost: 2 (D + Dv) flops per visible pair; each used page is read once per row tile and KV head, K and
V together where V is a part of K's channels (MLA). Bound by memory for few rows.

Limits: as ``flash.decode``. Source: PagedAttention (Kwon et al., 2023) for the layout, Flash-
Decoding (Dao et al., 2023) for the splits; the code is our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.flash.decode import in_split, load_rows, start_split, store_rows
from attnforge.triton_kernels.flash.merge import part_first
from attnforge.triton_kernels.lang import key_range, packed_span, result, slope_of, walk
from attnforge.triton_kernels.pieces import in_piece, owner
from attnforge.triton_kernels.tensors import head_ptr, stat_ptr


@triton.jit(do_not_specialize=[
    "seq_rows", "scores", "splits", "split_keys", "fewest", "most", "tiles", "pieces"
])  # fmt: skip
def fwd(
    q, k, v, table, lengths, out, lse, part_out, part_lse, cu_rows, seq_rows, scores, heads, group,
    splits, split_keys, fewest, most, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, pieces=None,
):  # fmt: skip
    """q and out are Views, k and v Pages, lse and lengths (int32 keys per KV head) Stats.

    cu_rows, seq_rows: see ``packed_span``. fewest, most: sequences of so many rows are served.
    out, lse, part_out, part_lse, splits, split_keys: see ``flash.decode``; a workspace of packed
    rows is packed as well, or a batch of the first rows (``part_first``). pieces: a Pieces, then
    there is a workspace, whose parts are the first rows of each piece's sequence, and no sink yet.
    """
    pid = tl.program_id(0)
    split = pid % splits
    tile = pid // splits % tiles
    h = pid // splits // tiles % heads
    b = pid // splits // tiles // heads
    if pieces is not None:
        b, owned = owner(pieces, split)
    first_row, n_rows = packed_span(cu_rows, seq_rows, b)
    if pieces is not None:
        n_rows = tl.where(owned, n_rows, 0)
    if (n_rows < fewest) | (n_rows > most) | (tile * BLOCK_M >= n_rows * group):
        return
    room = table.width * table.size
    n_keys = tl.minimum(tl.maximum(tl.load(stat_ptr(lengths, b, h, 0)), 0), room)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = packed // group
    real = packed < n_rows * group
    head = tl.where(real, h * group + packed % group, 0)

    place = (b, head[:, None], first_row, 0, n_rows, n_keys, h)
    first = tile * BLOCK_M // group
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, n_rows - 1)
    ranges = key_range(rows[:, None], first, last, n_rows, n_keys, scores, place, BLOCK_N)
    if pieces is None:
        ranges = in_split(ranges, split, splits, split_keys, n_keys, BLOCK_N)
    else:
        ranges = in_piece(ranges, pieces, split, n_keys, BLOCK_N)
    before = start_split(scores, head, split, BLOCK_M)
    slope = slope_of(scores, b, head)
    if scores.slopes is not None:
        slope = slope[:, None]
    q_rows = head_ptr(q, b, head, first_row + rows)
    q_tile = load_rows(q_rows, real, 0, D, BLOCK_D)
    tail = None
    if D > BLOCK_D:
        tail = load_rows(q_rows, real, BLOCK_D, D, D - BLOCK_D)
    k_head = k.ptr + tl.cast(h, tl.int64) * k.head
    v_head = v.ptr + tl.cast(h, tl.int64) * v.head
    top, total, acc = walk(
        q_tile, rows, slope, before, ranges, n_rows, n_keys, k, v, k_head, v_head, scores, place,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, tail, 0, table,
    )  # fmt: skip
    o, stat = result(top, total, acc, scores, place)
    at = part_first(out, first_row) + rows
    if pieces is not None:
        at = rows
    o_rows, l_rows = head_ptr(out, b, head, at), stat_ptr(lse, b, head, at)
    store_rows(o, stat, o_rows, l_rows, real, part_out, part_lse, split, DV)
