"""Problems of the self-test of the diagonal scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge.reference import scan as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {"packed sequences": frozenset({"varlen"})}
_TIME, _DIM = 35, 20


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of a scan operator."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, dout = (normal(1, _TIME, _DIM).to(dtype) for _ in range(2))
    g = -normal(1, _TIME, _DIM).abs()
    ends = None
    if group:
        ends = torch.tensor([0, 9, _TIME - 3], dtype=torch.int32, device=device)
    state, dstate = normal(2, 1 if ends is None else 2, _DIM)
    found: list[list[Tensor]] = []
    for mine in (True, False):
        if kind == "diag_scan_fwd":
            outs = [torch.empty_like(x), torch.empty_like(state)]
            (run if mine else reference.forward)(x, g, state, ends, *outs)
        else:
            grads = (torch.empty_like(x), torch.empty_like(g), torch.empty_like(state))
            (run if mine else reference.backward)(dout, dstate, x, g, state, ends, grads)
            outs = list(grads)
        found.append(outs)
    return found[0], found[1]
