"""HiP (Lee et al., 2024): keys by a tree search that looks at few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.ops import retrieval
from attnforge.policies._policy import Lists, Policy

__all__ = ["HiP"]


class HiP(Policy):
    """Branches of the context are halved, and the better half of all halves is kept, until leaves.

    A half is as good as its middle key: the largest logit of a group's heads. Reads about
    2 log2(keys / budget) keys per key of the budget. leaf: keys of a branch that is not halved any
    more. sinks and window: first and last keys that are always selected, and count.
    """

    chunked = True

    def __init__(self, budget: int, *, leaf: int = 4, sinks: int = 4, window: int = 32) -> None:
        super().__init__(budget)
        if leaf < 1 or budget < leaf:
            raise ValueError(f"attnforge.policies.HiP: leaf is {leaf}; want 1 .. budget ({budget})")
        self.leaf = leaf
        self.sinks = min(sinks, (budget - leaf) // 2)
        self.window = min(window, budget - leaf - self.sinks)

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """One list per KV head: sinks, the leaves that were found, the window."""
        batch, keys, heads, _ = k.shape
        first, last = self.sinks, keys - self.window
        branches = (self.budget - self.sinks - self.window) // self.leaf
        # Branch i of the keys between sinks and window is [cut[i], cut[i + 1]).
        at = torch.arange(branches + 1, device=k.device) * (last - first)
        cut = first + at.div(branches, rounding_mode="floor")
        spans = torch.stack([cut[:-1], cut[1:]]).expand(batch, heads, 2, branches)
        begin, end = spans.unbind(2)
        widest = -(-(last - first) // branches)
        while widest > self.leaf:
            middle = (begin + end + 1) // 2
            begin, end = torch.cat([begin, middle], -1), torch.cat([middle, end], -1)
            best = self._scores(q, k, begin, end).topk(branches, -1).indices
            begin, end = begin.gather(-1, best), end.gather(-1, best)
            widest = (widest + 1) // 2
        begin, order = begin.sort(-1)
        end = end.gather(-1, order)
        own = begin.unsqueeze(-1) + torch.arange(widest, device=k.device)
        found = torch.where(own < end.unsqueeze(-1), own, -1).flatten(-2)
        edge = [torch.arange(*ends, device=k.device).expand(batch, heads, -1)
                for ends in ((0, first), (last, keys))]  # fmt: skip
        return Lists(torch.cat([edge[0], found, edge[1]], -1).to(torch.int32))

    @staticmethod
    def _scores(q: Tensor, k: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """The largest logit of each group at the middle of branches [B, Hk, N]; -inf if empty."""
        at = ((begin + end) // 2).clamp_max(k.shape[1] - 1)
        wide = at.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])
        rows = k.transpose(1, 2).gather(2, wide).float()
        logits = retrieval.by_group(q[:, -1].float(), k.shape[2]) @ rows.transpose(-1, -2)
        best: Tensor = logits.amax(2).masked_fill(begin >= end, -torch.inf)
        return best
