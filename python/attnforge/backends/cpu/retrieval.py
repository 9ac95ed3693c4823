"""``cpu.retrieval.*``: the C++ kernels of ``csrc/cpu/retrieval``."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import FlashTape, IndexedGrads, IndexedParams
from attnforge.backends.cpu.flash import _HeadDims, _native_op, _unit
from attnforge.registry.predicates import Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def _plain(x: Tensor | None) -> Tensor | None:
    """Small tensors as kernels take them (a no-op for all but sliced ones)."""
    return None if x is None else x.contiguous()


def _low(out_lo: Tensor) -> Tensor | None:
    return out_lo if out_lo.dim() > 1 else None


def indexed_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``indexed_fwd``."""
    if p.block_table is None:
        k, v = _unit(k), _unit(v)
    _native_op("indexed_fwd")(
        *(_unit(q), k, v, *map(_plain, p[:5]), p.softmax_scale, out, lse, _low(out_lo))
    )


def indexed_bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: IndexedParams, grads: IndexedGrads
) -> None:
    """Launcher of ``indexed_bwd``; a list that all KV heads share gets the sum of its parts."""
    q, k, v, out, lse, out_lo = tape
    dbias = None
    if p.log_bias is not None:
        lists = max(p.ids.shape[1], k.shape[2])
        dbias = p.log_bias.new_zeros((p.ids.shape[0], lists, p.ids.shape[2]))
    _native_op("indexed_bwd")(
        _unit(dout),
        None if dlse is None else dlse.contiguous(),
        *map(_unit, (q, k, v, out)),
        lse.contiguous(),
        _low(out_lo),
        *map(_plain, (p.ids, p.lens, p.log_bias, p.cache_seqlens)),
        p.softmax_scale,
        *grads[:3],
        dbias,
    )
    if dbias is not None:
        shared = p.ids.shape[1] == 1
        grads.dlog_bias.copy_(dbias.sum(1, keepdim=True) if shared else dbias)


_COMMON = (
    Device("cpu"),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Available("libattnforge_cpu.so", _native.unavailable),
)
_FWD = (_HeadDims(), Dim("group", 1, 64), Features("paged", "seqused_k"))
_BWD = (
    Dim("head_dim", 8, 256, 8),
    Dim("v_head_dim", 8, 256, 8),
    Dim("group", 1, 64),
    Features("seqused_k"),
)


def _spec(kind: str, requires: tuple[object, ...], notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.retrieval.{kind}",
        op=kind,
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=(*_COMMON, *requires),  # type: ignore[arg-type]
        score=100.0,
        notes=notes,
    )


SPECS = (
    _spec("indexed_fwd", _FWD, "decode over gathered rows, one union per KV head, split lists"),
    _spec("indexed_bwd", _BWD, "a KV head per task, sums in fp32, no atomics"),
)
