"""``cpu.nsa.*``: the C++ kernel of ``csrc/cpu/nsa``, which gives the importance or the choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import NsaSelectParams
from attnforge.backends.cpu.flash import _native_op, _unit
from attnforge.registry.predicates import Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def _launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    positions: Tensor,
    p: NsaSelectParams,
    outputs: tuple[Tensor | None, Tensor | None],
) -> None:
    f = p.flash
    indices = (x if x is None else x.contiguous() for x in f[:3])
    _native_op("nsa_select")(
        *(_unit(q), _unit(k), lse.contiguous(), positions.contiguous(), *indices, *outputs),
        *(f.max_seqlen_q, f.max_seqlen_k, f.softmax_scale, *p[1:]),
    )


def importance(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Launcher of ``nsa_importance``."""
    _launch(q, k, lse, positions, p, (out, None))


def select(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, p: NsaSelectParams, out: Tensor
) -> None:
    """Launcher of ``nsa_select``."""
    _launch(q, k, lse, positions, p, (None, out))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    p: NsaSelectParams,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
) -> None:
    """Launcher of ``nsa_attend``."""
    f = p.flash
    lengths = (x if x is None else x.contiguous() for x in f[:3])
    _native_op("nsa_attend")(
        *(_unit(q), _unit(k), _unit(v), positions.contiguous(), *lengths, out, lse, indices),
        *(f.max_seqlen_q, f.max_seqlen_k, f.softmax_scale, *p[1:]),
    )


def combine(outs: list[Tensor], gates: Tensor, out: Tensor) -> None:
    """Launcher of ``nsa_combine``."""
    _native_op("combine")([x.contiguous() for x in outs], gates.float().contiguous(), out)


_DTYPES = Dtypes(torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = Available("libattnforge_cpu.so", _native.unavailable)
_HEADS = Dim("head_dim", 8, 256, 8)
_LENGTHS = Features("varlen", "seqused_k")


def _spec(kind: str, notes: str, *requires: Any) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.nsa.{kind}",
        op=f"nsa_{kind}",
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=(Device("cpu"), *requires, _LIBRARY),
        score=100.0,
        notes=notes,
    )


SPECS = (
    _spec("importance", "tiles of scores, summed over the heads of a group", _DTYPES, _HEADS,
          _LENGTHS),
    _spec("select", "importance of a tile, then its top n; no S x N buffer", _DTYPES, _HEADS,
          _LENGTHS),
    _spec("attend", "the compressed branch and the choice by it from the same scores",
          Dtypes(torch.float32), _HEADS, Dim("v_head_dim", 8, 256, 8), _LENGTHS),
    _spec("combine", "one pass over the branches", _DTYPES),
)  # fmt: skip
