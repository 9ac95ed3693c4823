"""``triton.retrieval.*``: the Triton kernels of ``triton_kernels/retrieval``.

Tiles of a forward are those of pages, whose keys have pointers of their own too. Nothing here waits
for the device: sizes of grids follow from shapes, lengths are read by the programs.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import FlashTape, IndexedGrads, IndexedParams, SelectParams
from attnforge.backends import _gpu
from attnforge.backends._key_lists import naming
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import padded
from attnforge.backends.triton._flash_tiles import sizes as sizes_of
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.block_sparse import _inverse
from attnforge.backends.triton.flash import (
    _COMMON,
    _LOG2E,
    _contiguous,
    _DecodeDims,
    _delta,
    _merge,
    _on,
    _stat,
    _tiles,
    _unit,
    _view,
)
from attnforge.backends.triton.paged import _stored, _table
from attnforge.registry.predicates import Dim, Features
from attnforge.registry.spec import KernelSpec, Predicate
from attnforge.triton_kernels.paged import config as paged_tiles

__all__ = ["SPECS"]

_KEYS = 64  # of a tile of scores
_KINDS = ("topk", "threshold", "topp")  # as the kernel numbers them
_SIGNS = 64  # of a row in a tile of products
_TABLES = 8  # whose buckets a program goes over
_PLACES = 1024  # of a table that a program fills
_SORTED = 1 << 24  # codes of one sort: 12 bytes each, and what the sort needs beside them
_HITS = 32  # that a program weighs: a tile of 256 channels is 64 registers of a thread


@cache  # kernels of a process never change
def _kernel(module: str, name: str) -> Any:
    """A kernel by name; importing Triton waits for the first launch."""
    if _settings.triton_interpreted():
        _interpreter.repair()
    return getattr(importlib.import_module(f"attnforge.triton_kernels.retrieval.{module}"), name)


# ---- attention to listed keys ----


def _pack(q: Tensor, k: Tensor, p: IndexedParams) -> int:
    """Query heads that share a list and a KV head."""
    return 1 if p.ids.shape[1] == q.shape[2] else q.shape[2] // k.shape[2]


def _lists(q: Tensor, k: Tensor, p: IndexedParams) -> Any:
    batch, heads, slots = p.ids.shape
    room = k.shape[1] if p.block_table is None else p.block_table.shape[1] * k.shape[1]
    return _kernel("lists", "KeyLists")(
        ids=p.ids.contiguous(),
        lens=_contiguous(p.lens),
        bias=_contiguous(p.log_bias),
        batch=heads if batch > 1 else 0,
        head=1 if heads > 1 else 0,
        slots=slots,
        used=_contiguous(p.cache_seqlens),
        room=room,
        rows=q.shape[1],
        pack=_pack(q, k, p),
        group=q.shape[2] // k.shape[2],
    )


def _rows_tile(sizes: dict[str, Any], rows: int) -> dict[str, Any]:
    """A tile cut down to so many rows. Rows and keys have pointers of their own: wide tiles
    spill."""
    sizes["BLOCK_M"] = min(sizes["BLOCK_M"], max(16, 1 << (rows - 1).bit_length()))
    if max(sizes["BLOCK_D"], sizes["BLOCK_DV"]) > 128:
        sizes |= {"BLOCK_M": min(sizes["BLOCK_M"], 64), "BLOCK_N": min(sizes["BLOCK_N"], 32)}
    return sizes


def indexed_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``indexed_fwd``. A forward of a backward, which wants out_lo, has no splits."""
    if out.numel() == 0:
        return
    low = out_lo if out_lo.dim() > 1 else None
    q, pack = _unit(q), _pack(q, k, p)
    heads, rows = q.shape[2] // pack, q.shape[1] * pack
    few = rows <= paged_tiles.FEW
    sizes = _rows_tile(sizes_of("few" if few else "many", q, v, tables=paged_tiles), rows)
    tiles = _tiles(rows, sizes["BLOCK_M"])
    splits = _gpu.entry_splits(p.ids.shape[2], rows) if low is None else 1
    values, stats = out, lse
    if splits > 1:
        values = out.new_empty((splits, *out.shape), dtype=torch.float32)
        stats = lse.new_empty((splits, *lse.shape))
    first = (values, stats) if splits == 1 else (values[0], stats[0])
    with _on(q.device):
        _kernel("indexed_fwd", "indexed_fwd")[(splits * tiles * heads * q.shape[0],)](
            _view(q), _stored(_unit(k), None, None), _stored(_unit(v), None, None),
            None if p.block_table is None else _table(p.block_table, k),
            _view(first[0]), None if low is None else _view(low), _stat(first[1]),
            None if splits == 1 else values.stride(0), None if splits == 1 else stats.stride(0),
            _lists(q, k, p), p.softmax_scale * _LOG2E, heads, splits, _gpu.ENTRIES, tiles,
            **sizes,
        )  # fmt: skip
        if splits > 1:
            _merge(values, stats, out, lse)


