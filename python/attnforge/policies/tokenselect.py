"""TokenSelect (Wu et al., 2025): one set of keys per layer, by a vote of all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.ops import retrieval
from attnforge.policies._policy import Lists, Policy

__all__ = ["TokenSelect"]


class TokenSelect(Policy):
    """The softmax of every head is a soft vote; the sum over heads ranks the keys.

    initial and local keys are always there and count towards the budget. reuse: a query whose
    cosine to the one that chose last is at least this (of all heads together) takes its keys; 2
    never does. Keys that came since belong to the local ones.
    """

    chunked = True

    def __init__(
        self, budget: int, *, initial: int = 128, local: int = 512, reuse: float = 0.9
    ) -> None:
        super().__init__(budget)
        self.initial = min(initial, budget // 4)
        self.local = min(local, budget // 2)
        self.reuse = reuse

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """One list for all heads."""
        last = self.state.get(layer)
        flat = q[:, -1].flatten(1).float()
        if last is not None and last[0].shape == flat.shape and last[2] <= k.shape[1]:
            near = torch.cosine_similarity(flat, last[0], -1).amin()
            if k.shape[1] - last[2] < self.local and float(near) >= self.reuse:
                recent = torch.arange(last[2], k.shape[1], dtype=torch.int32, device=k.device)
                recent = recent.expand(k.shape[0], 1, -1)
                return Lists(torch.cat([last[1], recent], -1))
        votes = retrieval.score_keys(q, k)[:, :, -1].softmax(-1).sum(1, keepdim=True)
        ids, _ = retrieval.select_topk(votes, self.budget, first=self.initial, last=self.local)
        self.state[layer] = (flat, ids, k.shape[1])
        return Lists(ids)
