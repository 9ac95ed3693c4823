"""attnforge as vLLM's custom attention backend, on vLLM's own paged cache.

    vllm serve MODEL --attention-backend CUSTOM

An entry point in vLLM's group ``vllm.general_plugins`` registers the backend in every process of
vLLM where attnforge is installed; it is used where CUSTOM is chosen and nowhere else.
"""

from __future__ import annotations

import importlib
import warnings

__all__ = ["plugin", "register"]

_WHERE = "attnforge.integrations.vllm"
_BACKEND = "attnforge.integrations._vllm_backend.Backend"
_REGISTRY = "vllm.v1.attention.backends.registry"


def register() -> None:
    """Make attnforge the backend CUSTOM.

    Raises:
        ImportError: vLLM is missing, or has no registry of backends.
        ValueError: somebody else's backend is CUSTOM already.
    """
    try:
        registry = importlib.import_module(_REGISTRY)
        custom, add = registry.AttentionBackendEnum.CUSTOM, registry.register_backend
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{_WHERE}.register: no {_REGISTRY} with register_backend and CUSTOM here ({error}); "
            "install a vllm that has it"
        ) from error
    if custom.is_overridden() and custom.get_path() != _BACKEND:
        raise ValueError(
            f"{_WHERE}.register: CUSTOM is {custom.get_path()} already; uninstall that plugin, or "
            "keep it out of VLLM_PLUGINS"
        )
    add(custom, _BACKEND)


def plugin() -> None:
    """The entry point: `register`, but a warning where it cannot; vLLM must start all the same."""
    try:
        register()
    except (ImportError, ValueError) as error:
        warnings.warn(str(error), stacklevel=2)
