"""``reference.linear.diag_scan_*``: the scan token by token, for every device and dtype."""

from __future__ import annotations

from typing import Any

import torch

from attnforge.backends.reference.linear import _launch
from attnforge.reference import scan as reference
from attnforge.registry.predicates import Device, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def diag_scan_fwd(*args: Any) -> None:
    """Launcher of ``diag_scan_fwd``."""
    _launch(reference.forward, *args)


def diag_scan_bwd(*args: Any) -> None:
    """Launcher of ``diag_scan_bwd``."""
    _launch(reference.backward, *args)


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
    _spec("diag_scan_fwd", "token recurrence in plain PyTorch, the definition; float64-capable"),
    _spec("diag_scan_bwd", "token recurrence from the end, formulas written out"),
)
