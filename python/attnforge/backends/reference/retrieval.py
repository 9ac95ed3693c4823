"""``reference.retrieval.*``: the definition of the retrieval family, for every device and dtype."""

from __future__ import annotations

from torch import Tensor

from attnforge._params import FlashTape, IndexedGrads, IndexedParams
from attnforge.backends.reference.flash import _REQUIRES, _plain
from attnforge.reference import retrieval as reference
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def indexed_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``indexed_fwd``."""
    with _plain(q):
        reference.forward(q, k, v, p, out, lse, out_lo)


def indexed_bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: IndexedParams, grads: IndexedGrads
) -> None:
    """Launcher of ``indexed_bwd``."""
    with _plain(dout):
        reference.backward(dout, dlse, tape, p, grads)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.retrieval.{kind}",
        op=kind,
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=_REQUIRES,
        score=0.0,
        notes=notes,
    )


SPECS = (
    _spec("indexed_fwd", "gathers the lists of one sequence at a time; float64-capable"),
    _spec("indexed_bwd", "explicit formulas over the gathered lists"),
)
