"""``jit.flash.*``: the forward and decode of ``csrc/cuda/flash``, compiled at first use.

One kernel per dtype, head dims (in steps of 16), features and mods of the call. They are those of
the sm_80 class, with the same launch rules as ``cuda.flash.*``.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from attnforge import jit
from attnforge._params import FlashParams
from attnforge.backends._gpu import SPLIT, contiguous, decode_splits, on, rows, stream
from attnforge.backends.jit import _load, _structs
from attnforge.backends.jit._selftest import SelfTest
from attnforge.backends.jit._source import Program, pack_mod
from attnforge.registry.predicates import Arch, Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]

_FAR = 1 << 29  # kFar of csrc/cuda/tile/sequence.h
_DECODE_ROWS = 16  # kDecodeRows
_LOG2E = 1 / math.log(2)
_load_kernel = _load.load  # tests put the emulator here


def fwd(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``flash_fwd``."""
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(-math.inf)
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0:
        return
    with on(q.device):
        _rows_kernel("fwd", q, k, v, p, (out, lse, out_lo if out_lo.dim() > 1 else None))


def decode(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, num_splits: int
) -> None:
    """Launcher of ``flash_decode``: several splits go through an fp32 workspace and a merge."""
    if out.numel() == 0:
        return
    splits, parts = decode_splits(k.shape[1], num_splits), None
    if splits > 1:
        parts = (out.new_empty((splits, *out.shape), dtype=torch.float32),
                 lse.new_empty((splits, *lse.shape)))  # fmt: skip
    few = q.shape[1] * (q.shape[2] // k.shape[2]) <= _DECODE_ROWS
    size = 0 if num_splits > 0 else SPLIT
    with on(q.device):
        kind = "decode" if few else "fwd"
        _rows_kernel(kind, q, k, v, p, (out, lse, None), parts, size, packed=True)
        if parts is not None:
            _merge(*parts, out, lse)


def _rows_kernel(
    kind: str, q: Tensor, k: Tensor, v: Tensor, p: FlashParams,
    results: tuple[Tensor, Tensor, Tensor | None], parts: tuple[Tensor, Tensor] | None = None,
    split_keys: int = 0, packed: bool = False,
) -> None:  # fmt: skip
    """A kernel that owns query rows. packed: rows of a group's heads share tiles."""
    q, k, v = map(rows, (q, k, v))
    whole: Any = {name: contiguous(getattr(p, name)) for name in p._fields[:5]}
    p = p._replace(**whole)
    mods = jit.known(p.score_fn)
    program = Program(
        kind, v.dtype, _padded(q.shape[-1]), _padded(v.shape[-1]),
        kind == "decode" or p.softcap > 0 or p.alibi_slopes is not None, mods,
    )  # fmt: skip
    kernel = _load_kernel(program, q.device)
    call = program.call()
    call.params.problem = problem = _problem(q, k, v, p)
    out, lse, out_lo = results
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out), ("out_lo", out_lo)):
        if x is not None:
            setattr(call.params, name, _structs.TensorRef.of(x))
    call.params.lse = _structs.RowStat.of(lse)
    call.splits.splits = 1
    if parts is not None:
        call.splits.splits, call.splits.keys = parts[0].shape[0], split_keys
        call.splits.out = _structs.TensorRef.of(parts[0][0])
        call.splits.lse = _structs.RowStat.of(parts[1][0])
        call.splits.out_stride, call.splits.lse_stride = (x.stride(0) for x in parts)
    # Rows of short sequences share tiles with the other heads of their group.
    pack = packed or problem.seqlen_q <= kernel.shape.rows // 2
    group = problem.heads_q // problem.heads_k
    call.grid = grid = _grid(problem, kernel.shape.rows, group if pack else 1, call.splits.splits)
    if mods:
        tensors = [x for x in p.jit_tensors if x is not None]
        call.mod = pack_mod(mods, tensors)
    if grid.blocks > 0:
        kernel.launch(grid.blocks, call, stream(q.device))


