"""StreamingLLM (Xiao et al., 2024): the first keys and a window of the last ones."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.policies._policy import Lists, Policy

__all__ = ["StreamingLLM"]


class StreamingLLM(Policy):
    """``sinks`` keys at the start and budget - sinks at the end, whatever the query is."""

    chunked = True

    def __init__(self, budget: int, *, sinks: int = 4) -> None:
        super().__init__(budget)
        self.sinks = min(sinks, budget)

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """The same list for all heads."""
        keys = k.shape[1]
        first = torch.arange(self.sinks, dtype=torch.int32, device=k.device)
        start = max(self.sinks, keys - self.budget + self.sinks)
        last = torch.arange(start, keys, dtype=torch.int32, device=k.device)
        return Lists(torch.cat([first, last]).expand(k.shape[0], 1, -1).contiguous())
