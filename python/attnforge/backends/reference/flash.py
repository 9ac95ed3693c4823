"""``reference.flash.*``: the definition of the flash family, for every device, dtype and size.

Needs memory for whole rows of logits, a bounded chunk at a time, and O(Sq * Sk) work at the
speed of plain PyTorch. It is what a call falls to when nothing faster can serve it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from attnforge._params import FLOAT8, FlashGrads, FlashParams, FlashTape
from attnforge.reference import flash as reference
from attnforge.registry.predicates import Device, Dtypes, Without
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


@contextlib.contextmanager
def _plain(x: Tensor) -> Iterator[None]:
    """No autocast: it would turn the reference's fp32 products into 16-bit ones."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def fwd(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``flash_fwd``."""
    with _plain(q):
        reference.forward(q, k, v, p, out, lse, out_lo)


def bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: FlashParams, grads: FlashGrads
) -> None:
    """Launcher of ``flash_bwd``."""
    with _plain(dout):
        reference.backward(dout, dlse, tape, p, grads)


def decode(
    q: Tensor, k: Tensor, v: Tensor, p: FlashParams, out: Tensor, lse: Tensor, num_splits: int
) -> None:
    """Launcher of ``flash_decode``: the forward; the number of splits does not change it."""
    with _plain(q):
        reference.forward(q, k, v, p, out, lse, out.new_empty(0))


def merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Launcher of ``merge_states``."""
    with _plain(out):
        reference.merge(outs, lses, out, lse)


_WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REQUIRES = (Device("cpu", "cuda"), Dtypes(*_WIDE))


def _spec(kind: str, op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.flash.{kind}",
        op=op,
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=(
            Device("cpu", "cuda"),
            Dtypes(*_WIDE, *((FLOAT8,) if kind in ("fwd", "decode") else ())),
            *(() if kind == "merge" else (Without("score_mod", "mask_mod"),)),  # CUDA C++
        ),
        score=0.0,  # anything that can serve is faster
        notes=notes,
    )


SPECS = (
    _spec("fwd", "flash_fwd", "plain PyTorch, the definition; float64-capable"),
    _spec("bwd", "flash_bwd", "plain PyTorch, explicit formulas"),
    _spec("decode", "flash_decode", "the forward, unsplit"),
    _spec("merge", "merge_states", "plain PyTorch"),
)
