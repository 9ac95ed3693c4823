"""SparQ (Ribar et al., 2024): keys by a few channels of the query, the rest by the mean value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.ops import retrieval
from attnforge.ops.indexed import indexed_attention
from attnforge.policies._policy import Lists, Policy

__all__ = ["SparQ"]


class SparQ(Policy):
    """Approximate logits from the ``channels`` channels where the group's |q| is largest.

    The output is alpha attention + (1 - alpha) mean(V), alpha being the share of the approximate
    softmax that the selected keys have; in a prefill by chunks it is the attention alone. window:
    last keys that are always selected.
    """

    chunked = True

    def __init__(self, budget: int, *, channels: int = 32, window: int = 16) -> None:
        super().__init__(budget)
        self.channels, self.window = channels, min(window, budget)

    def _estimate(self, q: Tensor, k: Tensor) -> Tensor:
        """Approximate softmax [B, Hq, S] of q's last row."""
        heads = k.shape[2]
        row = retrieval.by_group(q[:, -1].float(), heads)  # [B, Hk, G, D]
        best = row.abs().sum(2).topk(min(self.channels, k.shape[3]), -1).indices  # [B, Hk, r]
        part = row.gather(-1, best.unsqueeze(2).expand(-1, -1, row.shape[2], -1))
        share = part.abs().sum(-1) / row.abs().sum(-1).clamp_min(torch.finfo(row.dtype).tiny)
        keys = k.transpose(1, 2).gather(-1, best.unsqueeze(2).expand(-1, -1, k.shape[1], -1))
        logits = part @ keys.float().transpose(-1, -2)
        scale = (k.shape[3] * share.clamp_min(1e-12)).rsqrt()
        estimate: Tensor = (logits * scale.unsqueeze(-1)).softmax(-1).flatten(1, 2)
        return estimate

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """One list per KV head: the largest sums over its group."""
        estimate = self._estimate(q, k)
        votes = retrieval.by_group(estimate, k.shape[2]).sum(2)
        ids, lens = retrieval.select_topk(votes, self.budget, last=self.window)
        self.state[layer] = (estimate, ids)
        return Lists(ids, lens)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0,
        softmax_scale: float | None = None, return_lse: bool = False, backend: str | None = None,
    ) -> Any:  # fmt: skip
        """Attention to the selected keys, mixed with the mean of V; the LSE is of the former."""
        if self.short(k, v):
            return super().attend(q, k, v, layer=layer, softmax_scale=softmax_scale,
                                  return_lse=return_lse, backend=backend)  # fmt: skip
        lists = self.lists(q, k, v, layer)
        out, lse = indexed_attention(q, k, v, **lists._asdict(), softmax_scale=softmax_scale,
                                     return_lse=True, backend=backend)  # fmt: skip
        estimate, ids = self.state.pop(layer)
        group = q.shape[2] // k.shape[2]
        at = ids.long().repeat_interleave(group, 1)
        alpha = (estimate.gather(-1, at.clamp_min(0)) * (at >= 0)).sum(-1).clamp_max(1.0)
        alpha = alpha.view(q.shape[0], 1, -1, 1).to(out.dtype)
        mean = v.float().mean(1, keepdim=True).to(out.dtype).repeat_interleave(group, 2)
        out = alpha * out + (1 - alpha) * mean
        return (out, lse) if return_lse else out
