"""TidalDecode (Yang et al., 2024), Recycled Attention (Xu et al., 2024): keys chosen at times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.ops import retrieval
from attnforge.ops.flash import flash_attention
from attnforge.policies._policy import Lists, Policy, every_key

__all__ = ["Recycled", "TidalDecode"]


def _votes(q: Tensor, k: Tensor) -> Tensor:
    """The largest logit of a group's heads for every key: [B, Hk, S]."""
    scores = retrieval.score_keys(q[:, -1:], k)[:, :, 0]
    best: Tensor = retrieval.by_group(scores, k.shape[2]).amax(2)
    return best


def _with_recent(ids: Tensor, start: int, end: int) -> Tensor:
    new = torch.arange(start, end, dtype=torch.int32, device=ids.device)
    return torch.cat([ids, new.expand(*ids.shape[:2], -1)], -1).contiguous()


class TidalDecode(Policy):
    """Some layers attend to all keys and choose; the layers behind them take their choice.

    dense: layers that attend to all keys and choose nothing. chooses: layers that attend to all
    keys and leave the budget best ones of each KV head to those that follow.
    """

    def __init__(
        self, budget: int, *, dense: tuple[int, ...] = (0, 1), chooses: tuple[int, ...] = (2, 13)
    ) -> None:
        super().__init__(budget)
        self.dense, self.chooses = frozenset(dense), frozenset(chooses)

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Every key in dense and choosing layers, else what was chosen last."""
        if layer in self.chooses:
            votes = _votes(q, k)
            self.state[0] = retrieval.select_topk(votes, self.budget, last=1)[0]
            return every_key(k)
        if layer in self.dense or 0 not in self.state:
            return every_key(k)
        return Lists(self.state[0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0, **options: Any) -> Any:
        """As the base; layers that see all keys run dense decode."""
        if layer in self.chooses or layer in self.dense:
            self.select(q, k, v, layer=layer)
            return flash_attention(q, k, v, causal=True, **options)
        return super().attend(q, k, v, layer=layer, **options)


class Recycled(Policy):
    """Every ``every``-th step attends to all keys and chooses; the steps between reuse the choice.

    Keys that came since the choice are always attended to.
    """

    def __init__(self, budget: int, *, every: int = 32) -> None:
        super().__init__(budget)
        if every < 1:
            raise ValueError(f"attnforge.policies.Recycled: every is {every}; want at least 1 step")
        self.every = every

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Every key at a choosing step, else the last choice and what came since."""
        ids, length = self.state.get(layer, (None, 0))
        if ids is not None and 0 <= k.shape[1] - length < self.every:
            return Lists(_with_recent(ids, length, k.shape[1]))
        votes = _votes(q, k)
        ids = retrieval.select_topk(votes, min(self.budget, k.shape[1]))[0]
        self.state[layer] = (ids, k.shape[1])
        return every_key(k)
