"""Problems of the self-test of the additive recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape
from attnforge.reference import linear as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {
    "a gate per head or token": frozenset({"head_gate", "scalar_gate"}),
    "a gate per key channel": frozenset({"key_gate"}),
    "a gate per value channel": frozenset({"value_gate"}),
    "a denominator": frozenset({"normalize"}),
    "packed sequences": frozenset({"varlen"}),
    "both directions": frozenset({"bidirectional"}),
}
_KINDS = {
    "a gate per head or token": "scalar",
    "a gate per key channel": "key",
    "a gate per value channel": "value",
}
_HEADS, _VALUE_HEADS, _DIM = 1, 2, 64


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, the reference's) of a backend's ``linear.<kind>``."""
    g = torch.Generator().manual_seed(0)
    gate_kind, norm = _KINDS.get(group, "none"), "sum" if group == "a denominator" else ""
    time = 18 if gate_kind in ("key", "value") else 70  # a chunk and a tail

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    q, k = (normal(1, time, _HEADS, _DIM).abs().to(dtype) for _ in range(2))
    v, dout = (normal(1, time, _VALUE_HEADS, _DIM).to(dtype) for _ in range(2))
    gate = None
    if gate_kind != "none":
        shape = v.shape[:3] if gate_kind == "scalar" else v.shape
        gate = -0.2 * normal(*shape).abs()
    ends = None
    if group == "packed sequences":
        ends = torch.tensor([0, 9, time - 3], dtype=torch.int32, device=device)
    n = 1 if ends is None else 2
    state, dstate = normal(2, n, _VALUE_HEADS, _DIM, _DIM)
    z = normal(n, _VALUE_HEADS, _DIM).abs() if norm else None
    causal = group != "both directions"
    p = LinearParams(gate, gate_kind, state, z, ends, _DIM**-0.5, causal, norm, 1e-6)
    if kind == "step":
        return _step(run, q, k, v, p, ends is not None)

    def outputs() -> LinearOutputs:
        none, low = v.new_empty(0), norm and dtype.itemsize == 2
        return LinearOutputs(
            torch.empty_like(v), torch.empty_like(state), none if z is None else z.clone(),
            v.new_empty(v.shape[:3] if norm else (0,), dtype=torch.float32),
            torch.empty_like(v) if low else none,
        )  # fmt: skip

    want = outputs()
    reference.forward(q, k, v, p, want)
    if kind == "chunk_fwd":
        got = outputs()
        run(q, k, v, p, got)
        return list(got[:4]), list(want[:4])
    found = []
    for backward in (run, reference.backward):
        none = v.new_empty(0)
        dgate, dz = (none if x is None else torch.empty_like(x) for x in (gate, z))
        dq, dk, dv, ds = map(torch.empty_like, (q, k, v, state))
        grads = LinearGrads(dq, dk, dv, dgate, ds, dz)
        backward(dout, dstate, z, LinearTape(q, k, v, want), p, grads)
        found.append(list(grads))
    return found[0], found[1]


def _step(
    run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, p: LinearParams, packed: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Two rows on a pool of three states, one of them skipped when sequences would be packed."""
    slots = torch.tensor([2, -1 if packed else 0], dtype=torch.int32, device=q.device)
    q, k, v = (x[0, :2] for x in (q, k, v))
    now = p._replace(gate=None if p.gate is None else p.gate[0, :2], causal=True)
    assert p.initial_state is not None
    found = []
    for step in (run, reference.step):
        pool = p.initial_state[:1].repeat(3, 1, 1, 1)
        z = None if p.initial_z is None else p.initial_z[:1].repeat(3, 1, 1)
        out = torch.empty_like(v)
        step(q, k, v, pool, z, slots, now, out)
        found.append([out, pool, *([] if z is None else [z])])
    return found[0], found[1]
