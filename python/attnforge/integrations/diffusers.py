"""diffusers' models on attnforge: its backend "native" runs here while a handle is active.

    import attnforge.integrations.diffusers as af_diffusers
    with af_diffusers.enable():
        pipe("a prompt")

The names of diffusers' backends are a closed list; "native" (torch's SDPA) is its default and has
the meaning that is served here. Its context parallelism runs on its own function as before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnforge.integrations._undo import Undo
from attnforge.integrations.torch import scaled_dot_product_attention

__all__ = ["Handle", "enable"]

_WHERE = "attnforge.integrations.diffusers"
_DISPATCH = "diffusers.models.attention_dispatch"


def _attention(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backend function of diffusers: its arguments are found by their names."""

    def attnforge_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if _parallel_config is not None or return_lse:
            return original(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse,
                _parallel_config,
            )  # fmt: skip
        keys = (query.shape[0], key.shape[1])
        if attn_mask is not None and tuple(attn_mask.shape) == keys:  # for all heads and queries
            attn_mask = attn_mask[:, None, None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        ).transpose(1, 2)

    return attnforge_attention


class Handle(Undo):
    """The replaced backend; `remove()` or leaving the context puts the original back."""

    def __init__(self, registry: Any, name: Any) -> None:
        self._registry, self._name = registry, name
        self._original = registry._backends[name]
        self._ours = _attention(self._original)
        registry._backends[name] = self._ours

    @property
    def active(self) -> bool:
        """Whether diffusers' "native" is attnforge now."""
        return self._registry._backends[self._name] is self._ours

    def remove(self) -> None:
        """Put diffusers' own function back, unless somebody has replaced ours meanwhile."""
        if self.active:
            self._registry._backends[self._name] = self._original


def enable() -> Handle:
    """Run diffusers' backend "native" on attnforge until the handle is removed.

    Raises:
        ImportError: diffusers is missing, or has no attention dispatcher of the known form.
    """
    try:
        dispatch = importlib.import_module(_DISPATCH)
        registry, name = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName.NATIVE
        taken = registry._supported_arg_names[name]
        known = registry._backends[name] is not None
    except (ImportError, AttributeError, KeyError) as error:
        raise ImportError(
            f"{_WHERE}.enable: no {_DISPATCH} with a backend 'native' here ({error!r}); install "
            "diffusers 0.36 or newer"
        ) from error
    wanted = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"}
    if not known or not wanted <= set(taken):
        raise ImportError(f"{_WHERE}.enable: 'native' of this diffusers takes {sorted(taken)}")
    return Handle(registry, name)
