"""What every policy is: it names, for each new query, the keys to attend to.

    policy = Quest(budget=1024)
    policy.observe(q_prompt, k, v, layer=3)            # once, after a dense prefill
    out = policy.attend(q, k, v, layer=3)              # each step; k, v hold all keys so far

A policy sees a layer's whole keys and values, [B, S, Hk, D], and returns lists for
``indexed_attention``; what it remembers of a layer lies in ``state[layer]``. Keys are taken as
they stand in the cache, rotated at the positions they came with. A context that fits the budget,
or is so short that a sparse step would be slower than a dense one, is attended to densely; where
that ends is measured (``_crossover``), and ``attnforge.explain(policy.attend, q, k, v)`` says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge.ops.flash import flash_attention, merge_states
from attnforge.ops.indexed import indexed_attention
from attnforge.policies._crossover import costs_of, measured
from attnforge.registry.explain import explained_by, requests_of
from attnforge.registry.spec import Request

__all__ = ["Lists", "Policy", "every_key"]


class Lists(NamedTuple):
    """The arguments of ``indexed_attention``: ids [B, 1 | Hk | Hq, N] and what goes with them."""

    ids: Tensor
    lens: Tensor | None = None
    log_bias: Tensor | None = None


def every_key(k: Tensor) -> Lists:
    """Lists of all keys of k [B, S, Hk, D]."""
    ids = torch.arange(k.shape[1], dtype=torch.int32, device=k.device)
    return Lists(ids.expand(k.shape[0], 1, -1).contiguous())


def _requests(
    policy: Policy, q: Tensor, k: Tensor, v: Tensor, *, device: str, **options: Any
) -> tuple[Sequence[Request], str]:
    """Of a step: dense, or over lists of budget keys per KV head."""
    most, why = policy.dense_up_to(k, v, device)
    keys = k.shape[1]
    if keys <= most:
        return requests_of(flash_attention, q, k, v, causal=True), (
            f"dense: {keys} keys, sparse above {most} ({why})"
        )
    ids = q.new_empty((q.shape[0], k.shape[2], min(policy.budget, keys)), dtype=torch.int32)
    return requests_of(indexed_attention, q, k, v, ids=ids), (
        f"sparse: {keys} keys, dense up to {most} ({why})"
    )


class Policy:
    """The base of all policies. ``budget`` is the number of keys that a head attends to.

    crossover: keys up to which a step is dense though they do not fit the budget; None: as many as
        was measured for the policy, 0: none.
    watch: if set, it is called with the lists of every sparse step.
    """

    crossover: int | None = None

    chunked = False
    """Whether ``prefill`` serves it: its choice is a matter of the query and the keys alone."""

    def __init__(self, budget: int) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(
                f"attnforge.policies.{type(self).__name__}: budget is {budget!r}; want a number "
                "of keys, at least 1"
            )
        self.budget = budget
        self.state: dict[int, Any] = {}
        self.watch: Callable[[Lists], None] | None = None

    def reset(self) -> None:
        """Forget everything, before another batch of sequences."""
        self.state.clear()

    def forget(self, layer: int) -> None:
        """Forget a layer, before another sequence."""
        self.state.pop(layer, None)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Look at the prompt's queries [B, S, Hq, D] and keys after a dense prefill.

        A prompt in chunks is observed chunk by chunk: q has the rows of the last one.
        """

    def dense_up_to(self, k: Tensor, v: Tensor, device: str | None = None) -> tuple[int, str]:
        """Keys up to which a step over such k and v is dense, and why; device: not that of k."""
        if self.crossover is not None:
            return max(self.budget, self.crossover), f"budget {self.budget}, crossover set"
        costs = costs_of(type(self).__name__)
        if costs is None or (device or k.device.type) != "cpu":
            return self.budget, f"budget {self.budget}, no crossover was measured"
        one = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
        keys = costs.crossover(self.budget, one)
        if math.isinf(keys):  # chosen for its result, then
            return self.budget, f"budget {self.budget}, no step was faster than dense"
        most = max(self.budget, math.ceil(keys))
        return most, f"budget {self.budget}, crossover measured on {measured()['device']}"

    def short(self, k: Tensor, v: Tensor) -> bool:
        """Whether a step over these keys is dense."""
        return k.shape[1] <= self.budget or k.shape[1] <= self.dense_up_to(k, v)[0]

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """The keys for q [B, 1, Hq, D], whose own key is the last of k."""
        raise TypeError(f"attnforge.policies: {type(self).__name__} selects nothing by itself")

    def lists(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Lists:
        """What ``select`` gives, shown to ``watch``."""
        found = self.select(q, k, v, layer=layer)
        if self.watch is not None:
            self.watch(found)
        return found

    @explained_by(_requests)
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0,
        softmax_scale: float | None = None, return_lse: bool = False, backend: str | None = None,
    ) -> Any:  # fmt: skip
        """Attention of q [B, 1, Hq, D] to the selected keys; dense while the context is short."""
        if self.short(k, v):
            return flash_attention(q, k, v, causal=True, softmax_scale=softmax_scale,
                                   return_lse=return_lse, backend=backend)  # fmt: skip
        return indexed_attention(q, k, v, **self.lists(q, k, v, layer)._asdict(),
                                 softmax_scale=softmax_scale, return_lse=return_lse,
                                 backend=backend)  # fmt: skip

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0, chunk: int = 256,
        softmax_scale: float | None = None, backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a prompt q [B, Sq, Hq, D], the last rows of k, by chunks of rows.

        A chunk sees itself causally and, of the keys before it, those that its mean query selects:
        budget keys beside its own. Chunks with no more than that before them are dense.
        """
        if not self.chunked:
            raise ValueError(
                f"attnforge.policies.{type(self).__name__}: it does not choose keys for a chunk of "
                "queries; want a dense prefill"
            )
        start, outs = k.shape[1] - q.shape[1], []
        for a in range(0, q.shape[1], chunk):
            rows, own = q[:, a : a + chunk], start + a
            end = own + rows.shape[1]
            if own <= self.budget:
                out = flash_attention(rows, k[:, :end], v[:, :end], causal=True,
                                      softmax_scale=softmax_scale, backend=backend)  # fmt: skip
                outs.append(out)
                continue
            past = (k[:, :own], v[:, :own])
            lists = self.lists(rows.mean(1, keepdim=True), *past, layer)
            parts = (
                indexed_attention(rows, *past, **lists._asdict(), softmax_scale=softmax_scale,
                                  return_lse=True, backend=backend),
                flash_attention(rows, k[:, own:end], v[:, own:end], causal=True, return_lse=True,
                                softmax_scale=softmax_scale, backend=backend),
            )  # fmt: skip
            outs.append(merge_states(*map(list, zip(*parts, strict=True)), backend=backend)[0])
        return torch.cat(outs, 1)
