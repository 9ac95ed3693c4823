"""``cuda.flash.*``: the CUDA C++ kernels of ``csrc/cuda/flash``, for every GPU from sm_80 on
(``sm80``) and for sm_90a alone (``sm90``).

A launcher hands over tensors, scalars and the stream in the order of the native schema; what a
kernel writes apart from its results is allocated here. Tensors whose rows do not start at
multiples of 16 bytes are copied once, as those without a unit last stride are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge import _native_cuda
from attnforge._params import FLOAT8, FlashGrads, FlashParams, FlashTape
from attnforge.backends._gpu import SPLIT, decode_splits
from attnforge.backends._gpu import contiguous as _contiguous
from attnforge.backends._gpu import on as _on
from attnforge.backends._gpu import rows as _rows
from attnforge.backends._gpu import stream as _stream
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.reference.flash import sink_gradient
from attnforge.registry.predicates import Arch, Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec, Predicate, Request

__all__ = ["BWD_DIMS_SM90", "DECODE_DIMS", "FP8_DIMS", "HEAD_DIMS", "SPECS"]

# What tiles are padded to: (head_dim, v_head_dim), as csrc/cuda/flash/tiles.h lists them.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
BWD_DIMS_SM90 = ((64, 64), (128, 128))  # the same of the backward for sm_90a
# The same of the decode for sm_90a (csrc/cuda/flash/sm90/decode_tiles.h); the last is latent.
DECODE_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256), (576, 512))
FP8_DIMS = ((64, 64), (128, 128), (256, 256))  # csrc/cuda/flash/sm90/fp8_tiles.h


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


def fwd_fp8_sm90(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``flash_fwd`` for sm_90a and e4m3; ``out_lo`` is empty, there is no backward."""
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(-math.inf)
        out.zero_()
    if out.numel() == 0:
        return
    q, k, v = map(_rows_apart, (q, k, v))
    descales = map(_contiguous, (p.score_mods.qk_descale, p.score_mods.v_descale))
    with _on(q.device):
        _operator("flash_fwd_fp8_sm90")(
            q, k, v, *map(_contiguous, p[:5]), out, lse, *descales, p.max_seqlen_q,
            p.max_seqlen_k, *_scores(p), _stream(q.device),
        )  # fmt: skip


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
    _bwd("flash_bwd", _rows, dout, dlse, tape, p, grads)


def bwd_sm90(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: FlashParams, grads: FlashGrads
) -> None:
    """Launcher of ``flash_bwd`` for sm_90a, where TMA reads ``dout``, ``q``, ``k`` and ``v``."""
    _bwd("flash_bwd_sm90", _rows_apart, dout, dlse, tape, p, grads)


def _bwd(
    name: str, rows: Callable[[Tensor], Tensor], dout: Tensor, dlse: Tensor | None,
    tape: FlashTape, p: FlashParams, grads: FlashGrads,
) -> None:  # fmt: skip
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
        _operator(name)(
            rows(dout), _contiguous(dlse), *map(rows, (q, k, v)), _rows(out), lse,
            _rows(out_lo) if out_lo.dim() > 1 else None, *map(_contiguous, p[:5]), dq, dk, dv,
            delta, p.max_seqlen_q, p.max_seqlen_k, *_scores(p), _stream(q.device),
        )  # fmt: skip
    if p.sinks is not None:
        dsinks.copy_(sink_gradient(p.sinks, lse, delta))


def decode(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, num_splits: int
) -> None:
    """Launcher of ``flash_decode``: several splits go through an fp32 workspace and ``merge``."""
    q, k, v = map(_rows, (q, k, v))
    _decode("flash_decode", q, k, v, p, out, lse, num_splits)


