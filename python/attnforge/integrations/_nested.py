"""Jagged nested tensors as packed sequences, for ``attnforge.integrations.torch``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from attnforge.ops._checks import fail
from attnforge.ops._features import Features
from attnforge.ops.flash import flash_attention_varlen

__all__ = ["nested_attention"]

_OP = "nested_attention"


def _packed(name: str, x: Any) -> tuple[Tensor, Tensor]:
    """Rows [T, H, D] and offsets [B + 1] of jagged ``x`` [B, S, H, D], ragged in S.

    Rows lie as they are unless ``x`` has holes (lengths beside its offsets): those are left out.
    """
    if not isinstance(x, Tensor):
        fail(_OP, f"{name} is {type(x).__name__}; want a jagged nested tensor", TypeError)
    jagged = x.is_nested and x.layout is torch.jagged
    ragged: Any = x  # torch's own class of them is private
    if not jagged or x.dim() != 4 or ragged._ragged_idx != 1:
        got = f"{'nested ' if x.is_nested else ''}{x.layout} of {x.dim()} dims"
        fail(_OP, f"{name} is {got}; want a jagged nested tensor [batch, seq, heads, head_dim], "
                  "ragged in seq")  # fmt: skip
    rows, offsets, lengths = ragged.values(), ragged.offsets(), ragged.lengths()
    if lengths is None:
        return rows, offsets
    ends = lengths.cumsum(0)
    starts = ends - lengths  # of the packed sequences
    moved = torch.repeat_interleave(offsets[:-1] - starts, lengths)
    packed = rows.index_select(0, torch.arange(moved.shape[0], device=rows.device) + moved)
    return packed, torch.cat((ends.new_zeros(1), ends))


def nested_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **features: Unpack[Features],
) -> Any:
    """``attnforge.flash_attention`` of jagged nested tensors, whose sequences differ in length.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] of ``layout=torch.jagged``, ragged in S;
    Sq and Sk may differ within a sequence. Options are those of ``flash_attention_varlen``, which
    runs on the tensors' own rows; a tensor with holes is packed first. Differentiable.

    Returns a jagged [B, Sq, Hq, Dv], or (out, lse) with lse jagged [B, Sq, Hq] fp32. Raises
    ValueError or TypeError on other tensors, and where k and v differ in their lengths.
    """
    (rows_q, at_q), (rows_k, at_k), (rows_v, at_v) = (
        _packed(name, x) for name, x in (("q", q), ("k", k), ("v", v))
    )
    if at_k is not at_v and not torch.equal(at_k, at_v):
        fail(_OP, "k and v differ in the lengths of their sequences; want one length for both")
    cu_q, cu_k = (x.to(torch.int32) for x in (at_q, at_k))
    out, lse = flash_attention_varlen(
        rows_q, rows_k, rows_v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        softmax_scale=softmax_scale, return_lse=True, backend=backend, **features,
    )  # fmt: skip
    out = torch.nested.nested_tensor_from_jagged(out, at_q)
    if not return_lse:
        return out
    return out, torch.nested.nested_tensor_from_jagged(lse.transpose(0, 1), at_q)
