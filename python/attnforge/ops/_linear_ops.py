"""Operators of the linear family's additive part: schemas, outputs, the choice of a kernel.

As in ``_flash_ops``, an operator checks the values of its index tensors, allocates its outputs
with the helper that the fake kernel shares, selects a launcher by metadata and runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _ops
from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape
from attnforge.ops import _flash_vmap, _linear_checks
from attnforge.ops._linear_checks import accumulator
from attnforge.registry.select import device_arch, launcher
from attnforge.registry.spec import Request

__all__ = ["linear_chunk_bwd", "linear_chunk_fwd", "linear_step", "metadata", "request"]

_PARAMS = (
    "Tensor? gate, str gate_kind, Tensor? initial_state, Tensor? initial_z, Tensor? cu_seqlens, "
    "float scale, bool causal, str normalize, float eps, "
)
_FIELDS = len(LinearParams._fields)


def metadata(q: Tensor, v: Tensor, *features: str) -> tuple[Any, ...]:
    """What selection may look at, as a hashable tuple (see ``request``); "" names no feature."""
    return q.device, q.dtype, q.shape[-1], v.shape[-1], v.shape[-2] // q.shape[-2], features


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``metadata`` stands for."""
    device, dtype, head_dim, v_head_dim, group, features = meta
    kind, arch = device_arch(device)
    return Request(
        op,
        kind,
        arch,
        dtype,
        (("head_dim", head_dim), ("v_head_dim", v_head_dim), ("group", group)),
        frozenset(features) - {""},
        torch.are_deterministic_algorithms_enabled(),
    )


def features(p: LinearParams) -> tuple[str, ...]:
    """Names of what a call uses, "" for what it does not."""
    return (
        "" if p.gate is None else f"{p.gate_kind}_gate",
        "" if p.cu_seqlens is None else "varlen",
        "" if p.causal else "bidirectional",
        "normalize" if p.normalize else "",
    )


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many states a call has."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def alloc_fwd(
    q: Tensor, v: Tensor, p: LinearParams, final_state: bool, save_out_lo: bool
) -> LinearOutputs:
    """Outputs of a forward, contiguous; [0] for those that are not wanted."""
    acc, n = accumulator(q.dtype), sequences(q, p.cu_seqlens)
    batch, time, heads, width = v.shape
    states = (n, heads, q.shape[-1])
    out = v.new_empty(v.shape)
    residue = save_out_lo and p.normalize and q.dtype.itemsize == 2
    return LinearOutputs(
        out,
        q.new_empty((*states, width) if final_state else (0,), dtype=acc),
        q.new_empty(states if final_state and p.normalize else (0,), dtype=acc),
        q.new_empty((batch, time, heads) if p.normalize else (0,), dtype=acc),
        torch.empty_like(out) if residue else v.new_empty(0),
    )


def alloc_bwd(q: Tensor, k: Tensor, v: Tensor, p: LinearParams, gate_grad: bool) -> LinearGrads:
    """Gradients shaped like their inputs, contiguous; [0] without the input."""

    def like(x: Tensor | None) -> Tensor:
        none = q.new_empty(0, dtype=accumulator(q.dtype))
        return none if x is None else x.new_empty(x.shape)

    return LinearGrads(
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        like(p.gate if gate_grad and p.gate_kind != "head" else None),
        like(p.initial_state),
        like(p.initial_z),
    )


def _params(op: str, q: Tensor, fields: Any) -> LinearParams:
    p = LinearParams(*fields)
    _linear_checks.boundary_values(op, p.cu_seqlens, q.shape[1])
    return p


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> LinearOutputs:
    """rest: the fields of LinearParams, output_final_state, save_out_lo, backend."""
    p = _params("linear_chunk_fwd", q, rest[:_FIELDS])
    final_state, save_out_lo, backend = rest[_FIELDS:]
    outputs = alloc_fwd(q, v, p, final_state, save_out_lo)
    meta = metadata(q, v, *features(p))
    launcher("linear_chunk_fwd", meta, request, backend)(q, k, v, p, outputs)
    return outputs


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> LinearOutputs:
    return alloc_fwd(q, v, LinearParams(*rest[:_FIELDS]), *rest[_FIELDS:-1])


def _bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    dfinal_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> LinearGrads:
    """rest: the fields of LinearOutputs, those of LinearParams, gate_grad, backend."""
    p = _params("linear_chunk_bwd", q, rest[5:-2])
    gate_grad, backend = rest[-2:]
    grads = alloc_bwd(q, k, v, p, gate_grad)
    tape = LinearTape(q, k, v, LinearOutputs(*rest[:5]))
    meta = metadata(q, v, *features(p))
    launch = launcher("linear_chunk_bwd", meta, request, backend)
    launch(dout, dfinal_state, dfinal_z, tape, p, grads)
    return grads


def _bwd_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    dfinal_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> LinearGrads:
    return alloc_bwd(q, k, v, LinearParams(*rest[5:-2]), rest[-2])


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    gate: Tensor | None,
    gate_kind: str,
    state_indices: Tensor | None,
    scale: float,
    normalize: str,
    eps: float,
    backend: str | None,
) -> Tensor:
    _linear_checks.state_indices("linear_step", state_indices, q, state.shape[0])
    p = LinearParams(gate, gate_kind, None, None, None, scale, True, normalize, eps)
    out = v.new_empty(v.shape)
    meta = metadata(q, v, *features(p))
    launcher("linear_step", meta, request, backend)(q, k, v, state, z, state_indices, p, out)
    return out


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


linear_chunk_fwd = _ops.define(
    f"linear_chunk_fwd(Tensor q, Tensor k, Tensor v, {_PARAMS}bool output_final_state, "
    "bool save_out_lo, str? backend) "
    "-> (Tensor out, Tensor final_state, Tensor final_z, Tensor den, Tensor out_lo)",
    _fwd,
    _fwd_fake,
    _flash_vmap.looped("linear_chunk_fwd"),
)
linear_chunk_bwd = _ops.define(
    "linear_chunk_bwd(Tensor dout, Tensor? dfinal_state, Tensor? dfinal_z, Tensor q, Tensor k, "
    "Tensor v, Tensor out, Tensor final_state, Tensor final_z, Tensor den, Tensor out_lo, "
    f"{_PARAMS}bool gate_grad, str? backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate, "
    "Tensor dinitial_state, Tensor dinitial_z)",
    _bwd,
    _bwd_fake,
    _flash_vmap.looped("linear_chunk_bwd"),
)
linear_step = _ops.define(
    "linear_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor(b!)? z, Tensor? gate, "
    "str gate_kind, Tensor? state_indices, float scale, str normalize, float eps, str? backend) "
    "-> Tensor",
    _step,
    _step_fake,
)
