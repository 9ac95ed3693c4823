"""Gated slot attention (GSA): two gated linear attentions with a softmax over slots between.

Kt_t = Kt_{t-1} diag(e^{g_t}) + k_t s_t^T     p_t = softmax(scale Kt_t^T q_t)    over M slots
Vt_t = diag(e^{g_t}) Vt_{t-1} + s_t v_t^T     o_t = Vt_t^T p_t
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import _checks
from attnforge.ops._checks import _shape, fail
from attnforge.ops.flash import _autocast
from attnforge.ops.linear import _gla_requests, gla
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["gsa"]


def _requests(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, **options: Any
) -> Sequence[Request]:
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    q, s, v, g = (
        x.new_empty((*x.shape[:2], q.shape[2], x.shape[3]), dtype=wide) for x in (q, s, v, g)
    )
    keys = q.new_empty(q.shape)
    packed = {"cu_seqlens": options.get("cu_seqlens")}
    return [*_gla_requests(q, keys, s, gv=g, **packed), *_gla_requests(s, s, v, g, **packed)]


def _same_heads(op: str, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> int:
    """k, v, s, g share batch, time and heads; q has a multiple of these heads. That multiple."""
    for name, x in (("s", s), ("g", g)):
        _checks.tensor(op, name, x)
    _checks._three(op, q, k, v, 4, "[batch, time, heads, head_dim]")
    lead = k.shape[:3]
    if v.shape[:3] != lead or s.dim() != 4 or s.shape[:3] != lead or g.shape != s.shape:
        fail(op, f"k, v, s, g do not fit; got {_shape(k)}, {_shape(v)}, {_shape(s)}, {_shape(g)}; "
                 "want [B, T, H, K], [B, T, H, V] and twice [B, T, H, slots]")  # fmt: skip
    heads = k.shape[2]
    if q.shape[:2] != lead[:2] or q.shape[3] != k.shape[3] or heads == 0 or q.shape[2] % heads:
        fail(op, f"q does not fit k; got {_shape(q)} and {_shape(k)}; want equal batch, time and "
                 "head_dim, and a multiple of k's heads")  # fmt: skip
    return q.shape[2] // heads


@explained_by(_requests)
def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Gated slot attention -> (o [B, T, HQ, V], final_state or None).

    q [B, T, HQ, K], k [B, T, H, K], v [B, T, H, V], HQ a multiple of H; s, g [B, T, H, M]: write
    strengths (often 1 - e^g) and natural-log gates of M slots. States are the pair
    (Kt [N, H, K, M], Vt [N, H, M, V]) in fp32. Options as in ``linear_attention``; scale, default
    1 / sqrt(K), is that of the softmax. Logits and probabilities stay in fp32: 16-bit inputs are
    widened. Everything is differentiable. Source: Zhang et al., Gated Slot Attention (2024).
    """
    op = "gsa"
    q, k, v = _autocast(op, q, k, v)
    group, dtype = _same_heads(op, q, k, v, s, g), q.dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    q, k, v, s = (x.to(wide) for x in (q, k, v, s))
    first, second = (None, None) if initial_state is None else initial_state
    if group > 1:
        k, v, s, g = (x.repeat_interleave(group, 2) for x in (k, v, s, g))
        first, second = (
            None if x is None else x.repeat_interleave(group, 1) for x in (first, second)
        )
    options: dict[str, Any] = {
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "backend": backend,
    }
    logits, keys = gla(q, k, s, gv=g, scale=scale, initial_state=first, **options)
    p = torch.softmax(logits, -1)
    out, values = gla(p, s, v, g, scale=1.0, initial_state=second, **options)
    if keys is None or values is None:
        return out.to(dtype), None
    assert isinstance(keys, Tensor)  # without a normaliser no pair
    assert isinstance(values, Tensor)
    return out.to(dtype), (keys[:, ::group], values[:, ::group])
