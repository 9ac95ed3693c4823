"""``cpu.nsa.*``: the C++ kernel of ``csrc/cpu/nsa``, which gives the importance or the choice."""

from __future__ import annotations

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


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.nsa.{kind}",
        op=f"nsa_{kind}",
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=(
            Device("cpu"),
            Dtypes(torch.float32, torch.bfloat16, torch.float16),
            Dim("head_dim", 8, 256, 8),
            Features("varlen", "seqused_k"),
            Available("libattnforge_cpu.so", _native.unavailable),
        ),
        score=100.0,
        notes=notes,
    )


SPECS = (
    _spec("importance", "tiles of scores, summed over the heads of a group"),
    _spec("select", "importance of a tile, then its top n; no S x N buffer"),
)
