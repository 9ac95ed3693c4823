"""What a rank's tokens do to a state that enters them, and how ranks put that together.

Tokens of one sequence on one rank act on the incoming state as S_out = Phi S_in + E, with E their
own end state. Phi is a decay per entry for the additive recurrence, and a matrix [K, K] for delta
rules; ranks compose in order, forward by Phi, backward by its transpose.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from attnforge.ops import _linear_checks

__all__ = ["Layout", "Segment", "decays", "gather", "layout", "prefix", "suffix"]


class Layout(NamedTuple):
    """Which part of which sequence this rank has.

    ends: the local ``cu_seqlens``, or None for a batch. enters, leaves: rows of the states that
    come from the rank before and go on to the next one, or None; enter_stop, leave_start: where
    in the local tokens such a sequence stops and starts. begun: it starts on this rank. owned: [N]
    bool, sequences whose initial state is used here.
    """

    rank: int
    world: int
    ends: Tensor | None
    enters: slice | None
    enter_stop: int
    leaves: slice | None
    leave_start: int
    begun: bool
    owned: Tensor


def layout(q: Tensor, cu_seqlens: Tensor | None, group: dist.ProcessGroup | None) -> Layout:
    """``cu_seqlens`` are those of the whole, over equal parts of all ranks."""
    rank, world, t = dist.get_rank(group), dist.get_world_size(group), q.shape[1]
    first, final = rank == 0, rank == world - 1
    if cu_seqlens is None:
        every = slice(None)
        owned = torch.full((q.shape[0],), first, dtype=torch.bool, device=q.device)
        return Layout(rank, world, None, None if first else every, t,
                      None if final else every, 0, first, owned)  # fmt: skip
    lo, hi = rank * t, (rank + 1) * t
    cu = cu_seqlens.long()
    bounds = cu.tolist()
    enters, leaves, stop, start, begun = None, None, 0, 0, False
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a < lo < b:
            enters, stop = slice(n, n + 1), min(b, hi) - lo
        if a < hi < b and not final:
            leaves, start, begun = slice(n, n + 1), max(a - lo, 0), a >= lo
    owned = (cu[:-1] >= lo) & ((cu[:-1] < hi) | final)
    ends = (cu - lo).clamp(0, t).to(torch.int32)
    return Layout(rank, world, ends, enters, stop, leaves, start, begun, owned)


class Segment(NamedTuple):
    """E [B, HV, K, V], and Phi: factors [B, HV, K or 1, V or 1], or matrices [B, HV, K, K]."""

    end: Tensor
    phi: Tensor
    dense: bool

    def after(self, state: Tensor) -> Tensor:
        """The state behind the segment."""
        return self.end + (self.phi @ state if self.dense else self.phi * state)

    def pull(self, grad: Tensor) -> Tensor:
        """Gradient of the incoming state from that of the outgoing one."""
        return self.phi.transpose(-1, -2) @ grad if self.dense else self.phi * grad


def gather(parts: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> list[tuple[Tensor, ...]]:
    """The tensors of every rank, by one all-gather. Equal shapes and dtypes on all ranks."""
    world = dist.get_world_size(group)
    flat = torch.cat([x.reshape(-1) for x in parts])
    every = flat.new_empty(world * flat.numel())
    dist.all_gather_into_tensor(every, flat, group=group)
    sizes = [x.numel() for x in parts]
    return [
        tuple(y.view(x.shape) for y, x in zip(row.split(sizes), parts, strict=True))
        for row in every.view(world, -1)
    ]


def prefix(segments: list[Segment], rank: int) -> Tensor:
    """The state that enters ``rank``."""
    state = torch.zeros_like(segments[0].end)
    for segment in segments[:rank]:
        state = segment.after(state)
    return state


def suffix(segments: list[Segment], grads: list[Tensor], rank: int) -> Tensor:
    """The gradient of what leaves ``rank``; grads: of what enters each rank, by its outputs."""
    total = torch.zeros_like(grads[0])
    for segment, grad in zip(
        reversed(segments[rank + 1 :]), reversed(grads[rank + 1 :]), strict=True
    ):
        total = grad + segment.pull(total)
    return total


def decays(gate: Tensor | None, kind: str, like: Tensor) -> Tensor | None:
    """Log gates as [B, T, HV, width], width 1 or that of keys or values. like: [B, T, HV, V]."""
    if gate is None or kind == "none":
        return None
    wide = gate.to(_linear_checks.accumulator(like.dtype))
    if kind == "head":
        return wide[None, None, :, None].expand(*like.shape[:2], -1, 1)
    return wide.unsqueeze(-1) if kind == "scalar" else wide
