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

    def _bounds(self, k: Tensor, layer: int) -> Tensor:
        """Least and largest keys of all pages, [B, Hk, N, 2, D]; whole pages are computed once.

        A head's lie in one piece, the two of a page beside each other: the order of reading them.
        """
        size, keys = self.page_size, k.shape[1]
        pages = -(-keys // size)
        b, _, heads, dim = k.shape
        bounds: Tensor
        bounds, done = self.state.get(layer, (k.new_empty(b, heads, 0, 2, dim), 0))
        if done > keys // size:  # another sequence
            done = 0
        if bounds.shape[2] < pages:
            grown = k.new_zeros(b, heads, pages + pages // 2 + 8, 2, dim)
            grown[:, :, :done] = bounds[:, :, :done]
            bounds = grown
        if done < pages:
            new = torch.stack(retrieval.page_bounds(k[:, done * size :], size), 3)
            bounds[:, :, done:pages] = new.transpose(1, 2)
        self.state[layer] = (bounds, keys // size)
        return bounds[:, :, :pages]

    def _scores(self, q: Tensor, k: Tensor, layer: int, *, grouped: bool) -> Tensor:
        """Bounds of the logits of the last query in each page, [B, Hq | Hk, N]."""
        low, high = self._bounds(k, layer).transpose(1, 2).unbind(3)
        return retrieval.score_pages(q[:, -1:], low, high, grouped=grouped)[:, :, 0]

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Keys of the best pages; ids of keys past the end are ignored by the attention."""
        scores = self._scores(q, k, layer, grouped=self.grouped)
        count = min(max(1, self.budget // self.page_size), scores.shape[-1])
        ids, _ = retrieval.select_topk(scores, count, last=1)
        return Lists(retrieval.page_tokens(ids, self.page_size))
