"""Split-KV plans: made once per step by the host runtime, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge.paged_cache._runtime import host

__all__ = ["SplitPlan"]


class SplitPlan:
    """Pieces of keys for `paged_attention(split_plan=plan.tensors)`: planned once, run many times.

    Args:
        max_batch, max_pieces: the largest batch, and how many pieces all its sequences get at most
            (the workers to keep busy); at least one per sequence.
        page_size: pieces end at page ends.
        device: of the tensors.

    Attributes:
        tensors: (pieces [3, max_pieces], first [max_batch + 1]) int32. They never move, so that a
            captured CUDA graph replays with what the last `plan` wrote: kernels have a block for
            each piece that there is room for, and read on the device whose it is. On the CPU they
            are the planner's own memory.

        plan = attnforge.paged_cache.SplitPlan(64, 132, cache.page_size)
        step = cache.begin(sequences, 1)
        plan.plan(step.seqlens_after)
        out = step.attention(q, layer=n, split_plan=plan.tensors)

    Raises:
        ImportError: the host runtime is not built.
        ValueError: sizes or lengths that do not fit.
    """

    def __init__(
        self,
        max_batch: int,
        max_pieces: int,
        page_size: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._plan: Any = host().SplitPlan(max_batch, max_pieces, page_size)
        self._table = torch.frombuffer(self._plan, dtype=torch.int32)
        where = torch.device(device)
        # A device gets all of a plan in one copy.
        self._held = self._table if where.type == "cpu" else self._table.to(where)
        pieces = self._held[: 3 * max_pieces].view(3, max_pieces)
        self.tensors: tuple[Tensor, Tensor] = (pieces, self._held[3 * max_pieces :])

    def plan(self, lengths: Tensor | Sequence[int], *, fixed: int = 0) -> None:
        """Cut sequences of these lengths, [batch] or [batch, heads], into pieces.

        lengths: on the host; a tensor of a GPU is waited for.
        fixed: 0 takes the least piece that gives at most `max_pieces` of them: then results depend
        on the batch, up to the order of sums. Else keys per piece, a multiple of the page size:
        a sequence is always cut in the same way. 2048 gives, bit for bit, what the CPU kernels do
        without a plan.
        """
        if isinstance(lengths, Tensor):
            lengths = (lengths if lengths.dim() == 1 else lengths.amax(1)).tolist()
        self._plan.plan(list(lengths), fixed)
        if self._held is not self._table:
            self._held.copy_(self._table)

    @property
    def piece(self) -> int:
        """Keys per piece of the last plan."""
        keys: int = self._plan.piece
        return keys
