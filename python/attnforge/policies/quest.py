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
    codes: keep them in int8, rounded outwards, with a scale per page; None: on a CPU, where a
        kernel reads them so.
    """

    chunked = True

    def __init__(
        self, budget: int, *, page_size: int = 16, grouped: bool = False, codes: bool | None = None
    ) -> None:
        super().__init__(budget)
        self.page_size, self.grouped, self.codes = page_size, grouped, codes

    def _bounds(self, k: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
        """Least and largest keys of all pages, [B, Hk, N, 2, D], and scales [B, Hk, N] of codes.

        Whole pages are computed once. A head's lie in one piece, the two of a page beside each
        other: the order of reading them.
        """
        size, keys = self.page_size, k.shape[1]
        pages = -(-keys // size)
        b, _, heads, dim = k.shape
        codes = k.device.type == "cpu" if self.codes is None else self.codes
        shapes = {(2, dim): torch.int8, (): torch.float32} if codes else {(2, dim): k.dtype}
        kept: list[Tensor]
        kept, done = self.state.get(layer, ([], 0))
        if done > keys // size:  # another sequence
            done = 0
        if not kept or kept[0].shape[2] < pages:
            room = pages + pages // 2 + 8
            grown = [k.new_zeros(b, heads, room, *s, dtype=t) for s, t in shapes.items()]
            for new, old in zip(grown, kept, strict=False):
                new[:, :, :done] = old[:, :, :done]
            kept = grown
        if done < pages:
            ends = retrieval.page_bounds(k[:, done * size :], size)
            low, high, *scale = retrieval.quantize_bounds(*ends) if codes else ends
            for room_of, new in zip(kept, (torch.stack((low, high), 3), *scale), strict=True):
                room_of[:, :, done:pages] = new.transpose(1, 2)
        self.state[layer] = (kept, keys // size)
        bounds, *scales = (x[:, :, :pages] for x in kept)
        return bounds, scales[0] if scales else None

    def _scores(self, q: Tensor, k: Tensor, layer: int, *, grouped: bool) -> Tensor:
        """Bounds of the logits of the last query in each page, [B, Hq | Hk, N]."""
        bounds, scale = self._bounds(k, layer)
        low, high = bounds.transpose(1, 2).unbind(3)
        return retrieval.score_pages(
            q[:, -1:], low, high, page_scale=None if scale is None else scale.transpose(1, 2),
            grouped=grouped,
        )[:, :, 0]  # fmt: skip

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Keys of the best pages; ids of keys past the end are ignored by the attention."""
        scores = self._scores(q, k, layer, grouped=self.grouped)
        count = min(max(1, self.budget // self.page_size), scores.shape[-1])
        ids, _ = retrieval.select_topk(scores, count, last=1)
        return Lists(retrieval.page_tokens(ids, self.page_size))
