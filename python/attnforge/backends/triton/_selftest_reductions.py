"""Problems of the self-test of the reductions: one per kernel, with every feature at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FlashParams
from attnforge.reference import flash
from attnforge.reference import reductions as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {}
_ROWS, _KEYS, _HEADS, _HEADS_KV, _DIM = 70, 170, 4, 2, 64


def _scores(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, FlashParams]:
    """q, k, their LSE, and a window, softcap, ALiBi and unused keys."""
    g = torch.Generator().manual_seed(0)
    sizes = ((1, _ROWS, _HEADS, _DIM), (1, _KEYS, _HEADS_KV, _DIM))
    q, k = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
    p = FlashParams(
        None, None, torch.tensor([_KEYS - 7], dtype=torch.int32, device=device),
        torch.rand(_HEADS, generator=g).to(device) / 8, None, _ROWS, _KEYS, _DIM**-0.5, 150, 0, 5.0,
    )  # fmt: skip
    out, lse = torch.empty_like(q), q.new_empty((1, _HEADS, _ROWS), dtype=torch.float32)
    flash.forward(q, k, k, p, out, lse, q.new_empty(0))
    return q, k, lse, p


def problem(
    kind: str, _: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``triton.reductions.<kind>``.

    Of lists, where ties of rounding may order two entries otherwise, the values are compared; of
    edges how many there are and their mass, which a few at the threshold barely move.
    """
    q, k, lse, p = _scores(dtype, device)
    definition = getattr(reference, "span_backward" if kind == "span_bwd" else kind)
    ends = torch.tensor([2, 30, 30, _KEYS - 9], dtype=torch.int32, device=device)
    found = []
    for function in (run, definition):
        new = lse.new_empty
        if kind == "column_sums":
            out = [new(1, _HEADS, _KEYS)]
            function(q, k, lse, torch.ones_like(lse), p, *out)
        elif kind == "span_mass":
            out = [new(1, _HEADS, _ROWS, 3)]
            function(q, k, lse, ends, p, *out)
        elif kind == "span_bwd":
            out = [torch.empty_like(x) for x in (q, k, lse)]
            dmass = torch.arange(3.0, device=device).expand(*lse.shape, 3)
            function(dmass, q, k, lse, ends, p, tuple(out))
        elif kind == "block_max":
            out = [new(1, _HEADS, 5, 8)]
            function(q, k, lse, (16, 24), p, *out)
        elif kind == "row_entropy":
            out = [new(lse.shape)]
            function(q, k, lse, p, *out)
        elif kind == "topk_keys":
            values = new(1, _HEADS, _ROWS, 9)
            function(q, k, lse, 9, p, values, torch.empty_like(values, dtype=torch.int32))
            out = [values]
        elif kind == "edges":
            where, prob = lse.new_empty((9999, 4), dtype=torch.int32), new(9999)
            total = lse.new_empty((), dtype=torch.int64)
            function(q, k, lse, 0.05, p, where, prob, total)
            heads = where[:, 1].clamp_min(0).long()
            mass = lse.new_zeros(_HEADS).index_put((heads,), prob, accumulate=True)
            out = [mass, total]
        else:
            out = [new(lse.shape), new(1, _HEADS)]
            function(q, q, *out)
        found.append(out)
    return found[0], found[1]
