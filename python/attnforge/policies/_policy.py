"""What every policy is: it names, for each new query, the keys to attend to.

    policy = Quest(budget=1024)
    policy.observe(q_prompt, k, v, layer=3)            # once, after a dense prefill
    out = policy.attend(q, k, v, layer=3)              # each step; k, v hold all keys so far

A policy sees a layer's whole keys and values, [B, S, Hk, D], and returns lists for
``indexed_attention``; what it remembers of a layer lies in ``state[layer]``. Keys are taken as
they stand in the cache, rotated at the positions they came with. A context that fits the budget
is attended to densely: the lists then name every key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge.ops.flash import flash_attention, merge_states
from attnforge.ops.indexed import indexed_attention

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


class Policy:
    """The base of all policies. ``budget`` is the number of keys that a head attends to.

    watch: if set, it is called with the lists of every sparse step.
    """

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

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Lists:
        """The keys for q [B, 1, Hq, D], whose own key is the last of k."""
        raise TypeError(f"attnforge.policies: {type(self).__name__} selects nothing by itself")

    def lists(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Lists:
        """What ``select`` gives, shown to ``watch``."""
        found = self.select(q, k, v, layer=layer)
        if self.watch is not None:
            self.watch(found)
        return found

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0,
        softmax_scale: float | None = None, return_lse: bool = False, backend: str | None = None,
    ) -> Any:  # fmt: skip
        """Attention of q [B, 1, Hq, D] to the selected keys; dense while all fit the budget."""
        if k.shape[1] <= self.budget:
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
