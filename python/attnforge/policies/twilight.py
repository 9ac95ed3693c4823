"""Twilight (Lin et al., 2025): as many keys as carry a share of the softmax."""

from __future__ import annotations

from torch import Tensor

from attnforge.ops import retrieval
from attnforge.policies._policy import Lists, Policy

__all__ = ["Twilight"]


class Twilight(Policy):
    """The fewest keys whose softmax mass is at least p, per query head, at most ``budget``.

    Logits are exact here; the paper estimates them from int4 keys. sinks and window are forced.
    """

    chunked = True

    def __init__(self, budget: int, *, p: float = 0.9, sinks: int = 4, window: int = 16) -> None:
        super().__init__(budget)
        self.p, self.sinks, self.window = p, sinks, window

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Lists of their own length for every query head."""
        scores = retrieval.score_keys(q, k)[:, :, -1]
        most, count = retrieval.select_topk(
            scores, self.budget, first=min(self.sinks, self.budget),
            last=min(self.window, max(0, self.budget - self.sinks)),
        )  # fmt: skip
        ids, lens = retrieval.select_topp(scores, self.p, first=self.sinks, last=self.window,
                                          max_selected=self.budget + 1)  # fmt: skip
        over = (lens > self.budget).unsqueeze(-1)
        ids = most.where(over, ids[..., : self.budget])
        return Lists(ids.contiguous(), count.where(over.squeeze(-1), lens))
