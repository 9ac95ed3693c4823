"""``reference.cope.*``: the definition of contextual positions, for every device and size."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge._params import FlashParams, FlashTape
from attnforge.backends.reference.flash import _plain
from attnforge.reference import cope as reference
from attnforge.registry.predicates import Device, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def fwd(
    q: Tensor, k: Tensor, v: Tensor, emb: Tensor, p: FlashParams,
    out: Tensor, lse: Tensor, out_lo: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``cope_fwd``."""
    with _plain(q):
        reference.forward(q, k, v, emb, p, out, lse, out_lo)


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, emb: Tensor, p: FlashParams, grads: Grads
) -> None:
    """Launcher of ``cope_bwd``."""
    with _plain(dout):
        reference.backward(dout, dlse, tape, emb, p, grads)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.cope.{kind}",
        op=f"cope_{kind}",
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=(
            Device("cpu", "cuda"),
            Dtypes(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        ),
        notes=notes,
    )


SPECS = (
    _spec("fwd", "plain PyTorch, the definition; float64-capable"),
    _spec("bwd", "plain PyTorch, explicit formulas"),
)
