"""``cpu.flash.*``: the tiled C++ kernels of ``csrc/cpu/flash``.

One source per kernel, compiled per ISA level; the library picks the level when it loads. A
launcher hands over tensors and scalars in the order of the native schema and allocates nothing
but the backward's delta, [B, Hq, Sq] fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import FLOAT8, SCORE_FNS, FlashGrads, FlashMods, FlashParams, FlashTape
from attnforge.backends.cpu._flash_grads import GradBuffers
from attnforge.reference.flash import sink_gradient
from attnforge.registry.predicates import Available, Device, Dim, Dtypes, Features
from attnforge.registry.space import Config, SearchSpace
from attnforge.registry.spec import KernelSpec, Request

__all__ = ["SPECS"]


@cache  # overloads of a loaded library never change
def _native_op(name: str) -> Any:
    return _native.operator(name)


def _unit(x: Tensor) -> Tensor:
    """``x`` itself if its last stride is 1, else a copy: the one layout kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(p: FlashParams) -> FlashParams:
    """Index and per-head tensors contiguous (a no-op for all but sliced ones)."""
    fields: Any = {n: x.contiguous() for n, x in p._asdict().items() if isinstance(x, Tensor)}
    return p._replace(**fields)


# Mods that may be large stay as they lie; kernels walk their strides.
_STRIDED = frozenset({"mask", "key_bias", "bias", "decay", "row_scale"})


def _mods(p: FlashParams) -> list[Tensor | None]:
    """The mods as kernels take them: last stride 1, small ones contiguous."""
    if not p.mods:
        return []
    return [
        x if x is None else _unit(x) if name in _STRIDED else x.contiguous()
        for name, x in zip(FlashMods._fields, p.mods, strict=False)
    ]


def _has_extras(p: FlashParams) -> bool:
    return not (
        p.cu_seqlens_q is None
        and p.seqused_k is None
        and p.alibi_slopes is None
        and p.sinks is None
    )


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: FlashParams,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
    *,
    config: Config,
) -> None:
    """Launcher of ``flash_fwd``."""
    if _has_extras(p):
        p = _contiguous(p)
    low = out_lo if out_lo.dim() > 1 else None
    mods = (_mods(p), *p[12:15])
    _native_op("flash_fwd")(
        _unit(q), _unit(k), _unit(v), *p[:5], out, lse, low, *p[5:11], *mods, config.row
    )


def bwd(
    dout: Tensor,
    dlse: Tensor | None,
    tape: FlashTape,
    p: FlashParams,
    grads: FlashGrads,
    *,
    config: Config,
) -> None:
    """Launcher of ``flash_bwd``; dsinks is summed here from delta."""
    q, k, v, out, lse, out_lo = tape
    dq, dk, dv, dsinks = grads[:4]
    if q.numel() == 0:  # no rows: nothing reaches the keys
        for x in grads:
            x.zero_()
        return
    if _has_extras(p):
        p = _contiguous(p)
    delta = torch.empty_like(lse)
    buffers = GradBuffers.plan(q, k, p, grads)
    low = out_lo if out_lo.dim() > 1 else None
    _native_op("flash_bwd")(
        _unit(dout),
        None if dlse is None else dlse.contiguous(),
        *map(_unit, (q, k, v, out)),
        lse.contiguous(),
        low,
        *p[:5],
        dq,
        dk,
        dv,
        delta,
        *p[5:11],
        _mods(p),
        *p[12:15],
        config.row,
        *buffers,
    )
    if p.mods:
        buffers.finish(p, grads)
    if p.sinks is not None:
        dsinks.copy_(sink_gradient(p.sinks, lse, delta))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: FlashParams,
    out: Tensor,
    lse: Tensor,
    num_splits: int,
    *,
    config: Config,
) -> None:
    """Launcher of ``flash_decode``."""
    if _has_extras(p):
        p = _contiguous(p)
    _native_op("flash_decode")(
        *(_unit(q), _unit(k), _unit(v), *p[2:5], out, lse),
        *(*p[7:11], _mods(p), *p[12:15], num_splits, config.row),
    )


def merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Launcher of ``merge_states``; the kernel takes the parts as one stacked tensor."""
    values, stats = torch.stack(outs), torch.stack(lses).float()
    if values.dim() == 4:  # packed [T, H, D]: one sequence to the kernel
        values, stats = values.unsqueeze(1), stats.unsqueeze(1)
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    _native_op("merge_states")(values, stats, out, lse)


class _HeadDims:
    """D up to 256 and Dv up to 1024 in steps of 8, or the latent pair 576/512."""

    _step = Dim("head_dim", 8, 256, 8)
    _v_step = Dim("v_head_dim", 8, 1024, 8)

    def __call__(self, request: Request, /) -> str | None:
        if (request.dim("head_dim"), request.dim("v_head_dim")) == (576, 512):
            return None
        return self._step(request) or self._v_step(request)

    def __str__(self) -> str:
        return "head_dim 8..256 and v_head_dim 8..1024 in steps of 8, or 576 with 512"


_COMMON = (
    Device("cpu"),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    _HeadDims(),
    Features(
        *("varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left", "window_right"),
        *("row_bounds", "mask", "segments", "key_bias", "bias", "rel_bias", "forget_gate"),
        *("row_scale", "rope", "dropout", *SCORE_FNS[1:]),
    ),
    Available("libattnforge_cpu.so", _native.unavailable),
)
# fp8 is widened as it is read. It has no backward.
_FORWARD = (_COMMON[0], Dtypes(*_COMMON[1].dtypes, FLOAT8), *_COMMON[2:])
# Merging is elementwise over head_dim and takes any.
_MERGE = (_COMMON[0], _COMMON[1], _COMMON[4])


def _space(kernel: str, reason: str, **parameters: Sequence[int]) -> SearchSpace:
    """Run-time tiles of a kernel, in the order of its native operator's list ``tiles``.

    0 is the kernel's own choice: the numbers and their reasons stand in the C++ file.
    """
    return SearchSpace(
        {name: (0, *values) for name, values in parameters.items()},
        dict.fromkeys(parameters, 0),
        f"0 is the kernel's own choice, {reason}",
        environment=lambda: {"isa": _native.isa(), "threads": torch.get_num_threads()},
        source=lambda: _native.source_digest(kernel),
    )


# Large query tiles stream packed K and V less often, small ones leave room in L1 and L2. Waves
# bound the packed K and V that share the last cache.
_FWD = _space(
    "flash/fwd",
    "48 queries by 256 keys, waves of 8 MiB; bf16 on matrix tiles 128 queries, waves of 1 MiB",
    block_m=(24, 96, 144),
    block_n=(64, 128),
    wave_bytes=(2 << 20, 32 << 20),
)
# Short splits balance many cores, long ones merge less; chunks stand beside each other in L1.
_DECODE = _space(
    "flash/decode",
    "splits of 2048 keys, 8 KiB of K at a time",
    split_keys=(512, 1024, 4096, 8192),
    chunk_keys=(8, 32, 64),
)
# Chunks share out the keys: more of them balance many cores, fewer need fewer fp32 slabs of dQ.
_BWD = _space(
    "flash/bwd",
    "96 queries by 96 keys (64 for head_dim above 96), 16 chunks",
    block_m=(48, 192),
    block_n=(32, 64),
    chunks=(8, 32),
)


def _spec(kind: str, op: str, notes: str, space: SearchSpace | None = None) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.flash.{kind}",
        op=op,
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=_MERGE if kind == "merge" else _COMMON if kind == "bwd" else _FORWARD,
        score=100.0,  # far above the reference; room below for simpler kernels
        space=space,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "flash_fwd", "tiles over query rows, packed K^T, online softmax in fp32", _FWD),
    _spec("bwd", "flash_bwd", "recomputed probabilities, fp32 delta, no atomics", _BWD),
    _spec("decode", "flash_decode", "split over keys, merged by LSE; K and V read once", _DECODE),
    _spec("merge", "merge_states", "weighted sum of parts by LSE"),
)
