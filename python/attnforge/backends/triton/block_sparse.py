"""``triton.block_sparse.*``: the Triton kernels of ``triton_kernels/block_sparse``.

Kernels take ascending lists without repetition and, for dK and dV, their inverse. Tiles are those
of flash, with no more rows than share a list.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import BlockLists, FlashParams, FlashTape
from attnforge.backends._block_lists import (
    Ascending,
    Inverse,
    ascending,
    blocks_of,
    inverse,
    pack_of,
    union,
)
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import sizes as sizes_of
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import (
    _COMMON,
    _batch,
    _delta,
    _on,
    _scores,
    _sequences,
    _stat,
    _tiles,
    _unit,
    _view,
)
from attnforge.reference.flash import sink_gradient
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


@cache  # kernels of a process never change
def _module(name: str) -> Any:
    if _settings.triton_interpreted():
        _interpreter.repair()
    return importlib.import_module(f"attnforge.triton_kernels.block_sparse.{name}")


def _lists(lists: Ascending) -> Any:
    batch, heads, rows, slots = lists.ids.shape
    return _module("lists").Lists(
        lists.ids,
        lists.counts,
        batch=heads * rows if batch > 1 else 0,
        head=rows if heads > 1 else 0,
        slots=slots,
        first=lists.first,
    )


def _inverse(found: Inverse) -> Any:
    batch, heads, entries = found.rows.shape
    return _module("lists").Inverse(
        found.rows,
        found.starts,
        batch=heads if batch > 1 else 0,
        head=1 if heads > 1 else 0,
        entries=entries,
        blocks=found.blocks,
        each=found.each,
    )


def _constants(kernel: str, q: Tensor, v: Tensor, lists: BlockLists, pack: int) -> dict[str, Any]:
    """The constants of a launch: flash's tile, cut down to the rows and keys that there are."""
    together = lists.q_block * pack
    if kernel == "fwd" and together <= 16:
        kernel = "decode"  # few rows over many keys
    sizes = sizes_of(kernel, q, v)
    sizes.pop("USE_TMA", None)
    held, limit = ("BLOCK_N", lists.kv_block) if kernel == "dkdv" else ("BLOCK_M", together)
    sizes[held] = min(sizes[held], max(16, 1 << (limit - 1).bit_length()))
    # Rows and keys of a stream have pointers of their own: larger tiles spill.
    if kernel == "dkdv":
        sizes["BLOCK_M"] = 16
    elif max(sizes["BLOCK_D"], sizes["BLOCK_DV"]) > 128:
        sizes["BLOCK_M"] = min(sizes["BLOCK_M"], 64)
    return {**sizes, "Q_BLOCK": lists.q_block, "KV_BLOCK": lists.kv_block}


_UNION_ROWS = 32  # of a tile that lists of few rows share: see ``triton_kernels/block_sparse/fwd``
_UNION_SLOTS = 64  # ids of each row are held in registers


def _sharing(lists: BlockLists, pack: int, sizes: dict[str, Any]) -> int:
    """List rows that share a tile of the forward; 1 if each has tiles of its own."""
    together, slots = lists.q_block * pack, lists.indices.shape[-1]
    if together >= 16 or lists.kv_block % sizes["BLOCK_N"] or slots > _UNION_SLOTS:
        return 1
    return _UNION_ROWS // together


def _row_grid(q: Tensor, p: FlashParams, lists: BlockLists, pack: int, block: int) -> int:
    parts = _tiles(lists.q_block * pack, block)
    rows = _tiles(p.max_seqlen_q, lists.q_block)
    return parts * rows * (q.shape[-2] // pack) * _batch(q, p)


def fwd(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, lists: BlockLists,
    out: Tensor, lse: Tensor, out_lo: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``block_sparse_fwd``."""
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(-torch.inf)
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0:
        return
    low = out_lo if out_lo.dim() > 1 else None
    q, k, v = _unit(q), _unit(k), _unit(v)
    heads, pack = q.shape[-2], pack_of(q, k, lists)
    sizes = _constants("fwd", q, v, lists, pack)
    share, single = _sharing(lists, pack, sizes), None
    blocks = blocks_of(k, p, lists.kv_block)
    with _on(q.device):
        given = ascending(lists, blocks, p)
        if share > 1:
            single, given = _lists(given), union(given, share, blocks, p, lists.q_block)
            sizes |= {"BLOCK_M": _UNION_ROWS, "Q_BLOCK": share * lists.q_block}
        sizes |= {"SHARE": share, "SLOTS": 1 << (lists.indices.shape[-1] - 1).bit_length()}
        wide = lists._replace(q_block=sizes["Q_BLOCK"])
        if grid := _row_grid(q, p, wide, pack, sizes["BLOCK_M"]):
            _module("fwd").fwd[(grid,)](
                _view(q), _view(k), _view(v), _view(out), None if low is None else _view(low),
                _stat(lse), _sequences(q, k, p), _scores(p, heads), _lists(given), single,
                p.max_seqlen_q, heads // pack, pack, heads // k.shape[-2], **sizes,
            )  # fmt: skip


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: FlashParams, lists: BlockLists,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Launcher of ``block_sparse_bwd``; dsinks is summed here from delta."""
    dq, dk, dv, dsinks = grads
    q, k, v, out, dout = map(_unit, (tape.q, tape.k, tape.v, tape.out, dout))
    if p.cu_seqlens_q is not None or q.numel() == 0:  # rows and slots of no sequence
        for x in grads:
            x.zero_()
    if q.numel() == 0:
        return
    lse = tape.lse.contiguous()
    low = _unit(tape.out_lo) if tape.out_lo.dim() > 1 else None
    heads, heads_kv, pack = q.shape[-2], k.shape[-2], pack_of(q, k, lists)
    blocks = blocks_of(k, p, lists.kv_block)
    with _on(q.device):
        delta = torch.empty_like(lse)
        _delta(dout, out, low, dlse, lse, delta)
        given = ascending(lists, blocks, p)
        inputs = tuple(map(_view, (q, k, v, dout)))
        rest = (_stat(lse), _stat(delta), _sequences(q, k, p), _scores(p, heads))
        sizes = _constants("dkdv", q, v, lists, pack)
        parts = _tiles(lists.kv_block, sizes["BLOCK_N"])
        if grid := parts * blocks * heads_kv * _batch(q, p):
            listing = _inverse(inverse(given, blocks, _batch(q, p)))
            _module("bwd").dkdv[(grid,)](
                *inputs, _view(dk), _view(dv), *rest, listing, p.softmax_scale,
                blocks, heads_kv, pack, heads // heads_kv, **sizes,
            )  # fmt: skip
        sizes = _constants("dq", q, v, lists, pack)
        if grid := _row_grid(q, p, lists, pack, sizes["BLOCK_M"]):
            _module("bwd").dq[(grid,)](
                *inputs, _view(dq), *rest, _lists(given), p.softmax_scale, p.max_seqlen_q,
                heads // pack, pack, heads // heads_kv, **sizes,
            )  # fmt: skip
    if p.sinks is not None:
        dsinks.copy_(sink_gradient(p.sinks, lse, delta))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.block_sparse.{kind}",
        op=f"block_sparse_{kind}",
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(*_COMMON, SelfTest(f"block_sparse.{kind}")),
        score=50.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "rows that share a list in a tile, keys gathered from its blocks"),
    _spec("bwd", "dQ over lists, dK and dV over their inverse; no atomics"),
)
