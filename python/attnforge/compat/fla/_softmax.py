"""Softmax attention, with forget gates, windows and sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.compat.fla._common import known
from attnforge.ops._checks import fail
from attnforge.ops.flash import flash_attention, flash_attention_varlen

__all__ = [
    "parallel_attn",
    "parallel_forgetting_attn",
]


def parallel_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    *,
    sink_bias: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """Causal softmax attention, ``attnforge.flash_attention``.

    g [B, T, HQ]: log forget gates (Forgetting Transformer). window_size: keys that a row sees, its
    own among them; with 0 it sees none. sink_bias [HQ]: a logit per head in the softmax.
    """
    known("parallel_attn", rest)
    options: dict[str, Any] = {"causal": True, "softmax_scale": scale, "sinks": sink_bias}
    if window_size is not None:
        if window_size < 0:
            fail("parallel_attn", f"window_size is {window_size}; want at least 0, or None")
        options["window_size"] = (max(window_size - 1, 0), 0)
        if window_size == 0:
            sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            options["seqused_k"] = torch.zeros(sequences, dtype=torch.int32, device=q.device)
    if cu_seqlens is None:
        if g is not None:
            options["log_forget"] = g.float()
        return flash_attention(q, k, v, **options)  # type: ignore[no-any-return]
    bounds = cu_seqlens.to(torch.int32)
    if g is not None:
        options["log_forget"] = g[0].float()
    packed = (x.squeeze(0) for x in (q, k, v))
    out = flash_attention_varlen(*packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)
    return out.unsqueeze(0)  # type: ignore[no-any-return]


def parallel_forgetting_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """``parallel_attn`` with forget gates g [B, T, HQ]."""
    return parallel_attn(q, k, v, g, scale, window_size, cu_seqlens, **rest)