def indexed_bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: IndexedParams, grads: IndexedGrads
) -> None:
    """Launcher of ``indexed_bwd``; a list that all KV heads share gets the sum of its parts."""
    q, k, v, out, dout = map(_unit, (tape.q, tape.k, tape.v, tape.out, dout))
    if q.numel() == 0 or k.numel() == 0 or p.ids.numel() == 0:
        for x in grads:
            x.zero_()
        return
    lse = tape.lse.contiguous()
    low = _unit(tape.out_lo) if tape.out_lo.dim() > 1 else None
    (batch, keys, heads_kv, _), slots, pack = k.shape, p.ids.shape[2], _pack(q, k, p)
    heads, rows = q.shape[2] // pack, q.shape[1] * pack
    dbias = None
    if p.log_bias is not None:  # nothing is written behind the end of a list
        dbias = p.log_bias.new_zeros((batch, heads, slots))
    room = [x.new_empty((batch, heads, slots, x.shape[-1]), dtype=torch.float32) for x in (k, v)]
    by_head, by_key = (
        [_view(x.view(batch, h, -1, x.shape[-1]).transpose(1, 2)) for x in room]
        for h in (heads, heads_kv)
    )
    stored = (_stored(k, None, None), _stored(v, None, None))
    scales = (p.softmax_scale * _LOG2E, p.softmax_scale)
    with _on(q.device):
        delta = torch.empty_like(lse)
        _delta(dout, out, low, dlse, lse, delta)
        stats = (_stat(lse), _stat(delta), _lists(q, k, p), *scales, heads)
        sizes = _rows_tile(sizes_of("dq", q, v), rows)
        tiles = _tiles(rows, sizes["BLOCK_M"])
        _kernel("indexed_bwd", "dq")[(tiles * heads * batch,)](
            _view(q), *stored, _view(dout), _view(grads.dq), *stats, tiles, **sizes
        )
        sizes = {**sizes_of("dkdv", q, v), "BLOCK_M": 16}  # rows stream; more of them spill
        tiles = _tiles(slots, sizes["BLOCK_N"])
        _kernel("indexed_bwd", "entries")[(tiles * heads * batch,)](
            _view(q), *stored, _view(dout), *by_head, dbias, *stats, tiles, **sizes
        )
        inverse = _inverse(naming(k, p))
        sizes = _of_keys(sizes)
        tiles = _tiles(keys, sizes["BLOCK_N"])
        _kernel("indexed_bwd", "keys")[(tiles * heads_kv * batch,)](
            *by_key, _view(grads.dk), _view(grads.dv), inverse, keys, heads_kv, tiles, **sizes
        )
    if dbias is not None:
        shared = p.ids.shape[1] == 1
        grads.dlog_bias.copy_(dbias.sum(1, keepdim=True) if shared else dbias)


