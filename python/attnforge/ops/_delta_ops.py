"""Operators of the delta rules: schemas, outputs, implementations that pick a kernel.

As in ``_flash_ops``: an operator checks the values of its index tensors, allocates its outputs
with the helper that the fake kernel shares, selects a launcher by metadata and runs it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnforge import _ops
from attnforge._params import DeltaGrads, DeltaParams
from attnforge.ops import _flash_vmap, _linear_checks
from attnforge.ops._linear_checks import accumulator
from attnforge.ops._linear_ops import metadata, request, sequences
from attnforge.registry.select import launcher

__all__ = ["delta_chunk_bwd", "delta_chunk_fwd", "delta_step", "features"]

_PARAMS = "Tensor? g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, float scale, "


def features(g: Tensor | None, scalar_dim: int, cu_seqlens: Tensor | None) -> tuple[str, ...]:
    """Names of what a call uses, "" for what it does not; scalar gates have ``scalar_dim`` dims."""
    gate = "" if g is None else "scalar_gate" if g.dim() == scalar_dim else "key_gate"
    return gate, "" if cu_seqlens is None else "varlen"


def alloc_fwd(q: Tensor, v: Tensor, p: DeltaParams, final_state: bool) -> tuple[Tensor, Tensor]:
    """out like v and the states [N, HV, K, V], or [0] if they are not wanted; contiguous."""
    shape = (sequences(q, p.cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    states = q.new_empty(shape if final_state else (0,), dtype=accumulator(q.dtype))
    return v.new_empty(v.shape), states


def alloc_bwd(q: Tensor, k: Tensor, v: Tensor, p: DeltaParams) -> DeltaGrads:
    """Gradients shaped like their inputs, contiguous; [0] without the input."""
    given = (q, k, v, p.g, p.beta, p.initial_state)
    none = q.new_empty(0, dtype=accumulator(q.dtype))
    return DeltaGrads(*(none.clone() if x is None else x.new_empty(x.shape) for x in given))


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """rest: the fields of DeltaParams, output_final_state, backend."""
    p = DeltaParams(*rest[:-2])
    _linear_checks.boundary_values("delta_chunk_fwd", p.cu_seqlens, q.shape[1])
    out, states = alloc_fwd(q, v, p, rest[-2])
    meta = metadata(q, v, *features(p.g, 3, p.cu_seqlens))
    launcher("delta_chunk_fwd", meta, request, rest[-1])(q, k, v, p, out, states)
    return out, states


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return alloc_fwd(q, v, DeltaParams(*rest[:-2]), rest[-2])


def _bwd(
    dout: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> DeltaGrads:
    """rest: the fields of DeltaParams, backend."""
    p = DeltaParams(*rest[:-1])
    _linear_checks.boundary_values("delta_chunk_bwd", p.cu_seqlens, q.shape[1])
    grads = alloc_bwd(q, k, v, p)
    meta = metadata(q, v, *features(p.g, 3, p.cu_seqlens))
    launch = launcher("delta_chunk_bwd", meta, request, rest[-1])
    launch(dout, dfinal_state, q, k, v, p, grads)
    return grads


def _bwd_fake(
    dout: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> DeltaGrads:
    return alloc_bwd(q, k, v, DeltaParams(*rest[:-1]))


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    _linear_checks.state_indices("delta_step", state_indices, q, state.shape[0])
    p = DeltaParams(g, beta, None, None, scale)
    out = v.new_empty(v.shape)
    meta = metadata(q, v, *features(g, 2, None))
    launcher("delta_step", meta, request, backend)(q, k, v, state, state_indices, p, out)
    return out


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


delta_chunk_fwd = _ops.define(
    f"delta_chunk_fwd(Tensor q, Tensor k, Tensor v, {_PARAMS}bool output_final_state, "
    "str? backend) -> (Tensor out, Tensor final_state)",
    _fwd,
    _fwd_fake,
    _flash_vmap.looped("delta_chunk_fwd"),
)
delta_chunk_bwd = _ops.define(
    f"delta_chunk_bwd(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, {_PARAMS}"
    "str? backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, "
    "Tensor dinitial_state)",
    _bwd,
    _bwd_fake,
    _flash_vmap.looped("delta_chunk_bwd"),
)
delta_step = _ops.define(
    "delta_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor(a!) state, "
    "Tensor? state_indices, float scale, str? backend) -> Tensor",
    _step,
    _step_fake,
)
