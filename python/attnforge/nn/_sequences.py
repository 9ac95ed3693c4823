"""Rows and the sequences they belong to: neighbours in time within a sequence, across calls.

A batch [B, T, ..] is B sequences of T rows one after another, a packed one has its ``cu_seqlens``;
both are [rows, ..] here. What a layer remembers of earlier calls is the ``past`` of each sequence,
[N, P, ..]: its last P rows, the latest at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnforge.ops import _linear_checks

__all__ = ["Sequences", "last", "sequences", "shifted"]


class Sequences(NamedTuple):
    """number: of sequences; ends: [number + 1] their boundaries; of every row, owner: which
    sequence it is in (number behind the last boundary), place: which row of that it is."""

    number: int
    ends: Tensor
    owner: Tensor
    place: Tensor

    def counted(self, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of every row, the rows of its sequence up to it, 1 for the first; totals [number].

        before: [number] rows of earlier calls. Behind the last boundary it counts from there.
        """
        if before is None:
            before = torch.zeros_like(self.ends[1:])
        own = torch.cat([before, before.new_zeros(1)])[self.owner]
        return own + self.place + 1, before + self.ends.diff()


def sequences(op: str, x: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences of x [B, T, ..]."""
    cu, count = _linear_checks.packed(op, x, cu_seqlens)
    if cu is None:
        ends = torch.arange(count + 1, device=x.device) * x.shape[1]
    else:
        _linear_checks.boundary_values(op, cu, x.shape[1])
        ends = cu.long()
    rows = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    index = torch.searchsorted(ends[1:].contiguous(), rows, right=True)
    return Sequences(count, ends, index, rows - ends[index])


def _broadcast(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim()))


def shifted(x: Tensor, past: Tensor | None, steps: int, s: Sequences) -> Tensor:
    """Row t of the result is the row ``steps`` before t in its sequence, from ``past`` (at least
    ``steps`` rows) where that lies before this call, else 0. x [rows, ..]."""
    if steps == 0 or x.shape[0] == 0:
        return x
    moved = torch.cat([x.new_zeros(min(steps, x.shape[0]), *x.shape[1:]), x[:-steps]])
    inside = _broadcast(s.place >= steps, x)
    if past is None or s.number == 0:
        return moved.masked_fill(~inside, 0.0)
    rows = past.shape[1]
    old = past[s.owner.clamp_max(s.number - 1), (rows - steps + s.place).clamp(0, rows - 1)]
    return torch.where(inside, moved, old.to(x.dtype))


def last(x: Tensor, past: Tensor | None, rows: int, s: Sequences) -> Tensor:
    """The next ``past``: the last ``rows`` of every sequence, [N, rows, ..]. x [all rows, ..]."""
    if past is None:
        past = x.new_zeros(s.number, rows, *x.shape[1:])
    if x.shape[0] == 0 or s.number == 0 or rows == 0:
        return past
    place = s.ends.diff()[:, None] - rows + torch.arange(rows, device=x.device)
    new = x[(s.ends[:-1, None] + place).clamp(0, x.shape[0] - 1)]
    which = torch.arange(s.number, device=x.device)[:, None]
    old = past[which, (rows + place).clamp(0, rows - 1)].to(x.dtype)
    return torch.where(_broadcast(place >= 0, new), new, old)
