"""``triton.reductions.*``: the Triton kernels of ``triton_kernels/reductions``.

Tiles are those of the flash forward, which needs more registers and shared memory than what takes
them here. Top-k and edges hold more per score: they take the tiles of decode and of a forward with
heavy features. The gradient of span masses multiplies fp32: it takes the tiles of an fp32 backward.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import FlashParams
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import sizes as sizes_of
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import (
    _COMMON,
    _MERGE,
    _delta,
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


_FLASH_ALONE = ("DV", "BLOCK_DV", "USE_TMA")


def _constants(q: Tensor, k: Tensor, kernel: str = "fwd", **options: Any) -> dict[str, int]:
    """The constants of a launch: the tile that the flash kernel ``kernel`` has."""
    sizes = sizes_of(kernel, q, k, **options)
    return {name: size for name, size in sizes.items() if name not in _FLASH_ALONE}


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


def topk_keys(
    q: Tensor, k: Tensor, lse: Tensor | None, n: int, p: FlashParams, values: Tensor,
    indices: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``reductions_topk_keys``."""
    if values.numel() == 0:
        return
    sizes = _constants(q, k, "decode")
    q_view, k_view, rest = _operands(q, k, p)
    tiles = _tiles(q.shape[1], sizes["BLOCK_M"])
    kept = min(sizes["BLOCK_N"], 1 << (n - 1).bit_length())
    with _on(q.device):
        _kernel("topk", "topk_keys")[(tiles * q.shape[2] * q.shape[0],)](
            q_view, k_view, _of_rows(lse), values, indices, *rest, tiles, n, KEPT=kept, **sizes
        )


def edges(
    q: Tensor, k: Tensor, lse: Tensor, threshold: float, p: FlashParams, where: Tensor,
    prob: Tensor, total: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``reductions_edges``: count, prefix sums, write."""
    where.fill_(-1)
    prob.zero_()
    counts = torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.int64, device=q.device)
    if counts.numel() > 0:
        sizes = _constants(q, k, heavy=True)
        q_view, k_view, rest = _operands(q, k, p)
        tiles = _tiles(q.shape[1], sizes["BLOCK_M"])
        starts = torch.zeros_like(counts)
        with _on(q.device):
            for room in (0, prob.shape[0]):
                _kernel("edges", "edges")[(tiles * q.shape[2] * q.shape[0],)](
                    q_view, k_view, _of_rows(lse), threshold, starts, counts, where, prob, room,
                    *rest, tiles, **sizes,
                )  # fmt: skip
                starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    total.copy_(counts.sum())


def span_bwd(
    dout: Tensor, q: Tensor, k: Tensor, lse: Tensor, boundaries: Tensor, p: FlashParams,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Launcher of ``reductions_span_bwd``."""
    if q.numel() == 0 or k.numel() == 0:  # nothing reaches the other side
        for x in grads:
            x.zero_()
        return
    dq, dk, dlse = grads
    q_view, k_view, (sequences, scores, heads, group) = _operands(q, k, p)
    # The last boundary at or before a key begins its span; behind the last one there is none.
    keys = torch.arange(k.shape[1], device=q.device, dtype=torch.int32)
    span_of = torch.searchsorted(boundaries.contiguous(), keys, right=True, out_int32=True) - 1
    span_of = torch.where(span_of < dout.shape[-1], span_of, -1)
    mass, stat = dout.contiguous(), _of_rows(lse)
    with _on(q.device):
        sizes = _constants(q, k, "dq", itemsize=4)
        tiles = _tiles(q.shape[1], sizes["BLOCK_M"])
        _kernel("span_grad", "span_dq")[(tiles * heads * q.shape[0],)](
            mass, q_view, k_view, stat, span_of, _view(dq), dlse, sequences, scores,
            p.softmax_scale, heads, group, tiles, dout.shape[-1], **sizes,
        )  # fmt: skip
        sizes = _constants(q, k, "dkdv", itemsize=4)
        tiles = _tiles(k.shape[1], sizes["BLOCK_N"])
        _kernel("span_grad", "span_dk")[(tiles * k.shape[2] * q.shape[0],)](
            mass, q_view, k_view, stat, span_of, _view(dk), sequences, scores,
            p.softmax_scale, k.shape[2], group, tiles, dout.shape[-1], **sizes,
        )  # fmt: skip


def head_gradient(dout: Tensor, out: Tensor, rows: Tensor, sums: Tensor) -> None:
    """Launcher of ``reductions_head_gradient``: the backward's delta, and its sums."""
    if out.numel() == 0:
        rows.zero_()
    else:
        with _on(out.device):
            _delta(_unit(dout), _unit(out), None, None, None, rows)
    sums.copy_(rows.sum(-1, dtype=torch.float64))


_TILES = tuple(need for need in _COMMON if "v_head_dim" not in str(need))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.reductions.{kind}",
        op=f"reductions_{kind}",
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(
            *(_MERGE if kind == "head_gradient" else _TILES),
            SelfTest(f"reductions.{kind}"),
        ),
        score=50.0,  # above the reference; native kernels of a device go first
        notes=notes,
    )


SPECS = (
    _spec("column_sums", "a key has one owner, which adds row tiles in order"),
    _spec("span_mass", "rows in registers, one span after the other"),
    _spec("row_entropy", "from log P, no logarithm taken"),
    _spec("block_max", "one program per block"),
    _spec("topk_keys", "sorted lists of rows in registers, more keys in more walks"),
    _spec("edges", "count, prefix sum, write: one kernel twice"),
    _spec("span_bwd", "one owner per row of dq and key of dk, products in fp32"),
    _spec("head_gradient", "the delta of the flash backward, and its sums"),
)