def decode_sm90(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, num_splits: int
) -> None:
    """The same for sm_90a. A latent ``v``, the first channels of ``k``, is that of a copy too."""
    latent = k.data_ptr() == v.data_ptr() and k.stride() == v.stride()
    q, k, width = _rows(q), _rows_apart(k), v.shape[-1]
    v = k[..., :width] if latent and width <= k.shape[-1] else _rows_apart(v)
    _decode("flash_decode_sm90", q, k, v, p, out, lse, num_splits)


def _decode(
    name: str, q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor,
    num_splits: int,
) -> None:  # fmt: skip
    if out.numel() == 0:
        return
    splits = decode_splits(k.shape[1], num_splits)
    parts, stats = None, None
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        stats = lse.new_empty((splits, *lse.shape))
    with _on(q.device):
        stream = _stream(q.device)
        _operator(name)(
            q, k, v, *map(_contiguous, p[2:5]), out, lse, parts, stats, *_scores(p),
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


class _Float8Queries:
    """Beside fp8 k and v, q is fp8 too; the request has ``q_bytes`` where it is another dtype."""

    def __call__(self, request: Request, /) -> str | None:
        return None if request.dim("q_bytes") is None else "q is wider than k and v"

    def __str__(self) -> str:
        return "q of the same dtype"


_HALVES = (torch.bfloat16, torch.float16)
_PLAIN = Features(
    *("varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left", "window_right"),
)
_SHAPES = (Dim("head_dim", 8, 256, 8), Dim("v_head_dim", 8, 256, 8), _PLAIN)
_SHAPES_128 = (Dim("head_dim", 8, 128, 8), Dim("v_head_dim", 8, 128, 8), _PLAIN)  # BWD_DIMS_SM90
_LONG_SHAPES = (Dim("head_dim", 8, 576, 8), Dim("v_head_dim", 8, 512, 8), _PLAIN)
_LIBRARY = Available("libattnforge_cuda.so", _native_cuda.unavailable)
_SM80 = (Device("cuda"), Arch(80), Dtypes(torch.float32, *_HALVES))
_SM90 = (Device("cuda"), Arch(90, 90), Dtypes(*_HALVES))
_FP8 = (
    Device("cuda"), Arch(90, 90), Dtypes(FLOAT8), _Float8Queries(),
    Dim("head_dim", 16, 256, 16), Dim("v_head_dim", 16, 256, 16), _PLAIN,
)  # fmt: skip
_SM90_LIBRARY = Available("sm_90a in libattnforge_cuda.so", _sm90_unavailable)


def _spec(
    kind: str, op: str, notes: str, requires: tuple[Predicate, ...] = (*_SM80, *_SHAPES, _LIBRARY),
    arch: str = "sm80", score: float = 40.0, test: str = "",
) -> KernelSpec:  # fmt: skip
    # Scores are below Triton's 50: proved under the host emulator, not run on a GPU yet.
    launcher = kind if arch == "sm80" else f"{kind}_{arch}"
    return KernelSpec(
        id=f"cuda.flash.{kind}.{arch}",
        op=op,
        backend="cuda",
        launch=f"{__name__}:{launcher}",
        requires=(*requires, SelfTest(f"flash.{test or kind}", launcher)),
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
        (*_SM90, *_SHAPES, _SM90_LIBRARY), "sm90", 45.0,
    ),
    _spec(
        "fwd", "flash_fwd", "e4m3 products, P as two terms, V transposed in the producer's warps",
        (*_FP8, _SM90_LIBRARY), "fp8_sm90", 45.0,
    ),
    _spec(
        "bwd", "flash_bwd", "TMA and wgmma, dK and dV apart from dQ, one owner per sum, no atomics",
        (*_SM90, *_SHAPES_128, _SM90_LIBRARY), "sm90", 45.0,
    ),
    _spec(
        "decode", "flash_decode", "TMA and wgmma, 64 rows of a group, a latent V is not loaded",
        (*_SM90, *_LONG_SHAPES, _SM90_LIBRARY), "sm90", 45.0, "latent_decode",
    ),
)  # fmt: skip
