"""``cpu.paged.*``: flash's tiles and decode through a page table, and writing pages.

A launcher hands over tensors and scalars in the order of the native schema. A cascade is two
forwards, over the prefixes and over the rest, that meet in the merge of flash.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import PagedCache, PagedParams, PagedWrite
from attnforge.backends.cpu.flash import _HeadDims, _unit
from attnforge.backends.cpu.flash import merge as merge_states
from attnforge.reference.paged import cascade_parts
from attnforge.registry.predicates import Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


@cache  # overloads of a loaded library never change
def _native_op(name: str) -> Any:
    return _native.operator(name)


def _plain(x: Tensor | None) -> Tensor | None:
    """Small tensors as kernels take them (a no-op for all but sliced ones)."""
    return None if x is None else x.contiguous()


def _pool(cache: PagedCache) -> tuple[Any, ...]:
    table = cache.block_table
    return (_unit(table), cache.cache_seqlens.contiguous(), *map(_plain, cache[4:]))


def _longest(cache: PagedCache) -> int:
    return int(cache.cache_seqlens.max()) if cache.cache_seqlens.numel() else 0


def fwd(q: Tensor, cache: PagedCache, p: PagedParams, out: Tensor, lse: Tensor) -> None:
    """Launcher of ``paged_fwd``."""
    _native_op("paged_fwd")(
        *(_unit(q), *cache[:2], *_pool(cache)),
        *(*map(_plain, p[:4]), out, lse, p.max_seqlen_q, _longest(cache), *p[5:10]),
        *map(_plain, p[10:]),
    )


def cascade(
    q: Tensor,
    cache: PagedCache,
    cu_groups: Tensor,
    prefix_lens: Tensor,
    p: PagedParams,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Launcher of ``cascade_fwd``. Parts are fp32, so that outputs are rounded once."""
    rows, (shared, prefix), (rest, suffix) = cascade_parts(q, cache, cu_groups, prefix_lens, p)
    ends = prefix.cu_seqlens_q
    if ends is not None and ends.numel() > 1:  # exact, where the device is not waited for
        prefix = prefix._replace(max_seqlen_q=int(ends.diff().max()))
    outs, lses = [], []
    for own, params in ((shared, prefix), (rest, suffix)):
        part = out.new_empty((*rows.shape[:-1], out.shape[-1]), dtype=torch.float32)
        stat = lse.new_empty((rows.shape[-2], rows.shape[0]))
        fwd(rows, own, params, part, stat)
        outs.append(part)
        lses.append(stat)
    merged = torch.empty_like(outs[0])
    stat = torch.empty_like(lses[0])
    merge_states(outs, lses, merged, stat)
    out.copy_(merged.view(out.shape))
    if lse.dim() == 3:
        stat = stat.view(stat.shape[0], *out.shape[:2]).transpose(0, 1)
    lse.copy_(stat)


def append(k: Tensor, v: Tensor | None, cache: PagedCache, p: PagedWrite) -> None:
    """Launcher of ``paged_append``."""
    values = None if v is None else cache.v_pages
    _native_op("paged_append")(
        *(_unit(k), None if v is None else _unit(v), cache.k_pages, values, *_pool(cache)),
        *(*map(_plain, p[:4]), p.rope_interleaved, p.page_min, p.page_max),
    )


_COMMON = (
    Device("cpu"),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Available("libattnforge_cpu.so", _native.unavailable),
)
_CODES = ("kv_fp8", "kv_int8", "kv_int4", "lengths_per_head", "varlen")
_FWD = Features(
    *(*_CODES, "alibi", "sinks", "softcap", "window_left", "window_right", "mask"),
    *("split_plan", "latent"),
)


class _RowDims:
    """Rows that go through fp32 have up to 1024 channels."""

    _dims = (Dim("head_dim", 2, 1024), Dim("v_head_dim", 2, 1024))

    def __call__(self, request: Any, /) -> str | None:
        return self._dims[0](request) or self._dims[1](request)

    def __str__(self) -> str:
        return "head_dim and v_head_dim 2..1024"


def _spec(kind: str, op: str, requires: tuple[Any, ...], notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.paged.{kind}",
        op=op,
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=(*_COMMON, *requires),
        score=100.0,  # far above the reference; room below for simpler kernels
        notes=notes,
    )


SPECS = (
    _spec("fwd", "paged_fwd", (_HeadDims(), _FWD),
          "split over keys, packed tiles for many rows; codes decoded in registers"),
    _spec("cascade", "cascade_fwd", (_HeadDims(), _FWD),
          "prefixes once for all rows of a group, the rest per request, merged by LSE"),
    _spec("append", "paged_append", (_RowDims(), Features(*_CODES, "rope", "page_bounds")),
          "rows copied, or through fp32 for rotation, codes and page bounds"),
)  # fmt: skip
