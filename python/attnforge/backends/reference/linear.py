"""``reference.linear.*``: the additive recurrence token by token, for every device and dtype.

The backward keeps the state of every token: T K V numbers per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.reference import linear as reference
from attnforge.registry.predicates import Device, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def _launch(function: Any, first: Tensor, *rest: Any) -> None:
    # No autocast: it would turn the reference's fp32 products into 16-bit ones.
    with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        function(first, *rest)


def chunk_fwd(*args: Any) -> None:
    """Launcher of ``linear_chunk_fwd``."""
    _launch(reference.forward, *args)


def chunk_bwd(*args: Any) -> None:
    """Launcher of ``linear_chunk_bwd``."""
    _launch(reference.backward, *args)


def step(*args: Any) -> None:
    """Launcher of ``linear_step``."""
    _launch(reference.step, *args)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.linear.{kind}",
        op=f"linear_{kind}",
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=(
            Device("cpu", "cuda"),
            Dtypes(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        ),
        score=0.0,  # anything that can serve is faster
        notes=notes,
    )


SPECS = (
    _spec("chunk_fwd", "token recurrence in plain PyTorch, the definition; float64-capable"),
    _spec("chunk_bwd", "plain PyTorch, explicit formulas from the last token"),
    _spec("step", "one token of the recurrence"),
)
