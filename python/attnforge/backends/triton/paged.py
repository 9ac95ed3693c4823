"""``triton.paged.*``: the Triton kernels of ``triton_kernels/paged``.

A forward is up to three launches of one kernel, each for the sequences of some numbers of rows: a
few rows and long splits, more rows and longer splits, many rows and none. Which sequence belongs
where is decided on the device, from the boundaries alone.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import FLOAT8, FlashMods, FlashParams, PagedCache, PagedParams
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
from attnforge.registry.predicates import Features
from attnforge.registry.space import Config, SearchSpace
from attnforge.registry.spec import KernelSpec
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


def _store(c: PagedCache, dims: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """K, V, the table and the lengths of a cache; dims: of K and V."""
    k, v, table = c.k_pages, c.v_pages, _unit(c.block_table)
    of_k = k.data_ptr() == v.data_ptr() and k.stride() == v.stride()
    of_k = of_k and padded(dims[0]) == padded(dims[1])
    lengths = c.cache_seqlens.contiguous()
    batch, head = lengths.stride() if lengths.dim() == 2 else (1, 0)
    return (
        _stored(k, c.k_scale, c.k_zero),
        _stored(v, c.v_scale, c.v_zero, of_k),
        _pages().Table(table, table.stride(0), table.shape[1], k.shape[0], _constant(c.page_size)),
        _tensors().Stat(lengths, batch, head),
    )


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
    sizes = sizes_of(launch.kernel, q, out, p.mask is not None, config, itemsize=q.element_size(),
                     tables=tiles_of)  # fmt: skip
    keys, most = max(1, cache.capacity), min(launch.most, p.max_seqlen_q)
    splits = _tiles(keys, launch.split) if launch.split else 1
    if p.num_splits > 0 and launch.split:  # a split has at least one tile
        splits = min(p.num_splits, _tiles(keys, sizes["BLOCK_N"]))
    values, stats = (out, lse) if splits == 1 else _workspace(splits, batch, most, q, out)
    first = (values, stats) if splits == 1 else (values[0], stats[0])
    tiles = _tiles(most * group, sizes["BLOCK_M"])
    inner = FlashParams(
        None, None, None, p.alibi_slopes, p.sinks, most, keys, p.softmax_scale, p.window_left,
        p.window_right, p.softcap, () if p.mask is None else tuple(FlashMods(mask=p.mask)),
    )  # fmt: skip
    ends, total = _contiguous(p.cu_seqlens_q), q.shape[-3]
    _kernel("fwd", "fwd")[(splits * tiles * heads_kv * batch,)](
        _view(q), *_store(cache, dims), _view(first[0]), _stat(first[1]),
        None if splits == 1 else values.stride(0), None if splits == 1 else stats.stride(0),
        ends, total, _scores(inner, heads), heads_kv, group,
        splits, 0 if p.num_splits > 0 or not launch.split else launch.split,
        launch.fewest, launch.most, tiles, **sizes,
    )  # fmt: skip
    if splits > 1:
        _merge(values, stats, out, lse, packed=None if ends is None else (ends, batch, most))


def _workspace(splits: int, batch: int, most: int, q: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 states of splits: of batched rows, of packed rows, or of the first ones of sequences."""
    rows: tuple[int, ...] = (batch, most)
    if q.dim() == 3 and q.shape[0] <= batch * most:
        rows = (q.shape[0],)
    heads = q.shape[-2]
    values = out.new_empty((splits, *rows, heads, out.shape[-1]), dtype=torch.float32)
    return values, values.new_empty((splits, *rows[:-1], heads, rows[-1]))


_FEATURES = ("varlen", "kv_fp8", "kv_int8", "kv_int4", "lengths_per_head")
_SCORES = ("alibi", "sinks", "softcap", "window_left", "window_right", "mask")


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
)  # fmt: skip
