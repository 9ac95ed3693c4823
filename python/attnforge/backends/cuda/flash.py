"""``cuda.flash.*``: the CUDA C++ kernels of ``csrc/cuda/flash``, for every GPU from sm_80 on
(``sm80``) and for sm_90a alone (``sm90``).

A launcher hands over tensors, scalars and the stream in the order of the native schema; what a
kernel writes apart from its results is allocated here. Tensors whose rows do not start at
multiples of 16 bytes are copied once, as those without a unit last stride are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnforge import _native_cuda
from attnforge._params import FlashGrads, FlashParams, FlashTape
from attnforge.backends._gpu import SPLIT, decode_splits
from attnforge.backends._gpu import contiguous as _contiguous
from attnforge.backends._gpu import on as _on
from attnforge.backends._gpu import rows as _rows
from attnforge.backends._gpu import stream as _stream
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.reference.flash import sink_gradient
from attnforge.registry.predicates import Arch, Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec, Predicate

__all__ = ["HEAD_DIMS", "SPECS"]

# What tiles are padded to: (head_dim, v_head_dim), as csrc/cuda/flash/tiles.h lists them.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def _operator(name: str) -> Any:
    return _native_cuda.operator(name)


def _rows_apart(x: Tensor) -> Tensor:
    """The same for TMA, which has no rows that are one and the same in memory."""
    broadcast = x.stride(-3) == 0 and x.shape[-3] > 1
    return x.clone(memory_format=torch.contiguous_format) if broadcast else _rows(x)


def _scores(p: FlashParams) -> tuple[float, int, int, float]:
    return p.softmax_scale, p.window_left, p.window_right, p.softcap


def fwd(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``flash_fwd``."""
    q, k, v = map(_rows, (q, k, v))
    _fwd("flash_fwd", q, k, v, p, out, lse, out_lo)


def fwd_sm90(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``flash_fwd`` for sm_90a, where TMA reads ``q``, ``k`` and ``v``."""
    q, k, v = map(_rows_apart, (q, k, v))
    _fwd("flash_fwd_sm90", q, k, v, p, out, lse, out_lo)


def _fwd(
    name: str, q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor,
    out_lo: Tensor,
) -> None:  # fmt: skip
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(-math.inf)
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0:
        return
    with _on(q.device):
        _operator(name)(
            q, k, v, *map(_contiguous, p[:5]), out, lse, out_lo if out_lo.dim() > 1 else None,
            p.max_seqlen_q, p.max_seqlen_k, *_scores(p), _stream(q.device),
        )  # fmt: skip


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: FlashParams, grads: FlashGrads
) -> None:
    """Launcher of ``flash_bwd``; dsinks is summed here from delta."""
    q, k, v, out, lse, out_lo = tape
    dq, dk, dv, dsinks = grads[:4]
    if p.cu_seqlens_q is not None or q.numel() == 0:  # rows and slots of no sequence
        for x in grads:
            x.zero_()
    if q.numel() == 0:
        return
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    with _on(q.device):
        _operator("flash_bwd")(
            _rows(dout), _contiguous(dlse), *map(_rows, (q, k, v, out)), lse,
            _rows(out_lo) if out_lo.dim() > 1 else None, *map(_contiguous, p[:5]), dq, dk, dv,
            delta, p.max_seqlen_q, p.max_seqlen_k, *_scores(p), _stream(q.device),
        )  # fmt: skip
    if p.sinks is not None:
        dsinks.copy_(sink_gradient(p.sinks, lse, delta))


def decode(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, num_splits: int
) -> None:
    """Launcher of ``flash_decode``: several splits go through an fp32 workspace and ``merge``."""
    if out.numel() == 0:
        return
    splits = decode_splits(k.shape[1], num_splits)
    parts, stats = None, None
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        stats = lse.new_empty((splits, *lse.shape))
    with _on(q.device):
        stream = _stream(q.device)
        _operator("flash_decode")(
            *map(_rows, (q, k, v)), *map(_contiguous, p[2:5]), out, lse, parts, stats, *_scores(p),
            0 if num_splits > 0 else SPLIT, stream,
        )  # fmt: skip
        if splits > 1:
            _operator("merge_states")(parts, stats, out, lse, False, stream)


def merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Launcher of ``merge_states``; the kernel takes the parts as one stacked tensor."""
    if out.numel() == 0:
        lse.fill_(-math.inf)
        return
    with _on(out.device):
        parts, stats = torch.stack(outs), torch.stack(lses).float()
        _operator("merge_states")(parts, stats, out, lse, True, _stream(out.device))


def _sm90_unavailable() -> str | None:
    why = _native_cuda.unavailable()
    if why is None and "fwd_sm90." not in _native_cuda.build()["kernels"]:
        why = "libattnforge_cuda.so has no code for sm_90a; build with 90a in ATTNFORGE_CUDA_ARCHS"
    return why


_HALVES = (torch.bfloat16, torch.float16)
_SHAPES = (
    Dim("head_dim", 8, 256, 8),
    Dim("v_head_dim", 8, 256, 8),
    Features(
        *("varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left", "window_right"),
    ),
)
_LIBRARY = Available("libattnforge_cuda.so", _native_cuda.unavailable)
_SM80 = (Device("cuda"), Arch(80), Dtypes(torch.float32, *_HALVES))
_SM90 = (Device("cuda"), Arch(90, 90), Dtypes(*_HALVES))


def _spec(
    kind: str, op: str, notes: str, requires: tuple[Predicate, ...] = (*_SM80, *_SHAPES, _LIBRARY),
    arch: str = "sm80", score: float = 40.0,
) -> KernelSpec:  # fmt: skip
    # Scores are below Triton's 50: proved under the host emulator, not run on a GPU yet.
    launcher = kind if arch == "sm80" else f"{kind}_{arch}"
    return KernelSpec(
        id=f"cuda.flash.{kind}.{arch}",
        op=op,
        backend="cuda",
        launch=f"{__name__}:{launcher}",
        requires=(*requires, SelfTest(f"flash.{kind}", launcher)),
        score=score,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "flash_fwd", "mma.sync and cp.async, heads of a group packed in short calls"),
    _spec("bwd", "flash_bwd", "recomputed probabilities, one owner per sum, no atomics"),
    _spec("decode", "flash_decode", "rows of a group packed, warps share out keys, fixed splits"),
    _spec("merge", "merge_states", "a warp per row, parts added in order", (*_SM80, _LIBRARY)),
    _spec(
        "fwd", "flash_fwd", "TMA and wgmma, persistent, a producer and two consumer warpgroups",
        (*_SM90, *_SHAPES, Available("sm_90a in libattnforge_cuda.so", _sm90_unavailable)),
        "sm90", 45.0,
    ),
)  # fmt: skip
