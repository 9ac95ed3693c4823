"""What every attention function for transformers needs: refusals, the mask of a call, a name.

Dense attention (`transformers`), blocks of keys (`block_sparse`) and policies (`policies`) differ
in what they run; how they are called, refused and registered is here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnforge.integrations._mask_plan import Band, MaskSpec, Plan, plan_from_dense
from attnforge.integrations._masks import (
    WHERE,
    LazyMask,
    attention_mask,
    import_masks,
    key_padding,
)
from attnforge.integrations._undo import Undo

__all__ = ["MIN_VERSION", "Handle", "describe", "import_transformers", "refuse", "register"]

MIN_VERSION = (4, 56)
"""Oldest transformers whose attention and mask interfaces have the form used here."""

_ADVICE = 'use attn_implementation="sdpa" or "eager"'

# Keyword arguments of some models that change the result of attention and are not served.
_REFUSED = {
    "position_bias": "an additive position bias",
    "head_mask": "a head mask",
    "indices": "key indices (sparse attention)",
    "block_indices": "block indices (block-sparse attention)",
    "block_table": "a paged cache",
    "cache": "a paged cache (continuous batching)",
    "sinks": "sinks under another name than s_aux",
}


def refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what no attention function here computes."""
    if dropout:
        raise ValueError(
            f"{WHERE}: attention dropout {dropout} is not supported; set the model's "
            f"attention_dropout to 0, call model.eval(), or {_ADVICE}"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{WHERE}: output_attentions=True needs the attention weights, which are never "
            'formed; use attn_implementation="eager"'
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{WHERE}: {name}= ({what}) is not supported; {_ADVICE}")


def describe(
    q: Tensor, k: Tensor, mask: Any, causal: bool, sliding_window: int | None
) -> MaskSpec | Plan:
    """The mask of one call, as a description or as pieces."""
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    spec = mask.spec if isinstance(mask, LazyMask) else mask
    if isinstance(spec, MaskSpec):
        sizes, expected = (spec.batch, spec.q_len, spec.kv_len), (batch, q_len, kv_len)
        if sizes != expected and (spec.batch != 1 or sizes[1:] != expected[1:]):
            raise ValueError(
                f"{WHERE}: the mask was made for (batch, queries, keys) = {sizes}, but attention "
                f"was called with {expected}"
            )
        return spec
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _dense_plan(mask, batch, q_len, kv_len)
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (batch, kv_len)):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{WHERE}: attention_mask {got} is not supported; expected None, [batch, keys] = "
            f"{(batch, kv_len)} or [batch, 1, queries, keys]"
        )
    if sliding_window is not None and not causal and sliding_window < kv_len:
        raise ValueError(
            f"{WHERE}: sliding_window={sliding_window} without a mask in a bidirectional layer "
            f"does not say where the window lies; {_ADVICE}"
        )
    left = -1 if sliding_window is None or not causal else sliding_window - 1
    return MaskSpec(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        band=Band(causal, left),
        delta=kv_len - q_len if causal else 0,
        padding=key_padding(mask, kv_len, 0),
        device=q.device,
    )


def _dense_plan(mask: Tensor, batch: int, q_len: int, kv_len: int) -> Plan:
    """`plan_from_dense`, remembered on the mask: all layers of a forward pass share it."""
    version = 0 if mask.is_inference() else mask._version
    stamp = (version, batch, q_len, kv_len)
    held: tuple[Any, Plan] | None = getattr(mask, "_attnforge_plan", None)
    if held is None or held[0] != stamp:
        held = (stamp, plan_from_dense(mask, batch, q_len, kv_len))
        mask._attnforge_plan = held  # type: ignore[attr-defined]
    return held[1]


class Handle(Undo):
    """A registration in transformers; `remove()` or leaving the context undoes it."""

    def __init__(self, name: str, entries: tuple[tuple[dict[str, Any], Any], ...]) -> None:
        self.name, self._entries = name, entries

    @property
    def active(self) -> bool:
        """Whether models that select the name get this registration's functions."""
        return all(mapping.get(self.name) is function for mapping, function in self._entries)

    def remove(self) -> None:
        """Take the functions out of transformers, unless the name has others by now.

        Models that selected them stop working.
        """
        if self.active:
            for mapping, _ in self._entries:
                del mapping[self.name]


def register(where: str, name: str, attention: Any, replaces: Callable[[Any], bool]) -> Handle:
    """Put an attention function into transformers under a name, with the mask function.

    replaces: whether what has the name may be replaced. where: who asks, for errors.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: the name is used by others.
    """
    functions = import_transformers().AttentionInterface._global_mapping
    masks = import_masks().AttentionMaskInterface._global_mapping
    taken = functions.get(name)
    if (taken is not None and not replaces(taken)) or masks.get(name) not in (None, attention_mask):
        raise ValueError(f"{where}.enable: name {name!r} is already used; choose another")
    functions[name], masks[name] = attention, attention_mask
    return Handle(name, ((functions, attention), (masks, attention_mask)))


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def import_transformers() -> Any:
    try:
        module = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"{WHERE}.enable: transformers is not installed; "
            "run: pip install 'attnforge[transformers]'"
        ) from error
    found = importlib.metadata.version("transformers")
    if _version(found) < MIN_VERSION:
        raise ImportError(
            f"{WHERE}.enable: transformers {found} is too old; its attention interface is needed "
            f"in the form of {MIN_VERSION[0]}.{MIN_VERSION[1]} or newer; "
            "run: pip install -U 'attnforge[transformers]'"
        )
    return module
