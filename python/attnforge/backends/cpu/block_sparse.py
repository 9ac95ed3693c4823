"""``cpu.block_sparse.*``: the C++ kernels of ``csrc/cpu/block_sparse``."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import BlockLists, FlashParams, FlashTape
from attnforge.backends.cpu.flash import _contiguous, _has_extras, _native_op, _unit
from attnforge.reference.flash import sink_gradient
from attnforge.registry.predicates import Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def _lists(lists: BlockLists) -> tuple[Tensor, Tensor | None]:
    counts = lists.counts
    return lists.indices.contiguous(), None if counts is None else counts.contiguous()


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: FlashParams,
    lists: BlockLists,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
) -> None:
    """Launcher of ``block_sparse_fwd``."""
    if _has_extras(p):
        p = _contiguous(p)
    low = out_lo if out_lo.dim() > 1 else None
    _native_op("block_sparse_fwd")(
        *(_unit(q), _unit(k), _unit(v), *_lists(lists), *p[:5], out, lse, low),
        *(*p[5:11], lists.q_block, lists.kv_block),
    )


def bwd(
    dout: Tensor,
    dlse: Tensor | None,
    tape: FlashTape,
    p: FlashParams,
    lists: BlockLists,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Launcher of ``block_sparse_bwd``; dsinks is summed here from delta."""
    q, k, v, out, lse, out_lo = tape
    if q.numel() == 0:  # no rows: nothing reaches the keys
        for x in grads:
            x.zero_()
        return
    if _has_extras(p):
        p = _contiguous(p)
    delta = torch.empty_like(lse)
    _native_op("block_sparse_bwd")(
        _unit(dout),
        None if dlse is None else dlse.contiguous(),
        *map(_unit, (q, k, v, out)),
        lse.contiguous(),
        out_lo if out_lo.dim() > 1 else None,
        *_lists(lists),
        *p[:5],
        *grads[:3],
        delta,
        *p[5:11],
        lists.q_block,
        lists.kv_block,
    )
    if p.sinks is not None:
        grads[3].copy_(sink_gradient(p.sinks, lse, delta))


_REQUIRES = (
    Device("cpu"),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Dim("head_dim", 8, 256, 8),
    Dim("v_head_dim", 8, 256, 8),
    Features(
        *("varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left", "window_right"),
    ),
    Available("libattnforge_cpu.so", _native.unavailable),
)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.block_sparse.{kind}",
        op=f"block_sparse_{kind}",
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=_REQUIRES,
        score=100.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "rows gathered by key block, online softmax in fp32"),
    _spec("bwd", "key blocks over inverse lists, no atomics"),
)
