"""``cpu.linear.*``: the additive recurrence in C++, ``csrc/cpu/linear``.

A launcher hands over tensors and scalars in the order of the native schema. Rows behind the last
sequence of a packed batch are its own to clear: the kernels walk sequences only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape
from attnforge.registry.predicates import Available, Device, Dim, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS", "clear_rest"]

_GATES = ("none", "head", "scalar", "key", "value")
_NORMS = ("", "sum", "abs")


@cache  # overloads of a loaded library never change
def _native_op(name: str) -> Any:
    return _native.operator(name)


def _unit(x: Tensor) -> Tensor:
    """``x`` itself if its last stride is 1, else a copy: the one layout kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _numbers(p: LinearParams) -> tuple[int, int, float, float]:
    return _GATES.index(p.gate_kind), _NORMS.index(p.normalize), p.scale, p.eps


def clear_rest(cu_seqlens: Tensor | None, *outputs: Tensor) -> None:
    """Rows [B, T, ..] behind the last sequence: no kernel writes them, and they are 0."""
    if cu_seqlens is None:
        return
    covered = int(cu_seqlens[-1])
    for x in outputs:
        if x.dim() > 1 and covered < x.shape[1]:  # what a call does not return is [0]
            x[:, covered:] = 0.0


def _states(p: LinearParams) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return _dense(p.initial_state), _dense(p.initial_z), _dense(p.cu_seqlens)


def chunk_fwd(q: Tensor, k: Tensor, v: Tensor, p: LinearParams, outputs: LinearOutputs) -> None:
    """Launcher of ``linear_chunk_fwd``."""
    clear_rest(p.cu_seqlens, outputs.out, outputs.den, outputs.out_lo)
    operands = (_unit(q), _unit(k), _unit(v), _dense(p.gate), *_states(p))
    _native_op("linear_chunk_fwd")(*operands, *outputs, *_numbers(p), p.causal)


def chunk_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    dfinal_z: Tensor | None,
    tape: LinearTape,
    p: LinearParams,
    grads: LinearGrads,
) -> None:
    """Launcher of ``linear_chunk_bwd``."""
    per_token = grads.dgate if p.gate_kind != "head" else grads.dq
    clear_rest(p.cu_seqlens, grads.dq, grads.dk, grads.dv, per_token)
    ends = (_unit(dout), _dense(dfinal_state), _dense(dfinal_z))
    operands = (*(_unit(x) for x in tape[:3]), *(x.contiguous() for x in tape.outputs))
    _native_op("linear_chunk_bwd")(
        *ends, *operands, _dense(p.gate), *_states(p), *grads, *_numbers(p), p.causal
    )


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    indices: Tensor | None,
    p: LinearParams,
    out: Tensor,
) -> None:
    """Launcher of ``linear_step``: sequences of one token."""
    tokens = (_unit(x).unsqueeze(1) for x in (q, k, v))
    rest = (state, z, _dense(p.gate), _dense(indices), out.unsqueeze(1))
    _native_op("linear_step")(*tokens, *rest, *_numbers(p))


_REQUIRES = (
    Device("cpu"),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Dim("head_dim", 1, 1024),
    Dim("v_head_dim", 1, 1024),
    Available("libattnforge_cpu.so", _native.unavailable),
)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.linear.{kind}",
        op=f"linear_{kind}",
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=_REQUIRES,
        score=100.0,  # far above the reference; room below for simpler kernels
        notes=notes,
    )


SPECS = (
    _spec("chunk_fwd", "four tokens at once, the state in cache; decays as products"),
    _spec("chunk_bwd", "three walks of the same recurrence, nothing stored between"),
    _spec("step", "one pass over a pool of states, in place"),
)
