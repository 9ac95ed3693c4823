"""Squeezed Attention (Hooper et al., 2024) as a policy: keys by the centroids of their clusters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnforge.ops.centroid import CentroidIndex, centroid_attention
from attnforge.ops.flash import flash_attention
from attnforge.policies._policy import Lists, Policy

__all__ = ["Squeezed"]

_PENDING = 64  # new keys beside the index before they are copied behind its own


class Squeezed(Policy):
    """The budget keys of the promising clusters, the tail of the context always among them.

    Clusters are made of the keys that a layer has at its first look; later keys join them.
    calibrated: one threshold for all heads of a layer, set by the prompt's last ``observed``
    queries, in place of the same number of keys for each. options: of ``CentroidIndex.fit``.
    """

    def __init__(
        self, budget: int, *, calibrated: bool = False, observed: int = 32, window: int = 100,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(budget)
        self.calibrated, self.observed = calibrated, observed
        self.options = {"window": min(window, budget // 4), "assign_every": _PENDING, **options}

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Cluster the prompt; what a later chunk adds is appended."""
        index = self._index(k, v, layer)
        if self.calibrated:
            index.calibrate(q[:, -self.observed :], self._share(index, k.shape[1]))

    def _index(self, k: Tensor, v: Tensor, layer: int) -> CentroidIndex:
        """The layer's index; it has all but the newest keys of k."""
        index: CentroidIndex | None = self.state.get(layer)
        # A context twice as long has other clusters; a shorter one is another context.
        if index is None or not index.length <= k.shape[1] <= 2 * index.length:
            self.state[layer] = index = CentroidIndex.fit(k, v, **self.options)
        elif k.shape[1] - index.length >= _PENDING:
            index.append(k[:, index.length :], v[:, index.length :])
        return index

    def _share(self, index: CentroidIndex, keys: int) -> float:
        """What the budget leaves beside the tail, as a share of the clustered keys."""
        tail = keys - index.clustered
        return min(1.0, max(0.0, (self.budget - tail) / max(1, index.clustered)))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0,
        softmax_scale: float | None = None, return_lse: bool = False, backend: str | None = None,
    ) -> Any:  # fmt: skip
        """Attention to the selected slots of the index and the keys behind them."""
        if self.short(k, v):
            return flash_attention(q, k, v, causal=True, softmax_scale=softmax_scale,
                                   return_lse=return_lse, backend=backend)  # fmt: skip
        index = self._index(k, v, layer)
        share = None if self.calibrated else self._share(index, k.shape[1])
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "backend": backend}
        if self.watch is not None:
            self.watch(Lists(*index.select(q, budget=share, **options)))
        new = (k[:, index.length :], v[:, index.length :])
        return centroid_attention(q, index, budget=share, return_lse=return_lse,
                                  new=new if new[0].shape[1] else None, **options)  # fmt: skip
