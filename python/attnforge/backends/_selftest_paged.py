"""Problems of the self-test of the paged kernels: one per kernel and group of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FLOAT8, PagedCache, PagedParams, PagedWrite
from attnforge.reference import paged as reference

__all__ = ["GROUPS", "problem"]

# Features that share code are tested together; windows and sinks stand in the plain problem.
GROUPS: dict[str, frozenset[str]] = {
    "split plans": frozenset({"split_plan"}),
    "packed rows and lengths per head": frozenset({"varlen", "lengths_per_head"}),
    "softcap and ALiBi": frozenset({"softcap", "alibi"}),
    "trees": frozenset({"mask"}),
    "fp8 pages": frozenset({"kv_fp8"}),
    "int8 pages": frozenset({"kv_int8"}),
    "int4 pages": frozenset({"kv_int4"}),
    "rope": frozenset({"rope"}),
    "bounds of pages": frozenset({"page_bounds"}),
}
_CODES = {"fp8 pages": FLOAT8, "int8 pages": torch.int8, "int4 pages": torch.uint8}
_HEADS, _HEADS_KV, _DIM, _SIZE, _PAGES, _WIDTH = 4, 2, 64, 8, 70, 34


def _cache(group: str, dtype: torch.dtype, device: torch.device) -> PagedCache:
    """Two sequences of 270 and 61 keys in shuffled pages of 8, codes with scales per token."""
    g = torch.Generator().manual_seed(0)
    shape = (_PAGES, _SIZE, _HEADS_KV, _DIM)
    k, v = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))
    table = torch.randperm(_PAGES, generator=g)[: 2 * _WIDTH].view(2, _WIDTH)
    lengths = torch.tensor([270, 61], dtype=torch.int32)
    if group.startswith("packed"):
        lengths = torch.tensor([[270, 19], [61, 40]], dtype=torch.int32)
    scales: list[Tensor | None] = [None] * 4
    if group in _CODES:
        code = _CODES[group]
        scales[:2] = [torch.rand(shape[:3], generator=g).to(device) / 40 + 0.01 for _ in range(2)]
        if code is not FLOAT8:
            scales[2:] = [torch.rand(shape[:3], generator=g).to(device) * 3 for _ in range(2)]
        k, v = (reference.encoded(x, code, scales[n], scales[n + 2]) for n, x in enumerate((k, v)))
    return PagedCache(k, v, table.to(device, torch.int32), lengths.to(device), *scales)


def _params(group: str, rows: int, device: torch.device) -> PagedParams:
    g = torch.Generator().manual_seed(1)
    p = PagedParams(None, None, None, None, rows, _DIM**-0.5, -1, 0, 0.0, 3)
    if group == "":
        sinks = torch.randn(_HEADS, generator=g).to(device)
        return p._replace(sinks=sinks, window_left=150)
    if group.startswith("packed"):
        ends = torch.tensor([0, rows - 1, rows + 2], dtype=torch.int32, device=device)
        return p._replace(cu_seqlens_q=ends)
    if group.startswith("softcap"):
        slopes = torch.rand(_HEADS, generator=g).to(device) / 8
        return p._replace(alibi_slopes=slopes, softcap=5.0)
    if group == "split plans":  # of uneven pieces, and room for more
        owner, begin, end = [0, 0, 0, 1, -1, -1], [0, 64, 200, 0, 0, 0], [64, 200, 270, 61, 0, 0]
        pieces = torch.tensor([owner, begin, end], dtype=torch.int32, device=device)
        first = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
        sinks = torch.randn(_HEADS, generator=g).to(device)
        return p._replace(sinks=sinks, split_pieces=pieces, split_first=first)
    if group == "trees":
        mask = torch.rand(2, 1, rows, rows, generator=g) < 0.6
        return p._replace(mask=mask.to(device))
    return p


def _forward(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """One row and twenty, which take different tiles."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    cache = _cache(group, dtype, device)
    for rows in (1, 20) if not group.startswith("packed") else (20,):
        g = torch.Generator().manual_seed(2)
        packed = group.startswith("packed")
        shape = (rows + 2, _HEADS, _DIM) if packed else (2, rows, _HEADS, _DIM)
        q, p = torch.randn(shape, generator=g).to(device, dtype), _params(group, rows, device)
        for launch, results in zip((run, reference.forward), found, strict=True):
            stat = (_HEADS, rows + 2) if packed else (2, _HEADS, rows)
            out, lse = torch.empty_like(q), q.new_empty(stat, dtype=torch.float32)
            launch(q, cache, p, out, lse)
            results += [out, lse]
    return found


def _cascade(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Two requests that share five pages."""
    cache = _cache(group, dtype, device)
    cache.block_table[1, :5] = cache.block_table[0, :5]
    rows = 4  # at least those of a packed sequence
    p = _params(group, rows, device)._replace(window_left=-1, alibi_slopes=None, mask=None)
    if group.startswith("packed"):
        lengths = (cache.cache_seqlens + 40).clamp_max(cache.capacity)  # heads see the prefix
        cache = cache._replace(cache_seqlens=lengths)
    g = torch.Generator().manual_seed(2)
    packed = p.cu_seqlens_q is not None
    shape = (rows + 2, _HEADS, _DIM) if packed else (2, rows, _HEADS, _DIM)
    q = torch.randn(shape, generator=g).to(device, dtype)
    groups, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [40]))
    found: list[list[Tensor]] = []
    for n in range(2):
        stat = (_HEADS, rows + 2) if packed else (2, _HEADS, rows)
        out, lse = torch.empty_like(q), q.new_empty(stat, dtype=torch.float32)
        if n == 0:
            run(q, cache, groups, lens, p, out, lse)
        else:
            reference.forward(q, cache, p, out, lse)
        found.append([out, lse])
    return found[0], found[1]


def _append(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Nineteen rows for each sequence; what they are read back as, codes among them."""
    g, rows = torch.Generator().manual_seed(2), 19
    cache = _cache(group, dtype, device)
    cache = cache._replace(cache_seqlens=cache.cache_seqlens % 40)
    packed = group.startswith("packed")
    shape = (2 * rows, _HEADS_KV, _DIM) if packed else (2, rows, _HEADS_KV, _DIM)
    k, v = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))
    p = PagedWrite(None, None, None, None, False, None, None)
    if packed:
        ends = torch.tensor([0, 7, 2 * rows], dtype=torch.int32, device=device)
        p = p._replace(cu_seqlens=ends)
    if group == "rope":
        angles = torch.randn(1, 99, _DIM // 4, generator=g).to(device)
        p = p._replace(rope_cos=angles.cos(), rope_sin=angles.sin())
    found: list[list[Tensor]] = []
    for launch in (run, reference.append):
        pages = [x.clone() for x in cache[:2]]
        own = cache._replace(k_pages=pages[0], v_pages=pages[1])
        bounds: list[Tensor] = []
        if group == "bounds of pages":
            bounds = [k.new_zeros(_PAGES, _HEADS_KV, _DIM) for _ in range(2)]
        launch(k, v, own, p._replace(page_min=bounds[0], page_max=bounds[1]) if bounds else p)
        scales = (own.k_scale, own.v_scale), (own.k_zero, own.v_zero)
        read = [reference.decoded(x, scales[0][n], scales[1][n]) for n, x in enumerate(pages)]
        found.append([*read, *bounds])
    return found[0], found[1]


_PROBLEMS = {"fwd": _forward, "cascade": _cascade, "append": _append}


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``triton.paged.<kind>``."""
    return _PROBLEMS[kind](group, run, dtype, device)
