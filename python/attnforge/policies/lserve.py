"""LServe (Yang et al., 2025): large pages by the bounds of their parts, and heads that stream."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from attnforge.ops import retrieval
from attnforge.policies._policy import Lists
from attnforge.policies.quest import Quest

__all__ = ["LServe"]


class LServe(Quest):
    """Pages of ``page_size`` keys, each as good as the best of its parts of ``part`` keys.

    Bounds of a few keys are tight, and large pages are fast to read: both at once. The pages of a
    choice, per KV head, serve ``every`` steps; pages that came since are read too. The first page
    and the last are always chosen.
    streaming: of each layer the KV heads that see the first page and the last ``local`` alone.
    """

    def __init__(
        self, budget: int, *, page_size: int = 64, part: int = 16, every: int = 4,
        streaming: Mapping[int, Collection[int]] | None = None, local: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(budget, page_size=part)
        if part < 1 or page_size % part or every < 1 or budget < 2 * page_size:
            raise ValueError(
                f"attnforge.policies.LServe: page_size is {page_size}, part {part}, every {every}, "
                f"budget {budget}; want parts that divide a page, every >= 1, and two pages at "
                "least"
            )
        self.parts, self.every, self.local = page_size // part, every, local
        self.streaming = dict(streaming or {})
        self.chosen: dict[int, tuple[Tensor, int, int]] = {}  # pages, keys then, pages then

    def reset(self) -> None:
        """Forget bounds and choices."""
        super().reset()
        self.chosen.clear()

    def forget(self, layer: int) -> None:
        """Forget a layer's bounds and choice."""
        super().forget(layer)
        self.chosen.pop(layer, None)

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Keys of the chosen pages; ids past the end are ignored by the attention."""
        keys, size = k.shape[1], self.page_size * self.parts
        count = -(-keys // size)
        pages, then, known = self.chosen.get(layer, (None, 0, 0))
        if pages is None or not 0 <= keys - then < self.every:
            pages, known = self._choose(q, k, layer, count), count
            self.chosen[layer] = (pages, keys, known)
        if count > known:
            new = torch.arange(known, count, dtype=torch.int32, device=k.device)
            pages = torch.cat([pages, new.expand(*pages.shape[:2], -1)], -1)
        return Lists(retrieval.page_tokens(pages, size).contiguous())

    def _choose(self, q: Tensor, k: Tensor, layer: int, count: int) -> Tensor:
        """int32 [B, Hk, budget / page size] pages."""
        best = self._scores(q, k, layer, grouped=True)
        rest = count * self.parts - best.shape[-1]
        best = torch.nn.functional.pad(best, (0, rest), value=-torch.inf)
        best = best.view(*best.shape[:2], count, self.parts).amax(-1)
        page = torch.arange(count, device=k.device)
        far = (page > 0) & (page < count - self.local)
        for head in self.streaming.get(layer, ()):
            best[:, head] = best[:, head].masked_fill(far, -torch.inf)
        most = min(self.budget // (self.page_size * self.parts), count)
        one = min(1, most - 1)  # the last page, and the first if there is room for it
        return retrieval.select_topk(best, most, first=one, last=1)[0]
