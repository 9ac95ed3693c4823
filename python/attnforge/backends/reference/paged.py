"""``reference.paged.*``: the definition of the paged family, for every device, dtype and size.

Gathers a sequence's pages and decodes them to fp32, one sequence at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge._params import PagedCache, PagedParams, PagedWrite
from attnforge.backends.reference.flash import _REQUIRES, _plain
from attnforge.reference import paged as reference
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def fwd(q: Tensor, cache: PagedCache, p: PagedParams, out: Tensor, lse: Tensor) -> None:
    """Launcher of ``paged_fwd``."""
    with _plain(q):
        reference.forward(q, cache, p, out, lse)


def cascade(
    q: Tensor,
    cache: PagedCache,
    cu_groups: Tensor,
    prefix_lens: Tensor,
    p: PagedParams,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Launcher of ``cascade_fwd``: that prefixes are shared changes no result."""
    with _plain(q):
        reference.forward(q, cache, p, out, lse)


def append(k: Tensor, v: Tensor | None, cache: PagedCache, p: PagedWrite) -> None:
    """Launcher of ``paged_append``."""
    with torch.no_grad():
        reference.append(k, v, cache, p)


def _spec(kind: str, op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"reference.paged.{kind}",
        op=op,
        backend="reference",
        launch=f"{__name__}:{kind}",
        requires=_REQUIRES,
        score=0.0,  # anything that can serve is faster
        notes=notes,
    )


SPECS = (
    _spec("fwd", "paged_fwd", "gathers pages, then the flash reference"),
    _spec("cascade", "cascade_fwd", "as paged_fwd: nothing is shared"),
    _spec("append", "paged_append", "plain PyTorch, a sequence at a time"),
)
