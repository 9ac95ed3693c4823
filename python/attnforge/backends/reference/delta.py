"""``reference.linear.delta_*``: the delta rules token by token, for every device and dtype.

The backward keeps the state of every token: T K V numbers per head.
"""

from __future__ import annotations

from typing import Any

import torch

from attnforge.backends.reference.linear import _launch
from attnforge.reference import delta as reference
from attnforge.registry.predicates import Device, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def delta_chunk_fwd(*args: Any) -> None:
    """Launcher of ``delta_chunk_fwd``."""
    _launch(reference.forward, *args)


def delta_chunk_bwd(*args: Any) -> None:
    """Launcher of ``delta_chunk_bwd``."""
    _launch(reference.backward, *args)


def delta_step(*args: Any) -> None:
    """Launcher of ``delta_step``."""
    _launch(reference.step, *args)


def _spec(op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.linear.{op}",
        op=op,
        backend="reference",
        launch=f"{__name__}:{op}",
        requires=(
            Device("cpu", "cuda"),
            Dtypes(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        ),
        score=0.0,  # anything that can serve is faster
        notes=notes,
    )


SPECS = (
    _spec("delta_chunk_fwd", "token recurrence in plain PyTorch, the definition; float64-capable"),
    _spec("delta_chunk_bwd", "token recurrence from the end, formulas written out"),
    _spec("delta_step", "one token of the recurrence"),
)
