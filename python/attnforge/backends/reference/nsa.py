"""``reference.nsa.*``: the definition of block importance and of NSA's choice of blocks."""

from __future__ import annotations

from torch import Tensor

from attnforge._params import NsaSelectParams
from attnforge.backends.reference.flash import _REQUIRES, _plain
from attnforge.reference import nsa as reference
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def importance(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Launcher of ``nsa_importance``."""
    with _plain(q):
        reference.importance(q, k, lse, positions, p, out)


def select(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Launcher of ``nsa_select``."""
    with _plain(q):
        reference.select(q, k, lse, positions, p, out)


def combine(outs: list[Tensor], gates: Tensor, out: Tensor) -> None:
    """Launcher of ``nsa_combine``."""
    with _plain(out):
        out.copy_(reference.combine(outs, gates))


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.nsa.{kind}",
        op=f"nsa_{kind}",
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=_REQUIRES,
        score=0.0,
        notes=notes,
    )


SPECS = (
    _spec("importance", "plain PyTorch, rows in chunks; float64-capable"),
    _spec("select", "plain PyTorch, a stable sort"),
    _spec("combine", "plain PyTorch"),
)
