"""RazorAttention (Tang et al., 2024): retrieval heads keep everything, others a few keys.

typing = HeadTyping(period=64)
typing.observe(q, k, v, layer=n)           # of a prompt of random tokens, said again and again
policy = RazorAttention(1024, heads=typing.retrieval_heads())
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import retrieval
from attnforge.ops.flash import flash_attention, merge_states
from attnforge.ops.indexed import indexed_attention
from attnforge.policies._policy import Lists, Policy

__all__ = ["HeadTyping", "RazorAttention"]


class RazorAttention(Policy):
    """KV heads outside ``heads`` see sinks, a window, and one key that stands for the others.

    heads: of each layer the KV heads that see all keys. The compensation key and value are the
    means of the N keys left out, with log N added to the logit.
    """

    def __init__(
        self, budget: int, *, heads: Mapping[int, Collection[int]] | None = None, sinks: int = 4
    ) -> None:
        super().__init__(budget)
        self.heads, self.sinks = dict(heads or {}), min(sinks, budget)

    def _start(self, keys: int) -> int:
        """Where the window begins: keys from sinks to here are left out."""
        return max(self.sinks, keys - self.budget + self.sinks)

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """A list per KV head; those of heads that are short end with -1."""
        keys, start = k.shape[1], self._start(k.shape[1])
        every = torch.arange(keys, dtype=torch.int32, device=k.device)
        kept = torch.cat([every[: self.sinks], every[start:]])
        whole = set(self.heads.get(layer, ()))
        width = keys if whole else kept.shape[0]
        short = torch.nn.functional.pad(kept, (0, width - kept.shape[0]), value=-1)
        rows = [every if h in whole else short for h in range(k.shape[2])]
        return Lists(torch.stack(rows).expand(k.shape[0], -1, -1).contiguous())

    def _means(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor, int]:
        """fp32 means [B, Hk, D] of the keys and values left out, and how many they are."""
        start = self._start(k.shape[1])
        end, *sums = self.state.get(layer, (0,))
        if not sums or end > start:
            end, sums = (
                self.sinks,
                [x.new_zeros(x[:, 0].shape, dtype=torch.float32) for x in (k, v)],
            )
        sums = [s + x[:, end:start].float().sum(1) for s, x in zip(sums, (k, v), strict=True)]
        self.state[layer] = (start, *sums)
        count = start - self.sinks
        mean_k, mean_v = (s / max(1, count) for s in sums)
        return mean_k, mean_v, count

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0,
        softmax_scale: float | None = None, return_lse: bool = False, backend: str | None = None,
    ) -> Any:  # fmt: skip
        """Attention to what is kept, merged with the compensation key of heads that are short."""
        if self.short(k, v):
            return super().attend(q, k, v, layer=layer, softmax_scale=softmax_scale,
                                  return_lse=return_lse, backend=backend)  # fmt: skip
        out, lse = indexed_attention(q, k, v, **self.lists(q, k, v, layer)._asdict(),
                                     softmax_scale=softmax_scale, return_lse=True,
                                     backend=backend)  # fmt: skip
        mean_k, mean_v, count = self._means(k, v, layer)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        rows = retrieval.by_group(q[:, 0].float(), k.shape[2])  # [B, Hk, G, D]
        logit = scale * (rows @ mean_k.unsqueeze(-1)).squeeze(-1)
        logit = logit + (torch.tensor(count, dtype=torch.float32).log().to(logit.device))
        for head in self.heads.get(layer, ()):
            logit[:, head] = -torch.inf
        group = q.shape[2] // k.shape[2]
        value = mean_v.repeat_interleave(group, 1).unsqueeze(1).to(out.dtype)
        other = logit.flatten(1).unsqueeze(-1).to(lse.dtype)
        out, lse = merge_states([out, value], [lse, other], backend=backend)
        return (out, lse) if return_lse else out


class HeadTyping(Policy):
    """Finds retrieval heads: looks at a prompt of random tokens that repeats with ``period``.

    A head echoes as much as it attends to the token's own previous occurrence, and inducts as much
    as it attends to the one behind that. Attention is dense.
    """

    def __init__(self, period: int) -> None:
        super().__init__(1 << 30)
        self.period = period

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Mean weights of both kinds of each KV head, the best of its group: [2, Hk]."""
        n = self.period
        if q.shape[1] != k.shape[1] or k.shape[1] < 2 * n:
            raise ValueError(
                f"attnforge.policies.HeadTyping: got {q.shape[1]} queries and {k.shape[1]} keys; "
                f"want a whole prompt of two periods, {2 * n} tokens, at least"
            )
        _, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        rows = q[:, n:].reshape(*k[:, n:].shape[:3], -1, q.shape[3]).float() * q.shape[3] ** -0.5
        found = []
        for shift in (n, n - 1):  # how far the key is behind
            keys = k[:, n - shift : k.shape[1] - shift].float()
            logit = (rows * keys.unsqueeze(3)).sum(-1)  # [B, S, Hk, G]
            own = lse[:, :, n:].transpose(1, 2).reshape(*logit.shape)
            found.append((logit - own).exp().mean((0, 1)).amax(-1))
        self.state[layer] = torch.stack(found)

    def retrieval_heads(
        self, echo: float = 0.01, induction: float = 0.14
    ) -> dict[int, tuple[int, ...]]:
        """Of each layer the KV heads among the best shares of either kind, over all layers."""
        layers = sorted(self.state)
        scores = torch.stack([self.state[n] for n in layers], 1)  # [2, layers, Hk]
        heads = scores.shape[2]
        chosen: set[int] = set()
        for kind, share in zip(scores.flatten(1), (echo, induction), strict=True):
            chosen |= set(kind.topk(-int(-share * kind.shape[0] // 1)).indices.tolist())
        return {
            layer: tuple(h for h in range(heads) if at * heads + h in chosen)
            for at, layer in enumerate(layers)
        }
