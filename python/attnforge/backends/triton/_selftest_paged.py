"""Problems of the self-test of the paged kernels: one per kernel and group of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FLOAT8, PagedCache, PagedParams
from attnforge.reference import paged as reference

__all__ = ["GROUPS", "problem"]

# Features that share code are tested together; windows and sinks stand in the plain problem.
GROUPS: dict[str, frozenset[str]] = {
    "packed rows and lengths per head": frozenset({"varlen", "lengths_per_head"}),
    "softcap and ALiBi": frozenset({"softcap", "alibi"}),
    "trees": frozenset({"mask"}),
    "fp8 pages": frozenset({"kv_fp8"}),
    "int8 pages": frozenset({"kv_int8"}),
    "int4 pages": frozenset({"kv_int4"}),
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


_PROBLEMS = {"fwd": _forward}


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``triton.paged.<kind>``."""
    return _PROBLEMS[kind](group, run, dtype, device)
