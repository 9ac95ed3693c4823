"""``triton.reductions.*``: the Triton kernels of ``triton_kernels/reductions``.

Tiles are those of the flash forward, which needs more registers and shared memory than any of
these.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from torch import Tensor

from attnforge import _settings
from attnforge._params import FlashParams
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import sizes as sizes_of
from attnforge.backends.triton.flash import (
    _COMMON,
    _on,
    _scores,
    _sequences,
    _stat,
    _tiles,
    _unit,
    _view,
)
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


@cache  # kernels of a process never change
def _kernel(module: str, name: str) -> Any:
    """A kernel by name; importing Triton waits for the first launch."""
    if _settings.triton_interpreted():
        _interpreter.repair()
    return getattr(importlib.import_module(f"attnforge.triton_kernels.reductions.{module}"), name)


def _of_rows(x: Tensor | None) -> Any:
    return None if x is None else _stat(x.contiguous())


def _constants(q: Tensor, k: Tensor) -> dict[str, int]:
    sizes = sizes_of("fwd", q, k)
    return {name: size for name, size in sizes.items() if name not in ("DV", "BLOCK_DV")}


def _operands(q: Tensor, k: Tensor, p: FlashParams) -> tuple[Any, Any, tuple[Any, ...]]:
    """Views of q and k, and what every kernel takes behind its own tensors."""
    heads = q.shape[2]
    q, k = _unit(q), _unit(k)
    return _view(q), _view(k), (_sequences(q, k, p), _scores(p, heads), heads, heads // k.shape[2])


def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, p: FlashParams, out: Tensor
) -> None:
    """Launcher of ``reductions_column_sums``."""
    if out.numel() == 0:
        return
    sizes = _constants(q, k)
    q_view, k_view, rest = _operands(q, k, p)
    tiles = _tiles(k.shape[1], sizes["BLOCK_N"])
    with _on(q.device):
        _kernel("columns", "column_sums")[(tiles * q.shape[2] * q.shape[0],)](
            q_view, k_view, _of_rows(lse), _of_rows(weights), out, *rest, tiles, **sizes
        )


def span_mass(
    q: Tensor, k: Tensor, lse: Tensor, boundaries: Tensor, p: FlashParams, out: Tensor
) -> None:
    """Launcher of ``reductions_span_mass``."""
    if out.numel() == 0:
        return
    sizes = _constants(q, k)
    q_view, k_view, rest = _operands(q, k, p)
    tiles = _tiles(q.shape[1], sizes["BLOCK_M"])
    with _on(q.device):
        _kernel("rows", "span_mass")[(tiles * q.shape[2] * q.shape[0],)](
            q_view, k_view, _of_rows(lse), boundaries.contiguous(), out, *rest, tiles,
            out.shape[-1], **sizes,
        )  # fmt: skip


def row_entropy(q: Tensor, k: Tensor, lse: Tensor, p: FlashParams, out: Tensor) -> None:
    """Launcher of ``reductions_row_entropy``."""
    if out.numel() == 0:
        return
    sizes = _constants(q, k)
    q_view, k_view, rest = _operands(q, k, p)
    tiles = _tiles(q.shape[1], sizes["BLOCK_M"])
    with _on(q.device):
        _kernel("rows", "row_entropy")[(tiles * q.shape[2] * q.shape[0],)](
            q_view, k_view, _of_rows(lse), out, *rest, tiles, **sizes
        )


def block_max(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: tuple[int, int],
    p: FlashParams,
    out: Tensor,
) -> None:
    """Launcher of ``reductions_block_max``."""
    if out.numel() == 0:
        return
    q_view, k_view, rest = _operands(q, k, p)
    with _on(q.device):
        _kernel("blocks", "block_max")[(out.numel(),)](
            q_view, k_view, _of_rows(lse), out, *rest, *blocks, *out.shape[2:], **_constants(q, k)
        )


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.reductions.{kind}",
        op=f"reductions_{kind}",
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=tuple(need for need in _COMMON if "v_head_dim" not in str(need)),
        score=50.0,  # above the reference; native kernels of a device go first
        notes=notes,
    )


SPECS = (
    _spec("column_sums", "a key has one owner, which adds row tiles in order"),
    _spec("span_mass", "rows in registers, one span after the other"),
    _spec("row_entropy", "from log P, no logarithm taken"),
    _spec("block_max", "one program per block"),
)
