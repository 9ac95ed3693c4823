"""``reference.block_sparse.*``: the definition of block-sparse attention, lists as a mask."""

from __future__ import annotations

from torch import Tensor

from attnforge._params import BlockLists, FlashParams, FlashTape
from attnforge.backends.reference.flash import _REQUIRES, _plain
from attnforge.reference import block_sparse as reference
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: FlashParams,
    lists: BlockLists,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
) -> None:
    """Launcher of ``block_sparse_fwd``."""
    with _plain(q):
        reference.forward(q, k, v, p, lists, out, lse, out_lo)


def bwd(
    dout: Tensor,
    dlse: Tensor | None,
    tape: FlashTape,
    p: FlashParams,
    lists: BlockLists,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Launcher of ``block_sparse_bwd``."""
    with _plain(dout):
        reference.backward(dout, dlse, tape, p, lists, grads)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.block_sparse.{kind}",
        op=f"block_sparse_{kind}",
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=_REQUIRES,
        score=0.0,
        notes=notes,
    )


SPECS = (
    _spec("fwd", "plain PyTorch over a mask of single pairs; float64-capable"),
    _spec("bwd", "plain PyTorch, explicit formulas"),
)
