"""``cuda.block_sparse.*.sm80``: the CUDA C++ kernels of ``csrc/cuda/block_sparse``.

Kernels take ascending lists without repetition and, for dK and dV, their inverse
(``backends._block_lists``); nothing here looks at a value of a tensor. ``block_sparse_decode`` has
no kernel of its own: its lists are page tables of ``cuda.paged.fwd``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnforge._params import BlockLists, FlashParams, FlashTape
from attnforge.backends import _block_lists, _gpu
from attnforge.backends.cuda import flash
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.reference.flash import sink_gradient
from attnforge.registry.spec import KernelSpec

__all__ = ["HEAD_DIMS", "SPECS"]

# What tiles are padded to, as csrc/cuda/block_sparse/tiles.h lists them.
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
_REQUIRES = (*flash._SM80, *flash._SHAPES, flash._LIBRARY)


def fwd(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, lists: BlockLists,
    out: Tensor, lse: Tensor, out_lo: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``block_sparse_fwd``."""
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(-math.inf)
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0:
        return
    given = _block_lists.ascending(lists, _block_lists.blocks_of(k, p, lists.kv_block), p)
    with _gpu.on(q.device):
        flash._operator("block_sparse_fwd")(
            *map(_gpu.rows, (q, k, v)), *given, *map(_gpu.contiguous, p[:5]), out, lse,
            out_lo if out_lo.dim() > 1 else None, p.max_seqlen_q, p.max_seqlen_k,
            *flash._scores(p), lists.q_block, lists.kv_block, _gpu.stream(q.device),
        )  # fmt: skip


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: FlashParams, lists: BlockLists,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Launcher of ``block_sparse_bwd``; dsinks is summed here from delta."""
    q, k, v, out, lse, out_lo = tape
    dq, dk, dv, dsinks = grads
    if p.cu_seqlens_q is not None or q.numel() == 0:  # rows and slots of no sequence
        for x in grads:
            x.zero_()
    if q.numel() == 0:
        return
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    blocks = _block_lists.blocks_of(k, p, lists.kv_block)
    given = _block_lists.ascending(lists, blocks, p)
    sequences = q.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    listing = _block_lists.inverse(given, blocks, sequences)
    with _gpu.on(q.device):
        flash._operator("block_sparse_bwd")(
            _gpu.rows(dout), _gpu.contiguous(dlse), *map(_gpu.rows, (q, k, v, out)), lse,
            _gpu.rows(out_lo) if out_lo.dim() > 1 else None, *given, *listing[:2],
            *map(_gpu.contiguous, p[:5]), dq, dk, dv, delta, p.max_seqlen_q, p.max_seqlen_k,
            *flash._scores(p), lists.q_block, lists.kv_block, listing.each,
            _gpu.stream(q.device),
        )  # fmt: skip
    if p.sinks is not None:
        dsinks.copy_(sink_gradient(p.sinks, lse, delta))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cuda.block_sparse.{kind}.sm80",
        op=f"block_sparse_{kind}",
        backend="cuda",
        launch=f"{__name__}:{kind}",
        requires=(*_REQUIRES, SelfTest(f"block_sparse.{kind}")),
        # As flash's: proved under the host emulator, not run on a GPU yet.
        score=40.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "rows that share a list in a tile, cp.async gathers the keys of its blocks"),
    _spec("bwd", "dQ over lists, dK and dV over their inverse; no atomics"),
)
