"""The native host runtime, loaded at first use, and its tables as tensors."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["host", "int32", "token_list"]

Tokens = Sequence[int] | Tensor


def host() -> Any:
    """``attnforge._host``; ImportError with the way to build it where it is missing."""
    try:
        return importlib.import_module("attnforge._host")
    except ImportError as error:
        raise ImportError(
            "attnforge.PagedKVCache: the host runtime attnforge._host is not built; it needs a C++ "
            "compiler and pybind11: pip install pybind11 cmake ninja, then reinstall attnforge, or "
            "run python setup.py build_ext --inplace in its source tree"
        ) from error


def int32(buffer: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A table of the host runtime as an int32 tensor [*shape]."""
    if not len(buffer):
        return torch.empty(shape, dtype=torch.int32, device=device)
    return torch.frombuffer(buffer, dtype=torch.int32).view(shape).to(device)


def token_list(tokens: Tokens) -> list[int]:
    """Token ids as Python ints; a tensor must be 1-D."""
    if isinstance(tokens, Tensor):
        if tokens.dim() != 1:
            raise ValueError(
                f"attnforge.PagedKVCache: tokens have shape {tuple(tokens.shape)}; want the ids "
                "of one sequence, 1-D"
            )
        return [int(t) for t in tokens.tolist()]
    return list(tokens)
