"""``triton.flash.*``: the Triton kernels of ``triton_kernels/flash``.

Launchers turn tensors and parameters into the named tuples of ``triton_kernels.lang``, choose a
tile and start a kernel on the tensor's device.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import FLOAT8, SCORE_FNS, FlashGrads, FlashParams, FlashTape
from attnforge.backends.triton import _flash_mods, _interpreter
from attnforge.backends.triton._flash_grads import Sums, by_distance, turn_back
from attnforge.backends.triton._flash_tiles import padded, space
from attnforge.backends.triton._flash_tiles import sizes as sizes_of
from attnforge.backends.triton._selftest import SelfTest
from attnforge.reference.flash import sink_gradient
from attnforge.registry.predicates import Available, Device, Dim, Dtypes, Features
from attnforge.registry.space import Config, SearchSpace
from attnforge.registry.spec import KernelSpec, Request
from attnforge.triton_kernels.flash import config as tiles_of

__all__ = ["SPECS"]

_FAR = 1 << 30  # a window at or past it is as wide as any sequence; sums of two stay in 32 bit
_SKEWED = 1 << 26  # elements of the workspace of drel_bias, unless one head needs more
_SPLIT = 2048  # keys of a decode's split unless the caller wants another number of them
_LOG2E = math.log2(math.e)


@cache  # kernels of a process never change
def _kernel(module: str, name: str) -> Any:
    """A kernel by name; importing Triton waits for the first launch."""
    if _settings.triton_interpreted():
        _interpreter.repair()
    return getattr(importlib.import_module(f"attnforge.triton_kernels.flash.{module}"), name)


@cache
def _lang() -> Any:
    return importlib.import_module("attnforge.triton_kernels.lang")


@cache
def _tensors() -> Any:
    return importlib.import_module("attnforge.triton_kernels.tensors")


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _unit(x: Tensor) -> Tensor:
    """``x`` itself if its last stride is 1, else a copy: the one layout kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _input(x: Tensor) -> Tensor:
    """``_unit``, and fp8 as bytes."""
    x = _unit(x)
    return x.view(torch.uint8) if x.dtype is FLOAT8 else x


def _view(x: Tensor) -> Any:
    """A View of [B, S, H, X], or of packed [T, H, X] as one batch entry."""
    batch = x.stride(0) if x.dim() == 4 else 0
    return _tensors().View(x, batch, x.stride(-3), x.stride(-2))


def _stat(x: Tensor) -> Any:
    """A Stat of a contiguous [B, H, S] or packed [H, T]."""
    return _tensors().Stat(x, x.stride(0) if x.dim() == 3 else 0, x.stride(-2))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sequences(q: Tensor, k: Tensor, p: FlashParams) -> Any:
    rows, keys = q.shape[-3], k.shape[-3]
    return _lang().Sequences(
        *map(_contiguous, (p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_k)), rows, keys
    )


def _flag(on: bool) -> int | None:
    return 1 if on else None


def _scores(p: FlashParams, heads: int) -> Any:
    m = p.score_mods
    slopes = _contiguous(p.alibi_slopes)
    return _lang().Scores(
        scale=p.softmax_scale * _LOG2E,
        gain=p.softmax_scale / p.softcap if p.softcap > 0 else None,
        cap=p.softcap * _LOG2E if p.softcap > 0 else None,
        slopes=slopes,
        slope_batch=None if slopes is None else slopes.stride(0) if slopes.dim() == 2 else 0,
        sinks=_contiguous(p.sinks),
        left=min(p.window_left, _FAR) if p.window_left >= 0 else None,
        right=min(p.window_right, _FAR) if p.window_right >= 0 else None,
        front=_flag(p.window_left >= 0 or m.row_bounds is not None),
        mods=_flash_mods.mods(p, heads),
        hides=_flag(any(x is not None for x in (m.row_bounds, m.mask, m.segments_q))),
        rope=_flash_mods.rope(p),
        **{name: _flag(p.score_fn == name) for name in SCORE_FNS[1:]},
    )


