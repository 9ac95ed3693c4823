"""``triton.paged.*``: the Triton kernels of ``triton_kernels/paged``.

A forward is up to three launches of one kernel, each for the sequences of some numbers of rows: a
few rows and long splits, more rows and longer splits, many rows and none; a plan of the splits
holds for the first two. Which sequence belongs where is decided on the device, from the boundaries
alone, and so is what a plan says.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import (
    FLOAT8,
    KV_CODES,
    FlashMods,
    FlashParams,
    PagedCache,
    PagedParams,
    PagedWrite,
)
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import padded, space
from attnforge.backends.triton._flash_tiles import sizes as sizes_of
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import (
    _COMMON,
    _contiguous,
    _DecodeDims,
    _merge,
    _on,
    _scores,
    _stat,
    _tensors,
    _tiles,
    _unit,
    _view,
)
from attnforge.reference.paged import cascade_parts
from attnforge.registry.predicates import Dim, Features
from attnforge.registry.space import Config, SearchSpace
from attnforge.registry.spec import KernelSpec, Request
from attnforge.triton_kernels.paged import config as tiles_of

__all__ = ["SPECS"]

_SOME = 64  # rows of a sequence whose keys are split


class _Splits(NamedTuple):
    """Keys of a split, for sequences of few rows and of some."""

    few: int = 2048
    some: int = 8192


@cache  # kernels of a process never change
def _kernel(module: str, name: str) -> Any:
    """A kernel by name; importing Triton waits for the first launch."""
    if _settings.triton_interpreted():
        _interpreter.repair()
    return getattr(importlib.import_module(f"attnforge.triton_kernels.paged.{module}"), name)


@cache
def _pages() -> Any:
    return importlib.import_module("attnforge.triton_kernels.pages")


@cache
def _constant(value: int) -> Any:
    """A compile-time constant inside a tuple; the interpreter knows those as arguments alone."""
    if _settings.triton_interpreted():
        return value
    return importlib.import_module("triton.language").constexpr(value)


def _step(x: Tensor, dim: int) -> int:
    return x.stride(dim) if x.shape[dim] > 1 else 0


def _stored(x: Tensor, scale: Tensor | None, zero: Tensor | None, of_k: bool = False) -> Any:
    """Pages of [P, page_size, Hk, X] with their scales and zeros [P|1, page_size|1, Hk]."""
    pairs = x.dtype is torch.uint8
    scale, zero = _contiguous(scale), _contiguous(zero)
    return _pages().Pages(
        ptr=x.view(torch.uint8) if x.dtype is FLOAT8 else x,
        page=x.stride(0),
        row=x.stride(1),
        head=x.stride(2),
        pairs=_constant(int(pairs)),
        of_k=_constant(int(of_k)),
        scale=scale,
        zero=zero,
        scale_page=None if scale is None else _step(scale, 0),
        scale_row=None if scale is None else _step(scale, 1),
    )


def _table(table: Tensor, k: Tensor) -> Any:
    """A Table of pages k [P, page_size, Hk, X]."""
    table = _unit(table)
    pages, size = k.shape[:2]
    return _pages().Table(table, table.stride(0), table.shape[1], pages, _constant(size))


def _store(c: PagedCache, dims: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """K, V, the table and the lengths of a cache; dims: of K and V."""
    k, v = c.k_pages, c.v_pages
    of_k = c.latent and padded(dims[0]) == padded(dims[1])
    lengths = c.cache_seqlens.contiguous()
    batch, head = lengths.stride() if lengths.dim() == 2 else (1, 0)
    return (
        _stored(k, c.k_scale, c.k_zero),
        _stored(v, c.v_scale, c.v_zero, of_k),
        _table(c.block_table, k),
        _tensors().Stat(lengths, batch, head),
    )


def _pieces(p: PagedParams, batch: int) -> Any:
    """The Pieces of a call with a plan."""
    plan, first = _contiguous(p.split_pieces), _contiguous(p.split_first)
    if plan is None:
        return None
    kind = importlib.import_module("attnforge.triton_kernels.pieces").Pieces
    return kind(*plan, first, plan.shape[1], batch)


class _Launch(NamedTuple):
    """Sequences of ``fewest`` to ``most`` rows, and how they are computed."""

    kernel: str  # of the table of tiles
    fewest: int
    most: int
    split: int  # keys of a split; 0: all keys


def _launches(longest: int, packed: bool, group: int, splits: _Splits) -> list[_Launch]:
    """What serves sequences of up to ``longest`` rows, or, unless packed, of just so many."""
    few = max(1, tiles_of.FEW // group)
    plan = [
        _Launch("few" if group <= tiles_of.FEW else "many", 1, few, splits.few),
        _Launch("many", few + 1, _SOME, splits.some),
        _Launch("many", max(few, _SOME) + 1, longest, 0),
    ]
    least = 1 if packed else longest
    return [x for x in plan if max(x.fewest, least) <= min(x.most, longest)]


def fwd(
    q: Tensor, cache: PagedCache, p: PagedParams, out: Tensor, lse: Tensor,
    *, config: Config | None = None,
) -> None:  # fmt: skip
    """Launcher of ``paged_fwd``."""
    _forward(q, cache, p, out, lse, _Splits(), config)


def _forward(
    q: Tensor, cache: PagedCache, p: PagedParams, out: Tensor, lse: Tensor, splits: _Splits,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Fill out and lse; ``splits`` holds unless the caller wants a number of them."""
    packed = p.cu_seqlens_q is not None
    if packed:  # rows of no sequence
        out.zero_()
        lse.fill_(-math.inf)
    if out.numel() == 0:
        return
    group = q.shape[-2] // cache.k_pages.shape[2]
    with _on(q.device):
        for launch in _launches(p.max_seqlen_q, packed, group, splits):
            _launch(launch, _unit(q), cache, p, out, lse, config)


