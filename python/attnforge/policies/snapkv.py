"""SnapKV (Li et al., 2024), PyramidKV, H2O (Zhang et al., 2023): what earlier queries saw."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.ops import reductions, retrieval
from attnforge.ops.flash import flash_attention
from attnforge.policies._policy import Lists, Policy, every_key

__all__ = ["H2O", "PyramidKV", "SnapKV"]


def _column_mass(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax weights of causal rows q (the last ones) summed per key: fp32 [B, Hq, S]."""
    _, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    mass: Tensor = reductions.column_sums(q, k, lse, causal=True)
    return mass


def _per_kv_head(mass: Tensor, k: Tensor) -> Tensor:
    mean: Tensor = retrieval.by_group(mass, k.shape[2]).mean(2)
    return mean


class SnapKV(Policy):
    """The keys of the prompt that its last ``observed`` queries weigh most, and all that follow.

    Weights are averaged over those queries and the group, smoothed over ``kernel`` neighbours, and
    the observed keys are kept beside the best: budget keys of the prompt per KV head. Without
    ``observe`` every key stays.
    """

    def __init__(self, budget: int, *, observed: int = 32, kernel: int = 5) -> None:
        super().__init__(budget)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"attnforge.policies.SnapKV: kernel is {kernel}; want an odd number")
        self.observed, self.kernel = min(observed, budget), kernel

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Choose what to keep of the prompt."""
        self._keep(q, k, v, layer, self.budget)

    def _keep(self, q: Tensor, k: Tensor, v: Tensor, layer: int, budget: int) -> None:
        mass = _per_kv_head(_column_mass(q[:, -self.observed :], k, v), k)
        smooth = torch.nn.functional.avg_pool1d(
            mass, self.kernel, stride=1, padding=self.kernel // 2
        )
        ids, _ = retrieval.select_topk(smooth, min(budget, k.shape[1]),
                                       last=min(self.observed, k.shape[1]))  # fmt: skip
        self.state[layer] = (ids, k.shape[1])

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """What was kept, and every key since."""
        if layer not in self.state:
            return every_key(k)
        kept, length = self.state[layer]
        new = torch.arange(length, k.shape[1], dtype=torch.int32, device=k.device)
        return Lists(torch.cat([kept, new.expand(*kept.shape[:2], -1)], -1).contiguous())


class PyramidKV(SnapKV):
    """SnapKV (Cai et al., 2024) whose budget falls from the first layer to the last.

    budget is the mean over ``layers`` layers. Beside the observed keys the last layer keeps
    1 / beta of the mean, the first one as much more than the mean as the last one less.
    """

    def __init__(
        self, budget: int, *, layers: int, beta: float = 20.0, observed: int = 32, kernel: int = 5
    ) -> None:
        super().__init__(budget, observed=observed, kernel=kernel)
        if layers < 1 or beta < 1:
            raise ValueError(
                f"attnforge.policies.PyramidKV: layers is {layers} and beta {beta}; want at least 1"
            )
        self.layers, self.beta = layers, beta

    def layer_budget(self, layer: int) -> int:
        """Keys of the prompt that a layer keeps."""
        rest = self.budget - self.observed
        least = rest / self.beta
        most = 2 * rest - least
        step = (most - least) / max(1, self.layers - 1)
        return self.observed + round(most - layer * step if self.layers > 1 else rest)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Choose what this layer keeps of the prompt."""
        self._keep(q, k, v, layer, max(self.observed, self.layer_budget(layer)))


class H2O(Policy):
    """Heavy hitters: half of the budget to the keys with the largest summed weights, half recent.

    Sums are over all queries so far, per KV head; a key that left its list stays out, as if it had
    been evicted, and only keys that are attended to gain weight.
    """

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """The sums of the whole prompt; a chunk of it adds to those before."""
        mass = _per_kv_head(_column_mass(q, k, v), k)
        before = self.state.get(layer)
        if before is not None and before.shape[2] == k.shape[1] - q.shape[1]:
            mass[..., : before.shape[2]] += before
        self.state[layer] = mass

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """Adds the weights of q and drops keys until the rest fits the budget."""
        mass = self.state.get(layer)
        if mass is None:
            mass = k.new_zeros((k.shape[0], k.shape[2], 0), dtype=torch.float32)
        mass = torch.nn.functional.pad(mass, (0, k.shape[1] - mass.shape[2]))
        recent = self.budget // 2
        ids, lens = retrieval.select_topk(mass, self.budget, last=recent)
        alive = torch.zeros(*mass.shape[:2], k.shape[1] + 1, device=k.device)
        alive.scatter_(-1, torch.where(ids < 0, k.shape[1], ids).long(), 1.0)
        gone = alive[..., :-1] == 0
        scores = retrieval.score_keys(q, k)[:, :, -1]
        group = q.shape[2] // k.shape[2]
        own = scores.masked_fill(gone.repeat_interleave(group, 1), -torch.inf).softmax(-1)
        self.state[layer] = (mass + _per_kv_head(own, k)).masked_fill(gone, -torch.inf)
        return Lists(ids, lens)
