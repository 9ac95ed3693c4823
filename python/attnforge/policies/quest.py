"""Quest (Tang et al., 2024): pages by an upper bound of their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.ops import retrieval
from attnforge.policies._policy import Lists, Policy

__all__ = ["Quest"]


class Quest(Policy):
    """The budget // page_size pages with the largest bounds, the last page always among them.

    Per query head, or per KV head with ``grouped`` (the largest bound of its heads), which reads
    less. Bounds are kept per layer and extended as keys come: 2 D numbers per page and KV head.
    """

    chunked = True

    def __init__(self, budget: int, *, page_size: int = 16, grouped: bool = False) -> None:
        super().__init__(budget)
        self.page_size, self.grouped = page_size, grouped

    def _bounds(self, k: Tensor, layer: int) -> tuple[Tensor, Tensor, int]:
        """The bounds of all pages and how many there are; whole pages are computed once."""
        size, keys = self.page_size, k.shape[1]
        pages = -(-keys // size)
        low, high, done = self.state.get(layer, (k[:, :0], k[:, :0], 0))
        if done > keys // size:  # another sequence
            done = 0
        if low.shape[1] < pages:
            room = (k.shape[0], pages + pages // 2 + 8, *k.shape[2:])
            grown = [k.new_zeros(room) for _ in range(2)]
            for x, old in zip(grown, (low, high), strict=True):
                x[:, :done] = old[:, :done]
            low, high = grown
        if done < pages:
            new = retrieval.page_bounds(k[:, done * size :], size)
            low[:, done:pages], high[:, done:pages] = new
        self.state[layer] = (low, high, keys // size)
        return low[:, :pages], high[:, :pages], pages

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Keys of the best pages; ids of keys past the end are ignored by the attention."""
        low, high, pages = self._bounds(k, layer)
        scores = retrieval.score_pages(q[:, -1:], low, high, grouped=self.grouped)[:, :, 0]
        used = torch.full(scores.shape[:-1], pages, dtype=torch.int32, device=k.device)
        count = min(max(1, self.budget // self.page_size), pages)
        ids, _ = retrieval.select_topk(scores, count, lens=used, last=1)
        return Lists(retrieval.page_tokens(ids, self.page_size).contiguous())
