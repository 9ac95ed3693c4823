"""``triton.linear.delta_*``: the delta rules of ``triton_kernels/linear``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnforge._params import DeltaGrads, DeltaParams
from attnforge.backends.triton._flash_tiles import padded
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import _on, _tiles, _unit
from attnforge.backends.triton.linear import (
    _REQUIRES,
    _given,
    _module,
    _operand,
    _rows,
    launch_step,
)
from attnforge.registry.spec import KernelSpec
from attnforge.triton_kernels.linear import config as tiles_of

__all__ = ["SPECS"]


def _sizes(kernel: str, k: Tensor, v: Tensor) -> tuple[int, dict[str, Any]]:
    """(column tiles, constants) of a kernel."""
    rows, columns = k.shape[3], v.shape[3]
    tile = tiles_of.delta(kernel, padded(rows), v.dtype.itemsize)
    tile["BLOCK_C"] = min(tile["BLOCK_C"], padded(columns))
    fixed = {"K": rows, "V": columns, "BLOCK_T": tiles_of.SUB, "BLOCK_K": padded(rows)}
    return _tiles(columns, tile["BLOCK_C"]), {**fixed, **tile}


def _inputs(q: Tensor, k: Tensor, v: Tensor, p: DeltaParams) -> Any:
    heads = v.shape[2]
    gate = None if p.g is None else _rows(p.g.contiguous())
    operands = (_operand(x, heads) for x in (q, k, v))
    return _module("delta").Delta(*operands, gate, _rows(p.beta.contiguous()), p.scale)


def _sequences(v: Tensor, p: DeltaParams) -> int:
    return v.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1


def _by_key(p: DeltaParams) -> bool:
    return p.g is not None and p.g.dim() == 4


def delta_chunk_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: DeltaParams, out: Tensor, final_state: Tensor
) -> None:
    """Launcher of ``delta_chunk_fwd``."""
    if p.cu_seqlens is not None:  # rows of no sequence
        out.zero_()
    q, k, v = map(_unit, (q, k, v))
    tiles, sizes = _sizes("fwd", k, v)
    if grid := tiles * v.shape[2] * _sequences(v, p):
        with _on(v.device):
            _module("delta").delta_fwd[(grid,)](
                _inputs(q, k, v, p), _rows(out), _given(p.initial_state), _given(final_state),
                None if p.cu_seqlens is None else p.cu_seqlens.contiguous(), v.shape[1],
                v.shape[2], tiles, BY_KEY=_by_key(p), **sizes,
            )  # fmt: skip


def delta_chunk_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: DeltaParams,
    grads: DeltaGrads,
) -> None:
    """Launcher of ``delta_chunk_bwd``: parts per value head and tile of columns, then sums."""
    q, k, v, dout = map(_unit, (q, k, v, dout))
    if p.cu_seqlens is not None:  # rows of no sequence
        grads.dv.zero_()
    tiles, sizes = _sizes("bwd", k, v)
    (batch, time, heads, _), width, few = v.shape, k.shape[3], k.shape[2]
    sequences, kernels = _sequences(v, p), _module("delta_bwd")
    rows = (tiles, batch, time, heads)
    fresh = p.beta.new_zeros if p.cu_seqlens is not None else p.beta.new_empty
    dq, dk = fresh(*rows, width), fresh(*rows, width)
    dbeta = fresh(*rows)
    dg = None if p.g is None else fresh(tiles, *p.g.shape)
    parts = kernels.Parts(
        *(None if x is None else _rows(x[0]) for x in (dq, dk, dbeta, dg)), dq[0].numel(),
        dbeta[0].numel(),
    )  # fmt: skip
    span = tiles_of.SUB * int(kernels.SEGMENT)
    states = (heads, width, v.shape[3])
    kept = p.beta.new_empty(batch * time // span + sequences + 1, *states)
    space = (int(kernels.SEGMENT), sizes["BLOCK_K"], sizes["BLOCK_C"])
    if grid := tiles * heads * sequences:
        with _on(v.device):
            kernels.delta_bwd[(grid,)](
                _inputs(q, k, v, p), _operand(dout, heads), _rows(grads.dv), parts,
                _given(p.initial_state), _given(dfinal_state),
                None if p.initial_state is None else grads.dinitial_state,
                kept, p.beta.new_empty(grid, *space),
                None if p.cu_seqlens is None else p.cu_seqlens.contiguous(), time, heads, tiles,
                BY_KEY=_by_key(p), **sizes,
            )  # fmt: skip
    for whole, part in ((grads.dq, dq), (grads.dk, dk)):
        whole.copy_(part.view(tiles, batch, time, few, heads // few, width).sum((0, 4)))
    grads.dbeta.copy_(dbeta.sum(0))
    if dg is not None:
        grads.dg.copy_(dg.sum(0))


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    p: DeltaParams,
    out: Tensor,
) -> None:
    """Launcher of ``delta_step``."""
    kind = "none" if p.g is None else "scalar" if p.g.dim() == 2 else "key"
    launch_step(q, k, v, state, state_indices, out, scale=p.scale, gate=p.g, kind=kind,
                beta=p.beta)  # fmt: skip


def _spec(op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.linear.{op}",
        op=op,
        backend="triton",
        launch=f"{__name__}:{op}",
        requires=(*_REQUIRES, SelfTest(f"delta.{op}")),
        score=50.0,  # above the reference; native kernels of a device go first
        notes=notes,
    )


SPECS = (
    _spec("delta_chunk_fwd", "chunks of 16, their systems solved by substitution in fp32"),
    _spec("delta_chunk_bwd", "states made again from every 8th; parts per column tile, no atomics"),
    _spec("delta_step", "a tile of a state per program, read once and written once"),
)
