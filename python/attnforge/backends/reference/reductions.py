"""``reference.reductions.*``: the definitions of the family, for every device, dtype and size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.reference import reductions as reference
from attnforge.registry.predicates import Device, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def _launch(function: Any, first: Tensor, *rest: Any) -> None:
    # No autocast: it would turn the reference's fp32 products into 16-bit ones.
    with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        function(first, *rest)


def column_sums(*args: Any) -> None:
    """Launcher of ``reductions_column_sums``."""
    _launch(reference.column_sums, *args)


def span_mass(*args: Any) -> None:
    """Launcher of ``reductions_span_mass``."""
    _launch(reference.span_mass, *args)


def span_bwd(*args: Any) -> None:
    """Launcher of ``reductions_span_bwd``."""
    _launch(reference.span_backward, *args)


def block_max(*args: Any) -> None:
    """Launcher of ``reductions_block_max``."""
    _launch(reference.block_max, *args)


def row_entropy(*args: Any) -> None:
    """Launcher of ``reductions_row_entropy``."""
    _launch(reference.row_entropy, *args)


def topk_keys(*args: Any) -> None:
    """Launcher of ``reductions_topk_keys``."""
    _launch(reference.topk_keys, *args)


def edges(*args: Any) -> None:
    """Launcher of ``reductions_edges``."""
    _launch(reference.edges, *args)


def head_gradient(*args: Any) -> None:
    """Launcher of ``reductions_head_gradient``."""
    _launch(reference.head_gradient, *args)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.reductions.{kind}",
        op=f"reductions_{kind}",
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
    _spec("column_sums", "plain PyTorch, the definition; float64-capable"),
    _spec("span_mass", "plain PyTorch"),
    _spec("span_bwd", "plain PyTorch, explicit formulas"),
    _spec("block_max", "plain PyTorch"),
    _spec("row_entropy", "plain PyTorch"),
    _spec("topk_keys", "plain PyTorch, two stable sorts"),
    _spec("edges", "plain PyTorch, counted and then written"),
    _spec("head_gradient", "plain PyTorch"),
)
