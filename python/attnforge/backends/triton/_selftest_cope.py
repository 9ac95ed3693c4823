"""The problem of the self-test of the CoPE kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FlashParams, FlashTape
from attnforge.reference import cope as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {}
_ROWS, _KEYS, _HEADS, _HEADS_KV, _DIM, _POSITIONS = 70, 100, 4, 2, 64, 16


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``triton.cope.<kind>``."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    q = normal(1, _ROWS, _HEADS, _DIM)
    k, v = normal(1, _KEYS, _HEADS_KV, _DIM), normal(1, _KEYS, _HEADS_KV, _DIM)
    emb = normal(_HEADS, _DIM, _POSITIONS)
    p = FlashParams(None, None, None, None, None, _ROWS, _KEYS, _DIM**-0.5, -1, 0, 0.0)

    def outputs() -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty((1, _HEADS, _ROWS), dtype=torch.float32)

    if kind == "fwd":
        got, want, none = outputs(), outputs(), q.new_empty(0)
        run(q, k, v, emb, p, *got, none)
        reference.forward(q, k, v, emb, p, *want, none)
        return list(got), list(want)
    out, lse = outputs()
    low = torch.empty_like(out) if dtype.itemsize == 2 else q.new_empty(0)
    reference.forward(q, k, v, emb, p, out, lse, low)
    tape, dout = FlashTape(q, k, v, out, lse, low), torch.ones_like(out)
    found = []
    for backward in (run, reference.backward):
        dq, dk, dv, demb = map(torch.empty_like, (q, k, v, emb))
        grads = (dq, dk, dv, demb)
        backward(dout, None, tape, emb, p, grads)
        found.append(list(grads))
    return found[0], found[1]
