"""Problems of the self-test of the delta rules: one per kernel and kind of gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import DeltaParams
from attnforge.reference import delta as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {
    "gates per head": frozenset({"scalar_gate"}),
    "gates of keys": frozenset({"key_gate"}),
    "packed sequences": frozenset({"varlen"}),
}
_TIME, _HEADS, _VALUE_HEADS, _DIM = 70, 2, 4, 64


def _inputs(
    group: str, time: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, DeltaParams]:
    """Grouped heads, several chunks with a tail, similar keys, a state to begin from."""
    g, batch = torch.Generator().manual_seed(0), 2 if time == 1 else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    q, k = (normal(batch, time, _HEADS, _DIM) for _ in range(2))
    k = torch.nn.functional.normalize(k + normal(_HEADS, _DIM), dim=-1)
    v = normal(batch, time, _VALUE_HEADS, _DIM)
    lead = (batch, time, _VALUE_HEADS)
    beta, gate = torch.rand(lead, generator=g), None
    if group.startswith("gates"):
        width = (_DIM,) if group.endswith("keys") else ()
        gate = -normal(*lead, *width).square().to(device)
    ends, n = None, batch
    if group == "packed sequences":
        ends, n = torch.tensor([0, 33, time], dtype=torch.int32, device=device), 2
    state = normal(n, _VALUE_HEADS, _DIM, _DIM).to(device)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return q, k, v, DeltaParams(gate, beta.to(device), state, ends, _DIM**-0.5)


def _forward(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(group, _TIME, dtype, device)
    assert p.initial_state is not None
    found = []
    for forward in (run, reference.forward):
        out, state = torch.empty_like(v), torch.empty_like(p.initial_state)
        forward(q, k, v, p, out, state)
        found.append([out, state])
    return found[0], found[1]


def _step(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Two rows, the second of which has no state."""
    q, k, v, p = _inputs(group, 1, dtype, device)
    q, k, v = (x[:, 0] for x in (q, k, v))
    pool = p.initial_state
    assert pool is not None
    slots = torch.tensor([1, -1], dtype=torch.int32, device=device)
    g = None if p.g is None else p.g[:, 0]
    p = p._replace(g=g, beta=p.beta[:, 0], initial_state=None)
    found = []
    for step in (run, reference.step):
        states, out = pool.clone(), torch.empty_like(v)
        step(q, k, v, states, slots, p, out)
        found.append([out, states])
    return found[0], found[1]


_PROBLEMS = {"chunk_fwd": _forward, "step": _step}


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``<backend>.delta.<kind>``."""
    return _PROBLEMS[kind](group, run, dtype, device)
