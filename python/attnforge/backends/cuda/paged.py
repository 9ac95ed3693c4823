"""``cuda.paged.*.sm80``: flash's CUDA C++ kernels through a page table, and writing pages.

A sequence goes to one of three launches by its rows per KV head, so that its result does not depend
on its neighbours: decode and short prefills split their keys, long ones do not. Nothing here looks
at a value of a tensor: grids cover what the table (or a plan of the splits) and the bounds allow,
and blocks without work leave.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge import _native_cuda
from attnforge._params import PagedCache, PagedParams, PagedWrite
from attnforge.backends import _gpu
from attnforge.backends.cuda import flash
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.reference.paged import cascade_parts
from attnforge.registry.predicates import Arch, Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec, Request

__all__ = ["HEAD_DIMS", "LATENT", "SPECS"]

# What tiles are padded to, as csrc/cuda/paged/tiles.h lists them.
HEAD_DIMS = ((64, 64), (128, 128), (256, 256))
LATENT = (576, 512)  # of 16-bit calls: V is the first channels of K
_SPLIT = 2048  # keys of a split unless the caller wants another number of them
# Rows per KV head: a tile of the decode kernel, and up to where keys are split: partial outputs
# stay small.
_FEW, _SOME, _ANY = 16, 256, (1 << 31) - 1
_CASCADE_ROWS = 1024  # of a cascade whose keys are split


class _Parts(NamedTuple):
    """fp32 states of several splits: [splits, B, rows, Hq, Dv] and [splits, B, Hq, rows].

    By sequence, by row of q (B 1), or by piece of a plan (B 1).
    """

    outs: Tensor
    lses: Tensor
    split_keys: int
    by_sequence: bool
    plan: tuple[Tensor | None, Tensor | None] = (None, None)


def _splits(cache: PagedCache, num_splits: int) -> int:
    return num_splits or max(1, -(-cache.capacity // _SPLIT))


def _pool(cache: PagedCache) -> tuple[Any, ...]:
    table = cache.block_table
    table = table if table.stride(-1) == 1 or table.shape[1] <= 1 else table.contiguous()
    return (*cache[:2], table, *map(_gpu.contiguous, cache[3:8]))


def _attend(
    q: Tensor,
    cache: PagedCache,
    p: PagedParams,
    out: Tensor,
    lse: Tensor,
    rows: tuple[int, int],
    parts: _Parts | None,
) -> None:
    """The sequences of (rows[0], rows[1]] rows per KV head."""
    small = (p.cu_seqlens_q, p.alibi_slopes, p.sinks, p.mask)
    outs, lses, keys, by_sequence, plan = parts or (None, None, 0, False, (None, None))
    flash._operator("paged_fwd")(
        _gpu.rows(q), *_pool(cache), *map(_gpu.contiguous, small), out, lse, outs, lses,
        *map(_gpu.contiguous, plan), p.max_seqlen_q, p.softmax_scale, p.window_left, p.window_right,
        p.softcap, *rows, keys, by_sequence, _gpu.stream(q.device),
    )  # fmt: skip


def fwd(q: Tensor, cache: PagedCache, p: PagedParams, out: Tensor, lse: Tensor) -> None:
    """Launcher of ``paged_fwd``."""
    mixed = p.cu_seqlens_q is not None
    if mixed:  # rows of no sequence
        out.zero_()
        lse.fill_(-math.inf)
    if out.numel() == 0:
        return
    batch, group = cache.block_table.shape[0], q.shape[-2] // cache.k_pages.shape[2]
    longest, splits = p.max_seqlen_q * group, _splits(cache, p.num_splits)
    owners, plan = batch, (p.split_pieces, p.split_first)
    if p.split_pieces is not None:  # as many as there is room for: what is planned is data
        owners, splits = 1, p.split_pieces.shape[1]
    with _gpu.on(q.device):
        for above, most in ((0, _FEW), (_FEW, _SOME), (_SOME, _ANY)):
            if longest <= above or (longest > most and not mixed):
                continue
            parts = None
            rows = min(p.max_seqlen_q, most // group)
            if (splits > 1 or plan[0] is not None) and rows > 0 and most != _ANY:
                outs = out.new_empty((splits, owners, rows, *out.shape[-2:]), dtype=torch.float32)
                lses = lse.new_empty((splits, owners, q.shape[-2], rows))
                parts = _Parts(outs, lses, 0 if p.num_splits else _SPLIT, True, plan)
            _attend(q, cache, p, out, lse, (above, most), parts)


def cascade(
    q: Tensor,
    cache: PagedCache,
    cu_groups: Tensor,
    prefix_lens: Tensor,
    p: PagedParams,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Launcher of ``cascade_fwd``: splits of the prefixes and of the rest meet in one merge."""
    if out.numel() == 0:
        lse.fill_(-math.inf)
        return
    rows, *levels = cascade_parts(q, cache, cu_groups, prefix_lens, p)
    total, heads = rows.shape[:2]
    whole = total > _CASCADE_ROWS and p.num_splits == 0
    splits = 1 if whole else _splits(cache, p.num_splits)
    keys = 0 if whole or p.num_splits else _SPLIT
    outs = rows.new_empty((2 * splits, 1, total, heads, out.shape[-1]), dtype=torch.float32)
    lses = rows.new_full((2 * splits, 1, heads, total), -math.inf, dtype=torch.float32)
    flat, stat = out.view(total, heads, -1), lse.new_empty((heads, total))
    with _gpu.on(q.device):
        for n, (own, params) in enumerate(levels):
            mine = slice(n * splits, (n + 1) * splits)
            parts = _Parts(outs[mine], lses[mine], keys, False)
            for rows_served in ((0, _FEW), (_FEW, _ANY)):
                _attend(rows, own, params, flat, stat, rows_served, parts)
        flash._operator("merge_states")(outs, lses, flat[None], stat[None], False,
                                        _gpu.stream(q.device))  # fmt: skip
    if lse.dim() == 3:
        stat = stat.view(heads, *out.shape[:2]).transpose(0, 1)
    lse.copy_(stat)