def _of_keys(sizes: dict[str, Any]) -> dict[str, Any]:
    """The constants of the sums over entries: 4096 elements of the wider of K and V."""
    names = ("D", "DV", "BLOCK_D", "BLOCK_DV")
    width = max(sizes["BLOCK_D"], sizes["BLOCK_DV"])
    return {**{n: sizes[n] for n in names}, "BLOCK_N": 4096 // width, "num_warps": 4}


# ---- scores ----


def key_scores(
    q: Tensor, k: Tensor, block_table: Tensor | None, cache_seqlens: Tensor | None,
    counts: Tensor | None, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``key_scores``; counts make a second launch."""
    if out.numel() == 0:
        return
    batch, rows, heads_q, dim = q.shape
    heads, columns = k.shape[2], out.shape[3]
    group = heads_q // heads
    table = None if block_table is None else _table(block_table, k)
    # Rows of one tile share what is read: as many as there are, up to what a tensor core likes.
    block_m = max(16, min(64, 1 << (rows * group - 1).bit_length()))
    block_d = min(128, padded(dim))
    tiles, row_tiles = _tiles(columns, _KEYS), _tiles(rows * group, block_m)
    with _on(q.device):
        _kernel("scores", "key_scores")[(tiles * row_tiles * heads * batch,)](
            _view(_unit(q)), _stored(_unit(k), None, None), table, out, _contiguous(cache_seqlens),
            columns, scale, rows, heads, group, tiles, row_tiles,
            D=dim, BLOCK_M=block_m, BLOCK_N=_KEYS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        if counts is not None:
            _kernel("scores", "shares")[(batch * heads_q * rows,)](
                out, counts.contiguous(), columns, group * rows, BLOCK=_columns(columns),
                num_warps=4,
            )  # fmt: skip


def page_scores(
    q: Tensor, low: Tensor, high: Tensor, page_scale: None, block_table: Tensor | None,
    used: Tensor | None, scale: float, grouped: bool, out: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``page_scores``; the largest of a group is a second launch."""
    if out.numel() == 0:
        return
    batch, rows, heads_q, dim = q.shape
    heads, columns = low.shape[-2], out.shape[3]
    if grouped:
        each = out.new_empty((batch, heads_q, rows, columns))
        page_scores(q, low, high, None, block_table, used, scale, False, each)
        _gpu.top_of_groups(each, out)
        return
    width = padded(dim) if dim <= 512 else 1024
    block = 4096 // width  # the two bounds of a page: 64 registers of a thread
    tiles = _tiles(columns, block)
    table = None if block_table is None else _unit(block_table)
    with _on(q.device):
        _kernel("scores", "page_scores")[(tiles * heads * batch,)](
            _view(_unit(q)), _view(_unit(low)), _view(_unit(high)), table,
            0 if table is None else table.stride(0), low.shape[0], out, _contiguous(used), columns,
            scale, rows, heads, heads_q // heads, tiles,
            D=dim, BLOCK_N=block, BLOCK_D=width, num_warps=4,
        )  # fmt: skip


# ---- selections ----


def _columns(columns: int) -> int:
    """Columns of a row that a program takes at a time."""
    return min(4096, max(128, 1 << (columns - 1).bit_length()))


def select_columns(
    scores: Tensor, used: Tensor | None, p: SelectParams, ids: Tensor, lens: Tensor
) -> None:
    """Launcher of ``select_columns``; all of the softmax is every column that has a rank."""
    rows, columns = scores.shape
    if rows == 0:
        return
    kind, threshold = p.kind, p.threshold
    if kind == "topp" and p.mass >= 1.0:
        kind, threshold = "threshold", scores.new_full((1,), -torch.inf)
    each = 0 if threshold is None or threshold.numel() == 1 else 1
    block = _columns(columns)
    with _on(scores.device):
        _kernel("select", "select_columns")[(rows,)](
            scores.contiguous(), _contiguous(used), _contiguous(threshold), each, ids, lens,
            columns, ids.shape[1], p.k, round(min(p.mass, 1.0) * 2**60), p.first, p.last,
            KIND=_KINDS.index(kind), BLOCK=block, num_warps=8 if block > 1024 else 4,
        )  # fmt: skip


# ---- LSH ----


def lsh_encode(x: Tensor, mean: Tensor | None, planes: Tensor, bits: int, codes: Tensor) -> None:
    """Launcher of ``lsh_encode``."""
    if bits == 0:  # one bucket
        codes.zero_()
    if codes.numel() == 0 or bits == 0:
        return
    batch, rows, heads, dim = x.shape
    wide = 1 << (bits - 1).bit_length()
    block_m = max(16, min(32, 1 << (rows - 1).bit_length()))
    tables = codes.shape[3]
    tiles, table_tiles = _tiles(rows, block_m), _tiles(tables, _SIGNS // wide)
    with _on(x.device):
        _kernel("lsh", "lsh_encode")[(table_tiles * tiles * heads * batch,)](
            _view(_unit(x)), _contiguous(mean), planes.contiguous(), codes, rows, heads, bits,
            tables, tiles, table_tiles, D=dim, BITS=wide, TABLES=_SIGNS // wide, BLOCK_M=block_m,
            BLOCK_D=min(32, padded(dim)), num_warps=4,
        )  # fmt: skip


def _sorted_codes(
    codes: Tensor, first: Tensor, count: Tensor, segments: int, segment: int, bits: int
) -> tuple[Tensor, Tensor]:
    """Rows of codes [B, H, rows, L] by segment and code, and where those of each begin.

    int32 [B, H, L, rows] and [B, H, L, segments * buckets + 1]; rows that name no key come last.
    """
    row = torch.arange(codes.shape[2], device=codes.device, dtype=torch.int32)
    key = first.view(-1, 1) + row
    real = (row < count.view(-1, 1)) & (key < segments * segment)
    group = (key // segment << bits).masked_fill(~real, segments << bits)  # [B, rows]
    own = codes.transpose(2, 3).contiguous().int() & ((1 << bits) - 1)
    own = torch.where(real[:, None, None], own, 0) + group[:, None, None]
    numbers, order = own.sort(dim=-1, stable=True)
    bounds = torch.arange((segments << bits) + 1, device=codes.device, dtype=torch.int32)
    bounds = bounds.expand(*numbers.shape[:3], -1).contiguous()
    return order.int(), torch.searchsorted(numbers, bounds, out_int32=True)


def _copy(x: Tensor) -> Tensor:
    """In one piece, and another one, whatever ``x`` is."""
    return x.clone(memory_format=torch.contiguous_format)


def _place(starts: Tensor, ids: Tensor, old: tuple[Tensor, Tensor], new: tuple[Any, ...],
           first_table: int, bits: int) -> None:  # fmt: skip
    """Puts ids of some tables, from ``first_table`` on, to where their new starts say."""
    batch, heads, segments, tables, segment = ids.shape
    chunk, tiles = old[1].shape[3], _tiles(segment, _PLACES)
    fresh = new[0]
    _kernel("tables", "place_ids")[(batch * heads * segments * chunk * tiles,)](
        *old, starts, ids, *new, heads, segments, tables, segment, first_table, chunk,
        0 if fresh is None else fresh.shape[3], tiles, BITS=bits, BLOCK=_PLACES, num_warps=4,
    )  # fmt: skip


def lsh_insert(
    starts: Tensor, ids: Tensor, bits: int, codes: Tensor, first: Tensor, count: Tensor
) -> None:
    """Launcher of ``lsh_insert``: so many tables at a time that a sort has 2^24 codes at most."""
    batch, heads, segments, tables, segment = ids.shape
    rows = codes.shape[2]
    if ids.numel() == 0 or rows == 0:
        return
    step = max(1, _SORTED // (batch * heads * rows))
    with _on(ids.device):
        for at in range(0, tables, step):
            some = slice(at, at + step)
            old = _copy(starts[:, :, :, some]), _copy(ids[:, :, :, some])
            fresh, begins = _sorted_codes(codes[..., some], first, count, segments, segment, bits)
            added = begins.unfold(-1, (1 << bits) + 1, 1 << bits)  # by segment
            added = (added - added[..., :1]).transpose(2, 3)
            starts[:, :, :, some] += added
            _place(starts, ids, old, (fresh, begins, first.contiguous()), at, bits)


def lsh_truncate(starts: Tensor, ids: Tensor, bits: int, length: Tensor) -> None:
    """Launcher of ``lsh_truncate``."""
    batch, heads, segments, tables, segment = ids.shape
    if ids.numel() == 0:
        return
    buckets = 1 << bits
    block = min(256, buckets)
    step = max(1, _SORTED // (batch * heads * segments * segment))
    with _on(ids.device):
        for at in range(0, tables, step):
            some = slice(at, at + step)
            old = _copy(starts[:, :, :, some]), _copy(ids[:, :, :, some])
            chunk, tiles = old[1].shape[3], _tiles(buckets, block)
            sizes = starts.new_empty((batch, heads, segments, chunk, buckets))
            _kernel("tables", "kept_sizes")[(batch * heads * segments * chunk * tiles,)](
                *old, length.contiguous(), sizes, heads, segments, chunk, segment, tiles,
                BITS=bits, BLOCK=block, num_warps=4,
            )  # fmt: skip
            starts[:, :, :, some, 1:] = sizes.cumsum(-1)
            _place(starts, ids, old, (None, None, length), at, bits)


def lsh_retrieve(
    starts: Tensor, table_ids: Tensor, bits: int, codes: Tensor, q: Tensor, k: Tensor,
    mean: Tensor | None, norms: Tensor, begin: Tensor, end: Tensor, min_hits: int, clip: float,
    ids: Tensor, lens: Tensor, log_bias: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``lsh_retrieve``: hits are counted, collected, weighed."""
    lens.zero_()
    if ids.numel() == 0:
        return
    batch, heads, segments, tables, segment = table_ids.shape
    heads_q, keys = ids.shape[1:]
    lsh = _kernel("lsh", "Tables"), _kernel("lsh", "Query")
    stored = lsh[0](starts, table_ids, heads, segments, tables, segment, 1 << bits)
    query = lsh[1](*map(_contiguous, (begin, end)), keys, heads_q, heads_q // heads)
    counts = torch.zeros(ids.shape, dtype=torch.int32, device=ids.device)
    chunks, tiles = _tiles(tables, _TABLES), _tiles(keys, _HITS)
    with _on(q.device):
        _kernel("lsh", "count_hits")[(chunks * segments * heads_q * batch,)](
            stored, codes.contiguous(), query, counts, chunks, CHUNK=_TABLES, BLOCK=128, num_warps=4
        )
        block = _columns(keys)
        _kernel("lsh", "collect")[(heads_q * batch,)](
            counts, query, ids, lens, min_hits, BLOCK=block, num_warps=8 if block > 1024 else 4
        )
        _kernel("lsh", "weigh")[(tiles * heads_q * batch,)](
            _view(_unit(q)), _view(_unit(k)), _contiguous(mean), norms.contiguous(),
            norms.shape[2], query, ids, lens, log_bias, bits, tables, min_hits, clip, tiles,
            D=k.shape[3], BLOCK_N=_HITS, BLOCK_D=padded(k.shape[3]), num_warps=4,
        )  # fmt: skip


def _spec(kind: str, requires: tuple[Predicate, ...], notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.retrieval.{kind}",
        op=kind,
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(*requires, _COMMON[-1], SelfTest(f"retrieval.{kind}")),
        score=50.0,
        notes=notes,
    )


_FLOATS = _COMMON[:2]
_WIDE = (*_FLOATS, Dim("head_dim", 8, 576, 8), Features("paged", "seqused_k"))
_HASHED = (*_FLOATS, Dim("head_dim", 8, 256, 8))
_CODES = _COMMON[:1]  # of codes, whatever the dtype of keys is

SPECS = (
    _spec(
        "indexed_fwd",
        (*_FLOATS, _DecodeDims(), Features("paged", "seqused_k")),
        "rows that share a list in a tile, fixed splits over its entries",
    ),
    _spec(
        "indexed_bwd",
        (*_COMMON[:4], Features("seqused_k")),
        "dQ over lists, dK and dV summed over the entries of each key; no atomics",
    ),
    _spec("key_scores", _WIDE, "a product of tiles, keys read once per group"),
    _spec("page_scores", _WIDE, "bounds in registers, one row after the other"),
    _spec("select_columns", _FLOATS, "bisection of the scores' bits, no sort; a program per row"),
    _spec("lsh_encode", _HASHED, "signs taken from the tiles of a product"),
    _spec("lsh_insert", _CODES, "a stable sort of the new codes; places filled by bisection"),
    _spec("lsh_truncate", _CODES, "buckets end where bisection says; places filled by bisection"),
    _spec("lsh_retrieve", _HASHED, "a counter per key, a scan, probabilities of the hits"),
)