def _batch(q: Tensor, p: FlashParams) -> int:
    return q.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _boxed(*tensors: Tensor) -> bool:
    """Whether descriptors can describe heads: base and strides in multiples of 16 bytes.

    They give tiles as they lie, so fp8, which is widened as it is loaded, goes without.
    """
    return all(
        x.element_size() > 1
        and x.data_ptr() % 16 == 0
        and all(n > 0 and n * x.element_size() % 16 == 0 for n in x.stride()[:-1])
        for x in tensors
    )


def _start(kernel: Any, grid: tuple[int], *args: Any, **constants: Any) -> None:
    """Launch; descriptors live in memory that Triton asks an allocator for, which is torch."""

    def launch() -> None:
        import triton

        device = args[0].ptr.device
        triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device=device))
        kernel[grid](*args, **constants)

    if constants["USE_TMA"]:
        contextvars.copy_context().run(launch)  # the caller's allocator stays
    else:
        kernel[grid](*args, **constants)


def fwd(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, out_lo: Tensor,
    *, config: Config | None = None,
) -> None:  # fmt: skip
    """Launcher of ``flash_fwd``."""
    low = out_lo if out_lo.dim() > 1 else None
    if p.cu_seqlens_q is not None:  # rows of no sequence
        lse.fill_(-math.inf)
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0:
        return
    q, k, v = _input(q), _input(k), _input(v)
    heads, sizes = q.shape[-2], sizes_of("fwd", q, v, _flash_mods.heavy(p), config)
    sizes["USE_TMA"] = int(sizes["USE_TMA"] and p.score_mods.rope_cos is None and _boxed(k, v))
    tiles = _tiles(p.max_seqlen_q, sizes["BLOCK_M"])
    grid = (tiles * heads * _batch(q, p),)
    if grid[0] == 0:
        return
    with _on(q.device):
        _start(
            _kernel("fwd", "fwd"), grid,
            _view(q), _view(k), _view(v), _view(out), None if low is None else _view(low),
            _stat(lse), _sequences(q, k, p), _scores(p, heads),
            heads, heads // k.shape[-2], tiles, **sizes,
        )  # fmt: skip


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: FlashParams, grads: FlashGrads,
    *, config: Config | None = None,
) -> None:  # fmt: skip
    """Launcher of ``flash_bwd``; dsinks is summed here from delta."""
    dq, dk, dv, dsinks = grads[:4]
    q, k, v, out, dout = map(_unit, (tape.q, tape.k, tape.v, tape.out, dout))
    if p.cu_seqlens_q is not None or q.numel() == 0:  # rows and slots of no sequence
        for x in grads:
            x.zero_()
    if q.numel() == 0:
        return
    lse = tape.lse.contiguous()
    delta = torch.empty_like(lse)
    low = _unit(tape.out_lo) if tape.out_lo.dim() > 1 else None
    heads, heads_kv, batch = q.shape[-2], k.shape[-2], _batch(q, p)
    scores, sequences = _scores(p, heads), _sequences(q, k, p)
    inputs = (_view(q), _view(k), _view(v), _view(dout))
    wanted, heavy = Sums.plan(lse, k, grads), _flash_mods.heavy(p)
    columns, row_sums, by_scale = (None if x is None else _stat(x) for x in wanted)
    turned_q, turned_k = dq, dk
    if scores.rope is not None:  # zeros, as rows of no sequence are not written
        turned_q, turned_k = (x.new_zeros(x.shape, dtype=torch.float32) for x in (dq, dk))
    with _on(q.device):
        _delta(dout, out, low, dlse, lse, delta)
        sizes = sizes_of("dkdv", q, v, heavy, config)
        tiles = _tiles(
            p.max_seqlen_k if p.cu_seqlens_k is not None else k.shape[1], sizes["BLOCK_N"]
        )
        if grid := tiles * heads_kv * batch:
            _kernel("bwd", "dkdv")[(grid,)](
                *inputs, _view(turned_k), _view(dv), _stat(lse), _stat(delta), sequences, scores,
                columns, p.softmax_scale, heads_kv, heads // heads_kv, tiles, **sizes,
            )  # fmt: skip
        sizes = sizes_of("dq", q, v, heavy, config)
        tiles = _tiles(p.max_seqlen_q, sizes["BLOCK_M"])
        if grid := tiles * heads * batch:
            _kernel("bwd", "dq")[(grid,)](
                *inputs, _view(turned_q), _stat(lse), _stat(delta), sequences, scores,
                row_sums, by_scale, p.softmax_scale, heads, heads // heads_kv, tiles, **sizes,
            )  # fmt: skip
        operands = (*inputs, _stat(lse), _stat(delta), sequences, scores)
        if grads.dbias.numel():
            _dbias(operands, q, v, grads.dbias, (k.shape[1], heads // heads_kv))
        if grads.drel_bias.numel():
            _drel_bias(operands, q, v, p, grads.drel_bias, (k.shape[-3], heads // heads_kv))
    if scores.rope is not None:
        turn_back(dq, turned_q, p.score_mods.positions_q, p)
        turn_back(dk, turned_k, p.score_mods.positions_k, p)
    if p.mods:
        wanted.finish(p, grads)
    if p.sinks is not None:
        dsinks.copy_(sink_gradient(p.sinks, lse, delta))


def _launch_dbias(
    operands: tuple[Any, ...], q: Tensor, v: Tensor, grad: Any, extent: tuple[int, ...],
    sizes: tuple[int, int, int], skewed: int | None,
) -> None:  # fmt: skip
    """One launch of ``dbias``; extent: see the kernel; sizes: rows, keys, group."""
    rows, keys, group = sizes
    constants = sizes_of("dq", q, v, heavy=True)  # four operands and the sum
    tiles = (_tiles(rows, constants["BLOCK_M"]), _tiles(keys, constants["BLOCK_N"]))
    *before, lse, delta, sequences, scores = operands
    _kernel("bias", "dbias")[(tiles[0] * tiles[1] * extent[2] * extent[5],)](
        *before, grad, lse, delta, sequences, scores, group, extent[:5], tiles, skewed, **constants
    )


def _dbias(
    operands: tuple[Any, ...], q: Tensor, v: Tensor, dbias: Tensor, shape: tuple[int, int]
) -> None:
    """dbias [B|1, Hq|1, Sq, Sk] in one launch; shape: keys, group."""
    keys, group = shape
    batch, heads = dbias.shape[:2]
    extent = (0, 0, heads, q.shape[0] // batch, q.shape[2] // heads, batch)
    view = _tensors().View(dbias, dbias.stride(0), dbias.stride(2), dbias.stride(1))
    _launch_dbias(operands, q, v, view, extent, (q.shape[1], keys, group), None)


def _drel_bias(
    operands: tuple[Any, ...], q: Tensor, v: Tensor, p: FlashParams, drel_bias: Tensor,
    shape: tuple[int, int],
) -> None:  # fmt: skip
    """drel_bias [Hq|1, 2 R + 1]: sums over diagonals of dS, by batch entry and some heads a time.

    In rows that lie one element further apart than they are long, a diagonal is a column.
    """
    packed = p.cu_seqlens_q is not None
    keys, group = shape
    rows = p.max_seqlen_q if packed else q.shape[1]
    keys = p.max_seqlen_k if packed else keys
    total = torch.zeros_like(drel_bias)
    width, heads = rows + keys, drel_bias.shape[0]
    some = max(1, min(heads, _SKEWED // max(1, rows * width)))
    for b in range(_batch(q, p) if rows and keys else 0):
        for h in range(0, heads, some):
            count = min(some, heads - h)
            space = total.new_zeros(count, rows, width)
            view = _tensors().View(space, 0, width - 1, rows * width)
            extent = (b, h, count, 1, q.shape[-2] // heads, 1)
            _launch_dbias(operands, q, v, view, extent, (rows, keys, group), keys)
            total[h : h + count] += by_distance(space.sum(1), keys, drel_bias.shape[1] // 2)
    drel_bias.copy_(total)


def _delta(
    dout: Tensor, out: Tensor, low: Tensor | None, dlse: Tensor | None, lse: Tensor | None,
    delta: Tensor,
) -> None:  # fmt: skip
    """<dO, O + low> - dlse per row [B, H, S], 0 where lse is -inf; all but dO and O may be None."""
    rows, heads, dv = out.shape[-3:]
    width = padded(dv)
    block = tiles_of.merge_rows(rows, width)
    tiles = _tiles(rows, block)
    batch = out.shape[0] if out.dim() == 4 else 1
    _kernel("bwd", "delta")[(tiles * heads * batch,)](
        _view(dout), _view(out), None if low is None else _view(low),
        None if dlse is None else _stat(dlse.contiguous()), None if lse is None else _stat(lse),
        _stat(delta),
        rows, heads, tiles, DV=dv, BLOCK_M=block, BLOCK_DV=width, num_warps=4,
    )  # fmt: skip


def decode(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, num_splits: int,
    *, config: Config | None = None,
) -> None:  # fmt: skip
    """Launcher of ``flash_decode``: several splits go through an fp32 workspace and ``merge``."""
    if out.numel() == 0:
        return
    q, k, v = _input(q), _input(k), _input(v)
    heads_kv, group = k.shape[-2], q.shape[-2] // k.shape[-2]
    sizes = sizes_of("decode", q, v, _flash_mods.heavy(p), config)
    keys = max(1, k.shape[1])
    splits = _tiles(keys, _SPLIT)
    if num_splits > 0:  # a split has at least one tile
        splits = min(num_splits, _tiles(keys, sizes["BLOCK_N"]))
    many = splits > 1
    values, stats = out, lse
    if many:
        values = out.new_empty((splits, *out.shape), dtype=torch.float32)
        stats = lse.new_empty((splits, *lse.shape))
    first_value, first_stat = (values[0], stats[0]) if many else (out, lse)
    grid = splits * _tiles(q.shape[1] * group, sizes["BLOCK_M"]) * heads_kv * q.shape[0]
    with _on(q.device):
        _kernel("decode", "decode")[(grid,)](
            _view(q), _view(k), _view(v), _view(first_value), _stat(first_stat),
            values.stride(0) if many else None, stats.stride(0) if many else None,
            _sequences(q, k, p), _scores(p, q.shape[-2]), heads_kv, group, splits,
            0 if num_splits > 0 else _SPLIT, **sizes,
        )  # fmt: skip
        if many:
            _merge(values, stats, out, lse, added=p.score_fn in ("sigmoid", "relu"))


def merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Launcher of ``merge_states``; the kernel takes the parts as one stacked tensor."""
    if out.numel() == 0:
        lse.fill_(-math.inf)
        return
    with _on(out.device):
        _merge(torch.stack(outs), torch.stack(lses).float(), out, lse, inf_is_empty=True)


def _merge(
    values: Tensor, stats: Tensor, out: Tensor, lse: Tensor,
    *, inf_is_empty: bool = False, added: bool = False,
    packed: tuple[Tensor, int, int, int] | None = None,
    pieces: Any = None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """values [N, ..] and stats [N, ..] into out and lse, or their sum if ``added``.

    packed: boundaries, their number but one, least and most rows of the sequences to merge.
    pieces: of a plan, by which parts lie; sinks: that they do not have.
    """
    rows, heads, dv = out.shape[-3:]
    width = padded(dv)
    batch = out.shape[0] if out.dim() == 4 else 1
    ends, batch, fewest, longest = packed or (None, batch, 0, rows)
    block = tiles_of.merge_rows(longest, width)
    tiles = _tiles(longest, block)
    _kernel("merge", "merge")[(tiles * heads * batch,)](
        _view(values[0]), _stat(stats[0]), _view(out), _stat(lse), rows, heads, values.shape[0],
        tiles, values.stride(0), stats.stride(0),
        DV=dv, BLOCK_M=block, BLOCK_DV=width, INF_IS_EMPTY=inf_is_empty, SUM=added,
        cu_rows=ends, fewest=fewest, most=longest, pieces=pieces, sinks=_contiguous(sinks),
        num_warps=4,
    )  # fmt: skip


class _Devices(Device):
    """CUDA, and the CPU for a process whose Triton interprets."""

    def __init__(self) -> None:
        super().__init__("cuda")

    def __call__(self, request: Request, /) -> str | None:
        if request.device == "cpu" and _settings.triton_interpreted():
            return None
        return super().__call__(request)


class _DecodeDims:
    """D up to 256 and Dv up to 512 in steps of 8, or the latent pair 576/512 without rope."""

    def __call__(self, request: Request, /) -> str | None:
        if (request.dim("head_dim"), request.dim("v_head_dim")) != (576, 512):
            return next((why for dim in _FWD_DIMS if (why := dim(request))), None)
        if "rope" in request.features:
            return "rope is not served with head_dim 576 (turn q and k before the call)"
        return None

    def __str__(self) -> str:
        return "head_dim 8..256 and v_head_dim 8..512 in steps of 8, or 576 with 512"


def _missing() -> str | None:
    found = importlib.util.find_spec("triton") is not None
    return None if found else "Triton is not installed (pip install attnforge[triton])"


_PLAIN = ("varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left", "window_right")
_MODS = ("row_bounds", "mask", "segments", "key_bias", "bias", "rel_bias", "forget_gate",
         "row_scale", "rope", "dropout")  # fmt: skip
_FEATURES = {
    "fwd": (*_PLAIN, *_MODS, *SCORE_FNS[1:]),
    "bwd": (*_PLAIN, *_MODS, *SCORE_FNS[1:]),
    "decode": (*_PLAIN, *_MODS, *SCORE_FNS[1:]),
}
_FWD_DIMS = (Dim("head_dim", 8, 256, 8), Dim("v_head_dim", 8, 512, 8))
_DIMS: dict[str, tuple[Any, ...]] = {"fwd": _FWD_DIMS, "decode": (_DecodeDims(),)}
_COMMON = (
    _Devices(),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Dim("head_dim", 8, 256, 8),
    Dim("v_head_dim", 8, 256, 8),
    Features(*_PLAIN),
    Available("triton", _missing),
)
_MERGE = (*_COMMON[:2], _COMMON[-1])


def _requires(kind: str) -> tuple[Any, ...]:
    if kind == "merge":
        return _MERGE
    dtypes = _COMMON[1] if kind == "bwd" else Dtypes(*_COMMON[1].dtypes, FLOAT8)
    dims = _DIMS.get(kind, _COMMON[2:4])
    return (_COMMON[0], dtypes, *dims, Features(*_FEATURES[kind]), _COMMON[-1])


def _spec(kind: str, op: str, notes: str, space: SearchSpace | None = None) -> KernelSpec:
    return KernelSpec(
        id=f"triton.flash.{kind}",
        op=op,
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(*_requires(kind), SelfTest(f"flash.{kind}")),
        score=50.0,  # above the reference; native kernels of a device go first
        space=space,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "flash_fwd", "tiles over query rows, online softmax in base 2", space("fwd")),
    _spec(
        "bwd",
        "flash_bwd",
        "recomputed probabilities, one owner per sum, no atomics",
        space("dkdv", "dq"),
    ),
    _spec(
        "decode",
        "flash_decode",
        "rows of a group packed, fixed splits over keys",
        space("decode"),
    ),
    _spec("merge", "merge_states", "weighted sum of stacked parts by LSE"),
)
