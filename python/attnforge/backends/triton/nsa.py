"""``triton.nsa.*``: the Triton kernels of ``triton_kernels/nsa``, importance and choice of blocks.

A few queries of a decode would be one program that walks all windows: they take the importance,
whose programs share out the blocks, and choose from that.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import NsaSelectParams
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import padded
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import (
    _MERGE,
    _batch,
    _on,
    _sequences,
    _stat,
    _tensors,
    _tiles,
    _unit,
    _view,
)
from attnforge.reference.nsa import chosen
from attnforge.registry.predicates import Dim, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]

_FEW_ROWS = 16
_NO_ID = (1 << 31) - 1


@cache  # kernels of a process never change
def _kernels() -> Any:
    if _settings.triton_interpreted():
        _interpreter.repair()
    return importlib.import_module("attnforge.triton_kernels.nsa.select")


def _constants(q: Tensor, p: NsaSelectParams, kept: int) -> dict[str, int]:
    """The tile. What is kept of a query is 64-bit and lives in registers: fewer queries then.

    BLOCKS: so many that their own windows fill a tile, from what a product takes at least on.
    """
    width = padded(q.shape[-1])
    large = width * q.element_size() > 256
    rows = 16 if kept > 32 else 32 if kept > 0 or large else 64
    rows = min(rows, max(16, 1 << (p.flash.max_seqlen_q - 1).bit_length()))
    windows = 32 if large else 64
    blocks = max(16, min(64, windows // (p.slc_block // p.cmp_stride)))
    return {
        "D": q.shape[-1],
        "BLOCK_M": rows,
        "BLOCK_N": windows,
        "BLOCK_D": width,
        "BLOCKS": 1 << (blocks - 1).bit_length(),
        "num_warps": 4,
        "num_stages": 2,
    }


def _problem(p: NsaSelectParams, positions: Tensor, blocks: int) -> Any:
    positions = positions.contiguous()
    each = positions.stride(0) if positions.dim() == 2 and positions.shape[0] > 1 else 0
    return _kernels().Problem(
        p.flash.softmax_scale * math.log2(math.e), p.cmp_block, p.cmp_stride, p.slc_block, blocks,
        positions, each,
    )  # fmt: skip


def _start(
    kernel: str, q: Tensor, k: Tensor, lse: Tensor, p: NsaSelectParams, positions: Tensor,
    out: Tensor, own: Any, programs: int = 1, *, blocks: int, **constants: int,
) -> None:  # fmt: skip
    """out [B, Hk, Sq, X] or [Hk, T, X]; own: the kernel's argument behind the problem."""
    tiles = _tiles(p.flash.max_seqlen_q, constants["BLOCK_M"])
    heads_kv = k.shape[-2]
    grid = programs * tiles * heads_kv * _batch(q, p.flash)
    by_row = out.transpose(-3, -2)
    batch = by_row.stride(0) if by_row.dim() == 4 else 0
    view = _tensors().View(out, batch, by_row.stride(-3), by_row.stride(-2))
    if grid:
        with _on(q.device):
            getattr(_kernels(), kernel)[(grid,)](
                _view(_unit(q)), _view(_unit(k)), _stat(lse.contiguous()), view,
                _sequences(q, k, p.flash), _problem(p, positions, blocks), own, tiles, heads_kv,
                q.shape[-2] // heads_kv, **constants,
            )  # fmt: skip


def importance(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Launcher of ``nsa_importance``."""
    if p.flash.cu_seqlens_q is not None:  # rows of no sequence
        out.zero_()
    if out.numel() == 0:
        return
    sizes = _constants(q, p, 0)
    chunks = _tiles(out.shape[-1], sizes["BLOCKS"])
    _start("importance", q, k, lse, p, positions, out, chunks, chunks, blocks=out.shape[-1],
           **sizes)  # fmt: skip


def select(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Launcher of ``nsa_select``; the kernel's ids are put in order here."""
    if out.numel() == 0:
        return
    if p.flash.cu_seqlens_q is None and q.shape[1] <= _FEW_ROWS:
        scores = out.new_empty((*out.shape[:-1], p.blocks), dtype=torch.float32)
        importance(q, k, lse, positions, p, scores)
        ids = chosen(scores, positions, p)
        out.fill_(-1)
        out[..., : ids.shape[-1]] = ids
        return
    found = torch.full_like(out, _NO_ID)
    kept = min(64, 1 << (p.top_n - 1).bit_length())
    counts = (p.top_n, p.init_blocks, p.local_blocks)
    _start("choose", q, k, lse, p, positions, found, counts, blocks=p.blocks,
           **_constants(q, p, kept), KEPT=kept)  # fmt: skip
    found = found.sort(-1).values
    out.copy_(found.masked_fill(found == _NO_ID, -1))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.nsa.{kind}",
        op=f"nsa_{kind}",
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(
            *_MERGE,
            Dim("head_dim", 8, 256, 8),
            Features("varlen", "seqused_k"),
            SelfTest(f"nsa.{kind}"),
        ),
        score=50.0,
        notes=notes,
    )


SPECS = (
    _spec("importance", "tiles of scores summed over the heads of a group, then over windows"),
    _spec("select", "importance of a tile, its top n kept in registers; no S x N buffer"),
)
