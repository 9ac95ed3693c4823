"""What a `PagedCache` hands to attention in place of keys and values, and attention over it.

transformers passes keys and values of all tokens from the cache to the attention function as two
tensors. A paged cache has no such tensors and makes none: `PagedStates` has their shape and leads
to the pages. The write waits for the attention function too, because only the mask says which of
the new tokens are padding, which is not stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnforge.integrations._mask_plan import MaskSpec
from attnforge.paged_cache import PagedKVCache, Step

__all__ = ["PackedPass", "PagedStates", "Pass", "paged_attention_forward"]

_WHERE = "attnforge.integrations.transformers.PagedCache"
_HINT = 'the model needs attn_implementation="attnforge" (transformers.enable())'


@dataclass
class Pass:
    """One forward pass of the model over the cache: which tokens are new, and where they go.

    real: [B, seen] bool on the CPU, False for padding; the last `new` columns are set when the
    first layer's mask is seen.
    """

    cache: PagedKVCache
    sequences: list[int]
    real: Tensor
    new: int
    cascade: bool
    step: Step | None = None
    picked: Tensor | None = None  # [T] rows of the flat batch that are tokens; None: all are
    seen_masks: list[MaskSpec] = field(default_factory=list)
    written: set[int] = field(default_factory=set)  # layers

    @property
    def columns(self) -> int:
        """Columns of the batch with the new ones."""
        return self.real.shape[1]

    def begin(self, spec: MaskSpec | None) -> Step:
        """Check the mask of a layer; with the first one, make room for the real tokens."""
        if spec is not None and not any(spec is s for s in self.seen_masks):
            self._check(spec)
            self.seen_masks.append(spec)
        if self.step is None:
            if spec is not None and spec.padding is not None:
                self.real[:, -self.new :] = spec.padding[:, -self.new :].cpu()
            fresh = self.real[:, -self.new :]
            rows = fresh.sum(1).tolist()
            if not bool(fresh.all()):
                self.picked = fresh.flatten().nonzero().flatten().to(self.cache.device)
            self.step = self.cache.begin(self.sequences, rows)
        return self.step

    def _check(self, spec: MaskSpec) -> None:
        old = self.real[:, : -self.new]
        given = torch.ones_like(old) if spec.padding is None else spec.padding[:, : old.shape[1]]
        if not spec.band.causal or spec.band.chunk or spec.band.right > 0:
            raise ValueError(f"{_WHERE}: the mask {spec.band} is not causal; {_HINT}")
        if spec.segments is not None:
            raise ValueError(f"{_WHERE}: packed sequences cannot be cached; pass them as a batch")
        if spec.kv_len != self.real.shape[1] or not torch.equal(given.cpu(), old):
            raise ValueError(
                f"{_WHERE}: the attention_mask does not agree with the {old.shape[1]} columns that "
                "are cached; pass the mask of all tokens, cached and new, with the padding that "
                "the cached ones had"
            )
        if spec.band.left >= 0 and spec.padding is not None:
            real = spec.padding.cpu()
            span = real.long().cumsum(1)
            last = real.shape[1] - real.flip(1).long().argmax(1)
            first = real.long().argmax(1)
            if bool((span[:, -1] > 0).logical_and(last - first != span[:, -1]).any()):
                raise ValueError(
                    f"{_WHERE}: padding between tokens together with a sliding window, which "
                    "counts it; left-pad the prompts"
                )

    def flat(self, x: Tensor) -> Tensor:
        """x [B, H, S, D] as the operators take it: [B, S, H, D], or the real tokens [T, H, D]."""
        x = x.transpose(1, 2)
        return x if self.picked is None else x.flatten(0, 1)[self.picked]

    def padded(self, out: Tensor, batch: int) -> Tensor:
        """[B, S, H, D] of attention's output; rows of padding are 0."""
        if self.picked is None:
            return out
        wide = out.new_zeros(batch * self.new, *out.shape[1:])
        wide.index_copy_(0, self.picked, out)
        return wide.view(batch, self.new, *out.shape[1:])


@dataclass
class PackedPass:
    """One forward pass over the packed tokens [1, T] of a `Step` that somebody else has made."""

    step: Step
    cascade: bool
    written: set[int] = field(default_factory=set)

    @property
    def columns(self) -> int:
        """T."""
        return sum(self.step.rows)

    def begin(self, spec: MaskSpec | None) -> Step:
        """The step. Its tables say what a token sees; the mask adds a window at most."""
        return self.step

    def flat(self, x: Tensor) -> Tensor:
        """x [1, H, T, D] as [T, H, D]."""
        return x[0].transpose(0, 1)

    def padded(self, out: Tensor, batch: int) -> Tensor:
        """[1, T, H, D]."""
        return out.unsqueeze(0)


class PagedStates(Tensor):
    """Keys or values [B, Hk, seen, D] of one layer, of which only the new ones are at hand."""

    owner: Pass | PackedPass
    layer: int
    fresh: tuple[Tensor, Tensor] | None  # k and v [B, Hk, S, D], until they are written

    @staticmethod
    def __new__(
        cls, owner: Pass | PackedPass, layer: int, like: Tensor, fresh: tuple[Tensor, Tensor]
    ) -> PagedStates:
        shape = (*like.shape[:2], owner.columns, like.shape[3])
        make: Callable[..., PagedStates] = Tensor._make_wrapper_subclass
        states = make(cls, shape, dtype=like.dtype, device=like.device)
        states.owner, states.layer, states.fresh = owner, layer, fresh
        return states

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PagedStates({tuple(self.shape)}, layer {self.layer})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise ValueError(
            f"{_WHERE}: {func} reads keys and values as one tensor, but they lie in pages; "
            f"{_HINT}, and one that caches latents (MLA) is not served: use DynamicCache for it"
        )


def paged_attention_forward(
    query: Tensor,
    key: PagedStates,
    mask: Any,
    causal: bool,
    window: int,
    options: dict[str, Any],
) -> Tensor:
    """Write a layer's new keys and values, and attend over the pages.

    query [B, Hq, S, D]; mask: a `LazyMask` or its description, which says the window itself, or
    None for no padding and `window` keys to the left (-1: all). Returns [B, S, Hq, Dv].
    """
    spec = getattr(mask, "spec", mask)
    if not (spec is None or isinstance(spec, MaskSpec)) or not causal:
        raise ValueError(
            f"{_WHERE}: pages are attended to under causal masks made from a 2-D attention_mask; "
            f"got {type(mask).__name__} and is_causal={causal}; use another cache"
        )
    owner = key.owner
    step = owner.begin(spec)
    if key.fresh is not None:  # a layer that shares another's keys finds them written
        step.append(*(owner.flat(x) for x in key.fresh), layer=key.layer)
        key.fresh = None
        owner.written.add(key.layer)
    left = window if spec is None else spec.band.left
    if left >= 0:
        options = {**options, "window_size": (left, 0)}
    elif owner.cascade and step.shares_prefix:
        options = {**options, "cascade": True}
    out = step.attention(owner.flat(query), layer=key.layer, **options)
    return owner.padded(out, query.shape[0])
