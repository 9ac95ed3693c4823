"""attnforge as an attention backend of SGLang, on SGLang's own pool of tokens.

import attnforge.integrations.sglang as backend
backend.register()                    # before the server or engine reads its arguments
sglang.Engine(model_path=..., attention_backend="attnforge", disable_cuda_graph=True)
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["register"]

_WHERE = "attnforge.integrations.sglang"
_REGISTRY = "sglang.srt.layers.attention.attention_registry"


def _create(runner: Any) -> Any:
    return importlib.import_module("attnforge.integrations._sglang_backend").Backend(runner)


def register(name: str = "attnforge") -> None:
    """Let ``--attention-backend NAME`` choose attnforge. Calling it again does nothing more.

    Raises:
        ImportError: SGLang is missing, or has no registry of backends.
        ValueError: the name is another backend's.
    """
    try:
        registry = importlib.import_module(_REGISTRY)
        arguments = importlib.import_module("sglang.srt.server_args")
        known, add = registry.ATTENTION_BACKENDS, registry.register_attention_backend
        choices, extend = (
            arguments.ATTENTION_BACKEND_CHOICES,
            arguments.add_attention_backend_choices,
        )
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{_WHERE}.register: no {_REGISTRY} and sglang.srt.server_args here that take "
            f"backends from outside ({error}); install a sglang that has them"
        ) from error
    if known.get(name, _create) is not _create:
        raise ValueError(f"{_WHERE}.register: {name!r} is another backend's name; choose one")
    add(name)(_create)
    if name not in choices:
        extend([name])
