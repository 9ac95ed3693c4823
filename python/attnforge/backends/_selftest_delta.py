"""Problems of the self-test of the delta rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import DeltaGrads, DeltaParams
from attnforge.reference import delta as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {
    "a gate per token": frozenset({"scalar_gate"}),
    "a gate per key channel": frozenset({"key_gate"}),
    "packed sequences": frozenset({"varlen"}),
}
_TIME, _HEADS, _VALUE_HEADS, _DIM = 40, 1, 2, 64


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of a delta operator."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    q = normal(1, _TIME, _HEADS, _DIM).to(dtype)
    k = torch.nn.functional.normalize(normal(1, _TIME, _HEADS, _DIM), dim=-1).to(dtype)
    v, dout = (normal(1, _TIME, _VALUE_HEADS, _DIM).to(dtype) for _ in range(2))
    beta = torch.sigmoid(normal(*v.shape[:3]))
    gate = {
        "a gate per token": -0.2 * normal(*v.shape[:3]).abs(),
        "a gate per key channel": -0.2 * normal(*v.shape).abs(),
    }.get(group)
    ends = None
    if group == "packed sequences":
        ends = torch.tensor([0, 9, _TIME - 3], dtype=torch.int32, device=device)
    n = 1 if ends is None else 2
    state, dstate = normal(2, n, _VALUE_HEADS, _DIM, _DIM)
    p = DeltaParams(gate, beta, state, ends, _DIM**-0.5)
    found: list[list[Tensor]] = []
    for mine in (True, False):
        if kind == "delta_step":
            row = (q[0, :2], k[0, :2], v[0, :2])
            now = p._replace(g=None if gate is None else gate[0, :2], beta=beta[0, :2])
            pool, out = state[:1].repeat(3, 1, 1, 1), torch.empty_like(row[2])
            slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
            (run if mine else reference.step)(*row, pool, slots, now, out)
            found.append([out, pool])
        elif kind == "delta_chunk_fwd":
            outs = [torch.empty_like(v), torch.empty_like(state)]
            (run if mine else reference.forward)(q, k, v, p, *outs)
            found.append(outs)
        else:
            dq, dk, dv, dbeta, ds = map(torch.empty_like, (q, k, v, beta, state))
            dg = v.new_empty(0) if gate is None else torch.empty_like(gate)
            grads = DeltaGrads(dq, dk, dv, dg, dbeta, ds)
            (run if mine else reference.backward)(dout, dstate, q, k, v, p, grads)
            found.append(list(grads))
    return found[0], found[1]