def _merge(parts: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Parts [splits, B, S, H, D] fp32 with their LSEs become one state."""
    program = Program("merge", out.dtype)
    kernel = _load_kernel(program, out.device)
    batch, seqlen, heads, dim = out.shape
    params = _structs.Merge(
        _structs.DTYPES[out.dtype][1], parts.shape[0], batch, seqlen, heads, dim,
        *(x.data_ptr() for x in (parts, lses, out, lse)),
    )  # fmt: skip
    blocks = -(-batch * seqlen * heads // kernel.shape.rows)
    kernel.launch(blocks, program.call(params), stream(out.device))


def _padded(dim: int) -> int:
    """What tiles are padded to: mma.sync takes 16 channels at a time."""
    return -(-dim // 16) * 16


def _problem(q: Tensor, k: Tensor, v: Tensor, p: FlashParams) -> _structs.Problem:
    """The twin of ``problem`` of csrc/bindings/tensors.h; its tensors are contiguous."""
    found, varlen = _structs.Problem(), p.cu_seqlens_q is not None
    found.dtype = found.q_dtype = found.out_dtype = _structs.DTYPES[v.dtype][1]
    found.batch = p.cu_seqlens_q.shape[0] - 1 if p.cu_seqlens_q is not None else q.shape[0]
    found.seqlen_q, found.seqlen_k = p.max_seqlen_q, p.max_seqlen_k
    found.total_q, found.total_k = (q.shape[0], k.shape[0]) if varlen else (0, 0)
    found.heads_q, found.heads_k = q.shape[-2], k.shape[-2]
    found.head_dim, found.v_head_dim = q.shape[-1], v.shape[-1]
    for name in p._fields[:5]:
        x = getattr(p, name)
        setattr(found, name, None if x is None else x.data_ptr())
    found.seqused_batch = 1
    if p.alibi_slopes is not None and p.alibi_slopes.dim() == 2:
        found.alibi_batch_stride = found.heads_q
    found.softmax_scale, found.softcap = p.softmax_scale, p.softcap
    found.window_left, found.window_right = p.window_left, p.window_right
    return found


def _grid(p: _structs.Problem, block_m: int, pack: int, splits: int) -> _structs.Grid:
    """The twin of ``RowGrid::of`` and ``ScoreMap::of``."""
    window = (_FAR if w < 0 or w > _FAR else w for w in (p.window_left, p.window_right))
    gain = 2 * _LOG2E * (p.softmax_scale / p.softcap) if p.softcap > 0 else 0.0
    scores = _structs.ScoreMap(
        p.softmax_scale * _LOG2E, gain, p.softcap * _LOG2E, (ctypes.c_int32 * 2)(*window),
        p.alibi_slopes is not None,
    )  # fmt: skip
    tiles = -(-p.seqlen_q * pack // block_m)
    return _structs.Grid(splits, tiles, p.heads_q // pack, p.batch, pack, 0, 0x7FFFFFFF, scores)


def _spec(kind: str, op: str, notes: str) -> KernelSpec:
    # Below kernels that need no compiler at run time, above the reference.
    return KernelSpec(
        id=f"jit.flash.{kind}",
        op=op,
        backend="jit",
        launch=f"{__name__}:{kind}",
        requires=(
            Device("cuda"),
            Arch(80),
            Dtypes(torch.float32, torch.bfloat16, torch.float16),
            Dim("head_dim", 8, 256, 8),
            Dim("v_head_dim", 8, 256, 8),
            Features(
                *("varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left"),
                *("window_right", "score_mod", "mask_mod"),
            ),
            Available("CuPy and NVRTC (attnforge[jit])", _load.unavailable),
            SelfTest(f"flash.{kind}"),
        ),
        score=10.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "flash_fwd", "score and mask functions of a user's own, head dims in steps of 16"),
    _spec("decode", "flash_decode", "the same over a cache, with splits and their merge"),
)
