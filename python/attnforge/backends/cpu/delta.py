"""``cpu.linear.delta_*``: the chunk and step kernels of ``csrc/cpu/linear/delta_*.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import DeltaGrads, DeltaParams
from attnforge.backends.cpu.linear import _dense, _native_op, _unit, clear_rest
from attnforge.registry.predicates import Available, Device, Dim, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def _parameters(p: DeltaParams) -> tuple[Any, ...]:
    given = (p.g, p.beta, p.initial_state, p.cu_seqlens)
    return (*(_dense(x) for x in given), p.scale)


def delta_chunk_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: DeltaParams, out: Tensor, final_state: Tensor
) -> None:
    """Launcher of ``delta_chunk_fwd``."""
    clear_rest(p.cu_seqlens, out)
    _native_op("delta_chunk_fwd")(_unit(q), _unit(k), _unit(v), *_parameters(p), out, final_state)


def delta_chunk_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: DeltaParams,
    grads: DeltaGrads,
) -> None:
    """Launcher of ``delta_chunk_bwd``."""
    clear_rest(p.cu_seqlens, *grads[:5])
    _native_op("delta_chunk_bwd")(
        _unit(dout), _dense(dfinal_state), _unit(q), _unit(k), _unit(v), *_parameters(p), *grads
    )


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    p: DeltaParams,
    out: Tensor,
) -> None:
    """Launcher of ``delta_step``; the kernel reads a time dimension of one."""
    g = None if p.g is None else p.g.contiguous().unsqueeze(1)
    _native_op("delta_step")(
        _unit(q).unsqueeze(1), _unit(k).unsqueeze(1), _unit(v).unsqueeze(1), g,
        p.beta.contiguous(), state, _dense(state_indices), p.scale, out.unsqueeze(1),
    )  # fmt: skip


def _spec(op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.linear.{op}",
        op=op,
        backend="cpu",
        launch=f"{__name__}:{op}",
        requires=(
            Device("cpu"),
            Dtypes(torch.float32, torch.bfloat16, torch.float16),
            Dim("head_dim", 1, 1024),
            Dim("v_head_dim", 1, 1024),
            Available("libattnforge_cpu.so", _native.unavailable),
        ),
        score=100.0,  # far above the reference; room below for simpler kernels
        notes=notes,
    )


SPECS = (
    _spec("delta_chunk_fwd", "chunks of 64, triangular systems solved in blocks of 16"),
    _spec("delta_chunk_bwd", "states made again from every 8th; dq and dk have one owner"),
    _spec("delta_step", "one pass over the state for both products, one to update it"),
)