def _launch(
    launch: _Launch, q: Tensor, cache: PagedCache, p: PagedParams, out: Tensor, lse: Tensor,
    config: Config | None,
) -> None:  # fmt: skip
    dims = (q.shape[-1], out.shape[-1])
    heads, heads_kv = q.shape[-2], cache.k_pages.shape[2]
    group, batch = heads // heads_kv, cache.block_table.shape[0]
    heavy = p.mask is not None or cache.k_pages.dtype in KV_CODES
    values_like = q.new_empty((0, out.shape[-1]))  # a part of a cascade is fp32
    sizes = sizes_of(launch.kernel, q, values_like, heavy, config, tables=tiles_of)
    sizes["num_stages"] = tiles_of.stages(sizes, cache.page_size)
    keys, most = max(1, cache.capacity), min(launch.most, p.max_seqlen_q)
    splits = _tiles(keys, launch.split) if launch.split else 1
    if p.num_splits > 0 and launch.split:  # a split has at least one tile
        splits = min(p.num_splits, _tiles(keys, sizes["BLOCK_N"]))
    pieces = _pieces(p, batch) if launch.split else None
    owners, several = batch, splits > 1
    if pieces is not None:  # as many as there is room for: what is planned is data
        owners, several, splits = 1, True, max(1, pieces.count)
    values, stats = out, lse
    if several:
        values, stats = _workspace(splits, batch, most, q, out, pieces is not None)
    first = (values[0], stats[0]) if several else (values, stats)
    tiles = _tiles(most * group, sizes["BLOCK_M"])
    inner = FlashParams(
        None, None, None, p.alibi_slopes, p.sinks if pieces is None else None, most, keys,
        p.softmax_scale, p.window_left, p.window_right, p.softcap,
        () if p.mask is None else tuple(FlashMods(mask=p.mask)),
    )  # fmt: skip
    ends, total = _contiguous(p.cu_seqlens_q), q.shape[-3]
    _kernel("fwd", "fwd")[(splits * tiles * heads_kv * owners,)](
        _view(q), *_store(cache, dims), _view(first[0]), _stat(first[1]),
        values.stride(0) if several else None, stats.stride(0) if several else None,
        ends, total, _scores(inner, heads), heads_kv, group,
        splits, 0 if p.num_splits > 0 or not launch.split else launch.split,
        launch.fewest, launch.most, tiles, pieces=pieces, **sizes,
    )  # fmt: skip
    if several:
        packed = None if ends is None else (ends, batch, launch.fewest, most)
        sinks = None if pieces is None else p.sinks
        _merge(values, stats, out, lse, packed=packed, pieces=pieces, sinks=sinks)


def _workspace(
    splits: int, batch: int, most: int, q: Tensor, out: Tensor, by_piece: bool
) -> tuple[Tensor, Tensor]:
    """fp32 states of splits: of batched rows, of packed rows, or of the first ones of sequences;
    ``by_piece`` of those of one sequence each."""
    rows: tuple[int, ...] = (most,) if by_piece else (batch, most)
    if not by_piece and q.dim() == 3 and q.shape[0] <= batch * most:
        rows = (q.shape[0],)
    heads = q.shape[-2]
    values = out.new_empty((splits, *rows, heads, out.shape[-1]), dtype=torch.float32)
    return values, values.new_empty((splits, *rows[:-1], heads, rows[-1]))


