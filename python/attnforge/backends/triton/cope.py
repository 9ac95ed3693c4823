"""``triton.cope.*``: the Triton kernels of ``triton_kernels/cope``.

Tables <q, e_n> and what follows from their gradient are plain products: torch makes them, in fp32.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import FlashParams, FlashTape
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import padded
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import (
    _COMMON,
    _FAR,
    _batch,
    _delta,
    _on,
    _sequences,
    _stat,
    _tiles,
    _unit,
    _view,
)
from attnforge.registry.predicates import Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]

# Elements of each of the two workspaces of the backward, unless one tile of rows needs more.
_EDGES = 1 << 24


@cache  # kernels of a process never change
def _module(name: str) -> Any:
    if _settings.triton_interpreted():
        _interpreter.repair()
    return importlib.import_module(f"attnforge.triton_kernels.cope.{name}")


def _sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    """The compile-time constants of every kernel."""
    d, dv = q.shape[-1], v.shape[-1]
    tile = _module("positions").blocks(q.dtype.itemsize, max(padded(d), padded(dv)))
    return {"D": d, "DV": dv, "BLOCK_D": padded(d), "BLOCK_DV": padded(dv), **tile}


def _rows_first(x: Tensor) -> Tensor:
    """[B, S, H, X] <-> [B, H, S, X], and packed ones."""
    return x.transpose(-3, -2)


def _table(q: Tensor, emb: Tensor) -> Any:
    """A Table of <q_i, e_n>, fp32 [B, H, S, N] in memory."""
    products = _rows_first(_rows_first(q).float() @ emb.float())
    return _module("positions").Table(_view(products), emb.shape[-1] - 1)


def _sight(p: FlashParams) -> Any:
    left = min(p.window_left, _FAR) if p.window_left >= 0 else None
    right = min(p.window_right, _FAR) if p.window_right >= 0 else None
    return _module("positions").Sight(left, right, None)


def fwd(
    q: Tensor, k: Tensor, v: Tensor, emb: Tensor, p: FlashParams,
    out: Tensor, lse: Tensor, out_lo: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``cope_fwd``."""
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(-math.inf)
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0:
        return
    q, k, v = _unit(q), _unit(k), _unit(v)
    low = out_lo if out_lo.dim() > 1 else None
    heads, sizes = q.shape[-2], _sizes(q, v)
    tiles = _tiles(p.max_seqlen_q, sizes["BLOCK_M"])
    with _on(q.device):
        if grid := tiles * heads * _batch(q, p):
            _module("fwd").fwd[(grid,)](
                _view(q), _view(k), _view(v), _table(q, emb), _view(out),
                None if low is None else _view(low), _stat(lse), _sequences(q, k, p), _sight(p),
                p.softmax_scale, heads, heads // k.shape[-2], tiles, **sizes,
            )  # fmt: skip


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, emb: Tensor, p: FlashParams,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Launcher of ``cope_bwd``: rows and keys in turn, for as many rows as the workspace holds."""
    dq, dk, dv, demb = grads
    if tape.q.numel() == 0:
        for x in grads:
            x.zero_()
        return
    q, k, v, out, dout = map(_unit, (tape.q, tape.k, tape.v, tape.out, dout))
    lse = tape.lse.contiguous()
    low = _unit(tape.out_lo) if tape.out_lo.dim() > 1 else None
    heads, heads_kv, batch, sizes = q.shape[-2], k.shape[-2], _batch(q, p), _sizes(q, v)
    packed = p.cu_seqlens_k is not None
    tiles_k = _tiles(p.max_seqlen_k if packed else k.shape[1], sizes["BLOCK_N"])
    table, sequences, sight = _table(q, emb), _sequences(q, k, p), _sight(p)
    sum_q, sum_k, sum_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    d_table = _rows_first(torch.zeros_like(_rows_first(table.view.ptr)))
    block = sizes["BLOCK_M"]
    some = max(1, _EDGES // max(1, batch * heads * tiles_k * block)) * block
    some = min(some, _tiles(p.max_seqlen_q, block) * block)
    right, left = (_view(lse.new_empty(batch, some, heads, tiles_k)) for _ in range(2))
    inputs = (*map(_view, (q, k, v, dout)), table)
    rest = (sequences, sight, p.softmax_scale)
    with _on(q.device):
        delta = torch.empty_like(lse)
        _delta(dout, out, low, dlse, lse, delta)
        stats = (_stat(lse), _stat(delta))
        for first in range(0, p.max_seqlen_q if tiles_k * batch else 0, some):
            tiles = _tiles(min(some, p.max_seqlen_q - first), block)
            _module("bwd").rows[(tiles * heads * batch,)](
                *inputs, _view(sum_q), _view(d_table), right, left, *stats, *rest, first,
                heads, heads // heads_kv, tiles, **sizes,
            )  # fmt: skip
            _module("bwd").keys[(tiles_k * heads_kv * batch,)](
                *inputs, _view(sum_k), _view(sum_v), right, left, *stats, *rest, first,
                first + some, heads_kv, heads // heads_kv, tiles_k, **sizes,
            )  # fmt: skip
    by_row = _rows_first(d_table)
    dq.copy_(sum_q + _rows_first(by_row @ emb.float().transpose(-1, -2)))
    dk.copy_(sum_k)
    dv.copy_(sum_v)
    own = _rows_first(q).float().masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)
    total = own.transpose(-1, -2) @ by_row
    demb.copy_((total.sum(0) if total.dim() == 4 else total).sum_to_size(demb.shape))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.cope.{kind}",
        op=f"cope_{kind}",
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(
            *_COMMON[:4],
            Features("varlen", "seqused_k", "window_left", "window_right"),
            _COMMON[-1],
            SelfTest(f"cope.{kind}"),
        ),
        score=50.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "tiles from right to left with a running sum of gates"),
    _spec("bwd", "rows, then keys from the edges that they leave; no atomics"),
)
