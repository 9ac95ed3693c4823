"""What follows the kernels: learned key-value sinks and a scale per head, as compositions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnforge._params import FlashMods, FlashParams
from attnforge.ops._flash_autograd import attend, merge

__all__ = ["finish"]


def _attend_sinks(
    q: Tensor, sink_kv: tuple[Tensor, Tensor], p: FlashParams, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Attention of every row to all n learned keys: k [n, Hk, D], v [n, Hk, Dv]."""
    dense = q if q.dim() == 4 else q.unsqueeze(0)
    k, v = (x.to(q.dtype).expand(dense.shape[0], *x.shape) for x in sink_kv)
    plain = FlashParams(
        None, None, None, None, None, dense.shape[1], k.shape[1], p.softmax_scale, -1, -1, p.softcap
    )
    scale = p.score_mods.row_scale
    if scale is not None:
        mods = FlashMods(row_scale=scale if q.dim() == 4 else scale.unsqueeze(0))
        plain = plain._replace(mods=mods)
    out, lse = attend(dense, k, v, plain, backend)
    return (out, lse) if q.dim() == 4 else (out[0], lse[0])


def finish(
    op: str,
    q: Tensor,
    p: FlashParams,
    result: tuple[Tensor, Tensor],
    features: Mapping[str, Any],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``result`` with sink_kv merged in and every head scaled, where the call asks for it."""
    out, lse = result
    sink_kv = features.get("sink_kv")
    if sink_kv is not None:
        parts = (result, _attend_sinks(q, sink_kv, p, backend))
        out, lse = merge([x for x, _ in parts], [x for _, x in parts], backend)
    scale = features.get("head_scale")
    if scale is not None:
        out = out * scale.to(out.dtype).unsqueeze(-1)
    return out, lse