def append(k: Tensor, v: Tensor | None, cache: PagedCache, p: PagedWrite) -> None:
    """Launcher of ``paged_append``."""
    k_pages, v_pages, *pool = _pool(cache)
    new = [None if x is None else x if x.stride(-1) == 1 else x.contiguous() for x in (k, v)]
    small = (p.cu_seqlens, p.rope_cos, p.rope_sin, p.positions)
    with _gpu.on(k.device):
        flash._operator("paged_append")(
            *new, k_pages, None if v is None else v_pages, *pool, *map(_gpu.contiguous, small),
            p.rope_interleaved, p.page_min, p.page_max, _gpu.stream(k.device),
        )  # fmt: skip


class _HeadDims:
    """D and Dv up to 256 in steps of 8, or in 16 bits the latent pair 576/512 of one tensor."""

    _steps = (Dim("head_dim", 8, 256, 8), Dim("v_head_dim", 8, 256, 8))

    def __call__(self, request: Request, /) -> str | None:
        dims = (request.dim("head_dim"), request.dim("v_head_dim"))
        if dims == LATENT and request.dtype is not torch.float32:
            if "latent" in request.features:
                return None
            return ("head_dim 576 with v_head_dim 512 is served where v_pages are a view of "
                    "k_pages (k_pages[..., :512]); they are a tensor of their own")  # fmt: skip
        return self._steps[0](request) or self._steps[1](request)

    def __str__(self) -> str:
        return ("head_dim and v_head_dim 8..256 in steps of 8, or in 16 bits 576 with 512 as a "
                "view of K")  # fmt: skip


_COMMON = (
    Device("cuda"),
    Arch(80),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Available("libattnforge_cuda.so", _native_cuda.unavailable),
)
_CODES = ("kv_fp8", "kv_int8", "kv_int4", "lengths_per_head", "varlen")
_FWD = Features(
    *(*_CODES, "alibi", "sinks", "softcap", "window_left", "window_right", "mask"),
    *("split_plan", "latent"),
)
_ROW_DIMS = (Dim("head_dim", 2, 1024), Dim("v_head_dim", 2, 1024))


def _spec(kind: str, op: str, requires: tuple[Any, ...], notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cuda.paged.{kind}.sm80",
        op=op,
        backend="cuda",
        launch=f"{__name__}:{kind}",
        requires=(*_COMMON, *requires, SelfTest(f"paged.{kind}")),
        # As flash's: proved under the host emulator, not run on a GPU yet.
        score=40.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "paged_fwd", (_HeadDims(), _FWD),
          "cp.async gathers rows by page, fixed splits, codes decoded between shared tiles"),
    _spec("cascade", "cascade_fwd", (_HeadDims(), _FWD),
          "prefixes once for all rows of a group; all splits meet in one merge"),
    _spec("append", "paged_append", (*_ROW_DIMS, Features(*_CODES, "rope", "page_bounds")),
          "a warp per run of slots; rows copied, or turned, encoded and bounded"),
)  # fmt: skip
