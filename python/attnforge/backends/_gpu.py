"""What launchers of CUDA kernels share: the current device and stream, and tensors as kernels
read them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["contiguous", "decode_splits", "entry_splits", "on", "rows", "stream", "top_of_groups"]

SPLIT = 2048  # keys of a decode's split unless the caller wants another number of them
_TILE = 64  # keys: splits have at least so many
ENTRIES = 512  # of a list's split: the states of splits are 1 % of what is gathered
PARTS = 32  # of a list at most: longer ones have longer splits, and the merge stays short
_FEW_ROWS = 64  # that share a list; more rows fill a GPU without splits


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels launch on the current device, whatever the tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def stream(device: torch.device) -> int:
    """The handle of the current stream; 0 on the CPU, where the emulator runs kernels."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def rows(x: Tensor) -> Tensor:
    """``x`` itself if kernels can read it in place, else a copy."""
    steps = (n for size, n in zip(x.shape[:-1], x.stride(), strict=False) if size > 1)
    item = x.itemsize
    whole = all(step * item % 16 == 0 for step in steps) and x.data_ptr() % 16 == 0
    if x.stride(-1) == 1 and whole:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` in one piece; None stays."""
    return None if x is None else x.contiguous()


def top_of_groups(each: Tensor, out: Tensor) -> None:
    """out [B, Hkv, rows, columns]: the largest of each group of heads of each [B, Hq, ...]."""
    batch, heads, rows, columns = out.shape
    torch.amax(each.view(batch, heads, -1, rows, columns), 2, out=out)


def decode_splits(keys: int, num_splits: int) -> int:
    """Splits of so many keys; num_splits: what the caller wants, or 0."""
    keys = max(1, keys)
    return min(num_splits, -(-keys // _TILE)) if num_splits > 0 else -(-keys // SPLIT)


def entry_splits(slots: int, rows: int) -> int:
    """Splits of lists of so many slots, each of which so many rows share."""
    return max(1, min(PARTS, -(-slots // ENTRIES))) if rows <= _FEW_ROWS else 1
