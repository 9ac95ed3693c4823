"""The problem of the self-test of the diagonal scan, packed sequences and resets in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge.reference import scan as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {}


def problem(
    kind: str, _: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``<backend>.scan.<kind>``."""
    g = torch.Generator().manual_seed(0)
    x, dout = (torch.randn((1, 70, 96), generator=g).to(device, dtype) for _ in range(2))
    gate = -torch.randn((1, 70, 96), generator=g).square().to(device)
    gate[:, 20] = -torch.inf
    state, dstate = (torch.randn((2, 96), generator=g).to(device) for _ in range(2))
    ends = torch.tensor([0, 33, 70], dtype=torch.int32, device=device)
    found: list[list[Tensor]] = []
    backward = kind == "diag_scan_bwd"
    definition: Callable[..., Any] = reference.backward if backward else reference.forward
    for function in (run, definition):
        if backward:
            made = [torch.empty_like(x), torch.empty_like(gate), torch.empty_like(state)]
            function(dout, dstate, x, gate, state, ends, tuple(made))
        else:
            made = [torch.empty_like(x), torch.empty_like(state)]
            function(x, gate, state, ends, *made)
        found.append(made)
    return found[0], found[1]
