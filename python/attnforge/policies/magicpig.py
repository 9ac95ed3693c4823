"""MagicPIG (Chen et al., 2024) as a policy: keys that a locality-sensitive hash samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.ops.lsh import LSHIndex
from attnforge.policies._policy import Lists, Policy

__all__ = ["MagicPIG"]


class MagicPIG(Policy):
    """Sampled keys weighed by 1 / u beside sinks, a window and keys that are not hashed yet.

    How many keys are sampled follows from ``num_bits`` and ``num_tables`` (10 and 150: 1 to 2%);
    num_bits = 0 samples all of them. The budget is what is exact in any case: sinks, window, and
    256 keys that wait for a bucket. A layer's index is made at its first look at the keys.
    options: of ``LSHIndex``.
    """

    def __init__(
        self, *, num_bits: int = 10, num_tables: int = 150, sink: int = 4, window: int = 64,
        seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(sink + window + 256)
        self.options = {"num_bits": num_bits, "num_tables": num_tables, "sink": sink,
                        "window": window, **options}  # fmt: skip
        self.seed = seed

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Hash the prompt."""
        self._index(k, v, layer)

    def _index(self, k: Tensor, v: Tensor, layer: int) -> LSHIndex:
        """The layer's index, with every key of k; planes differ from layer to layer."""
        index: LSHIndex | None = self.state.get(layer)
        known = 0 if index is None else max(index.lengths, default=0)
        if index is None or k.shape[1] < known:
            self.state[layer] = index = LSHIndex(k, v, seed=self.seed + layer, **self.options)
        elif k.shape[1] > known:
            index.append(k[:, known:], v[:, known:])
        return index

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """What is exact, and behind it the samples of each query head."""
        index = self._index(k, v, layer)
        ids, lens, log_bias = index.retrieve(q[:, -1:])
        if lens.device.type == "cpu" and lens.numel():  # room is made for every key
            most = int(lens.max())
            ids, log_bias = ids[..., :most], log_bias[..., :most]
        exact = index.static().expand(-1, ids.shape[1], -1)
        bias = torch.cat([log_bias.new_zeros(exact.shape), log_bias], -1)
        return Lists(torch.cat([exact, ids], -1), lens + exact.shape[2], bias)
