"""Problems of the self-test of the linear family's additive kernels: one per kernel and gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape
from attnforge.reference import linear as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {
    "gates per head": frozenset({"head_gate", "scalar_gate"}),
    "gates of keys": frozenset({"key_gate"}),
    "gates of values": frozenset({"value_gate"}),
    "packed sequences": frozenset({"varlen"}),
}
_KINDS = {"gates per head": "scalar", "gates of keys": "key", "gates of values": "value"}
_TIME, _HEADS, _VALUE_HEADS, _DIM = 70, 2, 4, 64


def _inputs(
    group: str, time: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, LinearParams]:
    """Grouped heads, several chunks with a tail, weak and strong gates, a state to begin from."""
    g, batch = torch.Generator().manual_seed(0), 2 if time == 1 else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    q, k = (normal(batch, time, _HEADS, _DIM).to(dtype) for _ in range(2))
    v = normal(batch, time, _VALUE_HEADS, _DIM).to(dtype)
    kind = _KINDS.get(group, "none")
    width = {"none": None, "scalar": (), "key": (_DIM,), "value": (_DIM,)}[kind]
    gate = None
    if width is not None:
        gate = -normal(batch, time, _VALUE_HEADS, *width).square()
    ends, n = None, batch
    if group == "packed sequences":
        ends, n = torch.tensor([0, 33, time], dtype=torch.int32, device=device), 2
    state = normal(n, _VALUE_HEADS, _DIM, _DIM)
    return q, k, v, LinearParams(gate, kind, state, None, ends, _DIM**-0.5, True, "", 0.0)


def _outputs(v: Tensor, p: LinearParams) -> LinearOutputs:
    assert p.initial_state is not None
    none = v.new_empty(0, dtype=torch.float32)
    return LinearOutputs(
        torch.empty_like(v), torch.empty_like(p.initial_state), none, none, v.new_empty(0)
    )


def _forward(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(group, _TIME, dtype, device)
    found = []
    for forward in (run, reference.forward):
        outputs = _outputs(v, p)
        forward(q, k, v, p, outputs)
        found.append(list(outputs[:2]))
    return found[0], found[1]


def _backward(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(group, _TIME, dtype, device)
    outputs = _outputs(v, p)
    reference.forward(q, k, v, p, outputs)
    tape, dout = LinearTape(q, k, v, outputs), torch.ones_like(v)
    none = outputs.den
    found = []
    for backward in (run, reference.backward):
        dgate = none if p.gate is None else torch.empty_like(p.gate)
        made = [torch.empty_like(x) for x in (q, k, v)]
        grads = LinearGrads._make([*made, dgate, torch.empty_like(outputs.final_state), none])
        backward(dout, outputs.final_state, None, tape, p, grads)
        found.append([x for x in grads if x.numel()])
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
    gate = None if p.gate is None else p.gate[:, 0].contiguous()
    p = p._replace(gate=gate, initial_state=None)
    found = []
    for step in (run, reference.step):
        states, out = pool.clone(), torch.empty_like(v)
        step(q, k, v, states, None, slots, p, out)
        found.append([out, states])
    return found[0], found[1]


_PROBLEMS = {"chunk_fwd": _forward, "chunk_bwd": _backward, "step": _step}


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``<backend>.linear.<kind>``.

    A step has no packed sequences: that group is its plain problem.
    """
    return _PROBLEMS[kind]("" if kind == "step" and group.startswith("packed") else group,
                           run, dtype, device)  # fmt: skip