def cascade(
    q: Tensor, cache: PagedCache, cu_groups: Tensor, prefix_lens: Tensor, p: PagedParams,
    out: Tensor, lse: Tensor, *, config: Config | None = None,
) -> None:  # fmt: skip
    """Launcher of ``cascade_fwd``: two forwards in fp32 and their merge.

    Few groups have many rows, so that prefixes are cut into shorter splits.
    """
    if cache.block_table.shape[0] == 0:
        out.zero_()
        lse.fill_(-math.inf)
        return
    rows, prefix, rest = cascade_parts(q, cache, cu_groups, prefix_lens, p)
    values = out.new_empty((2, *rows.shape[:-1], out.shape[-1]), dtype=torch.float32)
    stats = values.new_empty((2, rows.shape[-2], rows.shape[0]))
    for n, (part, splits) in enumerate(((prefix, _Splits(1024, 1024)), (rest, _Splits()))):
        _forward(rows, *part, values[n], stats[n], splits, config)
    if out.numel() == 0:
        return
    values = values.view(2, *out.shape)
    if lse.dim() == 3:
        stats = stats.view(2, stats.shape[1], *out.shape[:2]).transpose(1, 2)
    with _on(q.device):
        _merge(values, stats, out, lse)


def append(k: Tensor, v: Tensor | None, cache: PagedCache, p: PagedWrite) -> None:
    """Launcher of ``paged_append``: one launch, and one more for the bounds of pages."""
    seq_rows, dims = k.shape[1], (k.shape[-1], 0 if v is None else v.shape[-1])
    if p.cu_seqlens is None:
        k, v = k.flatten(0, 1), None if v is None else v.flatten(0, 1)
    k, v = _unit(k), None if v is None else _unit(v)
    total, heads = k.shape[:2]
    k_pages, v_pages, table, lengths = _store(cache, (1, 1))
    widths = [tiles_of.row_width(x) for x in dims]
    block = tiles_of.append_rows(max(widths))
    tiles, rope, turned = _tiles(total, block), None, p.rope_cos is not None
    if p.rope_cos is not None and p.rope_sin is not None:
        cos, sin = p.rope_cos.contiguous(), p.rope_sin.contiguous()
        half = cos.shape[2]
        rope = importlib.import_module("attnforge.triton_kernels.rope").Rope(
            cos, sin, _step(cos, 0), cos.shape[1], half, None, None,
            1 if p.rope_interleaved else half,
        )  # fmt: skip
    ends, batch = _contiguous(p.cu_seqlens), cache.block_table.shape[0]
    at = None if p.positions is None or not turned else p.positions.contiguous().view(-1)
    with _on(k.device):
        _kernel("append", "append")[(tiles * heads,)](
            _view(k), _view(k if v is None else v), k_pages, v_pages, table, lengths, ends, at,
            rope, total, seq_rows, batch, tiles,
            CODES=cache.k_pages.dtype in KV_CODES, FLOAT8=cache.k_pages.dtype is FLOAT8,
            VALUES=v is not None, TURNED=turned, D=dims[0], DV=dims[1],
            BLOCK_T=block, BLOCK_D=widths[0], BLOCK_DV=widths[1], num_warps=4,
        )  # fmt: skip
        if p.page_min is not None and p.page_max is not None:
            low, high = (
                _tensors().View(x, x.stride(0), 0, x.stride(1)) for x in (p.page_min, p.page_max)
            )
            _kernel("append", "bounds")[(total * heads,)](
                k_pages, table, lengths, ends, low, high, total, seq_rows, batch,
                D=dims[0], BLOCK_D=widths[0], num_warps=1 if widths[0] <= 256 else 4,
            )  # fmt: skip


class _RowDims:
    """Rows are one tile, whole bytes of codes in it."""

    _dims = (Dim("head_dim", 2, 1024, 2), Dim("v_head_dim", 2, 1024, 2))

    def __call__(self, request: Request, /) -> str | None:
        return self._dims[0](request) or self._dims[1](request)

    def __str__(self) -> str:
        return "head_dim and v_head_dim 2..1024 in steps of 2"


_FEATURES = ("varlen", "kv_fp8", "kv_int8", "kv_int4", "lengths_per_head")
_SCORES = ("latent", "split_plan", "alibi", "sinks", "softcap", "window_left", "window_right",
           "mask")  # fmt: skip


def _spec(
    kind: str, op: str, requires: tuple[Any, ...], notes: str, space: SearchSpace | None = None
) -> KernelSpec:
    return KernelSpec(
        id=f"triton.paged.{kind}",
        op=op,
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(*_COMMON[:2], *requires, _COMMON[-1], SelfTest(f"paged.{kind}")),
        score=50.0,  # above the reference; native kernels of a device go first
        space=space,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "paged_fwd", (_DecodeDims(), Features(*_FEATURES, *_SCORES)),
          "tiles of keys by the block table, fixed splits over keys, codes decoded in registers",
          space("few", "many", tables=tiles_of)),
    _spec("cascade", "cascade_fwd", (_DecodeDims(), Features(*_FEATURES, *_SCORES)),
          "prefixes once for all rows of a group, the rest per request, merged by LSE",
          space("few", "many", tables=tiles_of)),
    _spec("append", "paged_append",
          (_RowDims(), Features(*_FEATURES, "rope", "page_bounds")),
          "rows to slots through rotation and codes; one owner per page for its bounds"),
)  # fmt: skip
