"""``reference.retrieval.*``: the definition of the retrieval family, for every device and dtype."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnforge._params import FlashTape, IndexedGrads, IndexedParams, SelectParams
from attnforge.backends.reference.flash import _REQUIRES, _plain
from attnforge.reference import clusters, lsh, selection
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


def key_scores(q: Tensor, *rest: Any) -> None:
    """Launcher of ``key_scores``."""
    with _plain(q):
        selection.key_scores(q, *rest)


def page_scores(q: Tensor, *rest: Any) -> None:
    """Launcher of ``page_scores``."""
    with _plain(q):
        selection.page_scores(q, *rest)


def select_columns(
    scores: Tensor, used: Tensor | None, p: SelectParams, ids: Tensor, lens: Tensor
) -> None:
    """Launcher of ``select_columns``."""
    with _plain(scores):
        selection.select_columns(scores, used, p, ids, lens)


def expand_runs(*args: Any) -> None:
    """Launcher of ``expand_runs``."""
    selection.expand_runs(*args)


def nearest(x: Tensor, *rest: Any) -> None:
    """Launcher of ``nearest``."""
    with _plain(x):
        clusters.nearest(x, *rest)


def cluster_sums(x: Tensor, *rest: Any) -> None:
    """Launcher of ``cluster_sums``."""
    with _plain(x):
        clusters.sums(x, *rest)


def lsh_encode(x: Tensor, *rest: Any) -> None:
    """Launcher of ``lsh_encode``."""
    with _plain(x):
        lsh.encode(x, *rest)


def lsh_insert(*args: Any) -> None:
    """Launcher of ``lsh_insert``."""
    lsh.insert(*args)


def lsh_truncate(*args: Any) -> None:
    """Launcher of ``lsh_truncate``."""
    lsh.truncate(*args)


def lsh_retrieve(*args: Any) -> None:
    """Launcher of ``lsh_retrieve``."""
    with _plain(args[4]):
        lsh.retrieve(*args)


def lsh_attend(*args: Any) -> None:
    """Launcher of ``lsh_attend``."""
    with _plain(args[4]):
        lsh.attend(*args)


_ANYWHERE = _REQUIRES[:1]  # of operators on int16 codes and int32 lists


def _spec(kind: str, notes: str, requires: Any = _REQUIRES) -> KernelSpec:
    return KernelSpec(
        id=f"reference.retrieval.{kind}",
        op=kind,
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=requires,
        score=0.0,
        notes=notes,
    )


SPECS = (
    _spec("indexed_fwd", "gathers the lists of one sequence at a time; float64-capable"),
    _spec("indexed_bwd", "explicit formulas over the gathered lists"),
    _spec("key_scores", "a matrix product, one sequence at a time"),
    _spec("page_scores", "every product of q and a bound at once"),
    _spec("select_columns", "a stable sort of whole rows"),
    _spec("expand_runs", "places of all ids from the ends of runs", _ANYWHERE),
    _spec("nearest", "chunks of a matrix product and their largest columns"),
    _spec("cluster_sums", "index_add"),
    _spec("lsh_encode", "a matrix product and its signs"),
    _spec("lsh_insert", "tables made anew", _ANYWHERE),
    _spec("lsh_truncate", "tables made anew", _ANYWHERE),
    _spec("lsh_retrieve", "counts hits one bucket at a time; probabilities in float64"),
    _spec("lsh_attend", "a look-up, then one softmax over each head's keys"),
)
