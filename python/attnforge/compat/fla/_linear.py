"""Linear attention without a gate, with a constant decay, with a gate per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.compat.fla._common import Result, known, old_state_name, run
from attnforge.ops import linear as _linear
from attnforge.ops._checks import fail

__all__ = [
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "parallel_retention",
    "parallel_simple_gla",
]


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Result:
    """``attnforge.linear_attention``; with normalize states are pairs (kv, z [N, 1, H, K])."""
    if normalize and initial_state is not None:
        pair = isinstance(initial_state, (tuple, list))
        kv, z = initial_state if pair else (initial_state, None)
        z = kv.new_zeros(kv.shape[:3]) if z is None else z.reshape(kv.shape[:3])
        initial_state = (kv.float(), z.float())
    out, state = run(
        _linear.linear_attention, [q, k, v], scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, normalize=normalize,
        reverse=reverse,
    )  # fmt: skip
    if normalize and state is not None:
        state = (state[0], state[1].unsqueeze(1))
    return out, state


fused_chunk_linear_attn = chunk_linear_attn


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """``chunk_linear_attn`` with fla's other order of arguments; normalize is off by default."""
    return chunk_linear_attn(
        q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, reverse=reverse
    )


@old_state_name
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    reverse: bool = False,
    **rest: Any,
) -> Result:
    """``attnforge.simple_gla``: g [B, T, H] and g_gamma [H], a constant one, are added."""
    known("chunk_simple_gla", rest)
    op: Any = _linear.simple_gla
    options: dict[str, Any] = {}
    gates: list[Tensor | None] = [g]
    if g is None and g_gamma is not None:
        op, options, gates = _linear.retention, {"decay": g_gamma}, []
    elif g is not None and g_gamma is not None:
        gates = [g + g_gamma]
    return run(
        op, [q, k, v, *gates], scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens, reverse=reverse, **options,
    )  # fmt: skip


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """``chunk_simple_gla`` with fla's other order of arguments."""
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


@old_state_name
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``chunk_simple_gla`` with fla's other order of arguments."""
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens,
        reverse=reverse, **rest,
    )  # fmt: skip


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``chunk_simple_gla``; returns (o, None): attention matrices are never made."""
    if output_attentions:
        fail("parallel_simple_gla", "output_attentions is True; want False: the matrix is T x T")
    return chunk_simple_gla(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens, **rest)


@old_state_name
def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    reverse: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    """``attnforge.retention`` with RetNet's decays."""
    known("chunk_retention", rest)
    return run(
        _linear.retention, [q, k, v], scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, reverse=reverse,
        state_v_first=state_v_first,
    )  # fmt: skip


fused_chunk_retention = chunk_retention


@old_state_name
def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``chunk_retention`` with fla's other order of arguments."""
    return chunk_retention(
        q, k, v, scale, initial_state, output_final_state, cu_seqlens, reverse=reverse,
        state_v_first=state_v_first, **rest,
    )  # fmt: skip


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``chunk_retention``; returns (o, None): attention matrices are never made."""
    if output_attentions:
        fail("parallel_retention", "output_attentions is True; want False: the matrix is T x T")
    return chunk_retention(q, k, v, scale, cu_seqlens=cu_seqlens, **rest)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    reverse: bool = False,
    **rest: Any,
) -> Result:
    """``attnforge.lightning_attention`` with slopes of fla: -8 h / H (1 - layer / layers)."""
    known("chunk_lightning_attn", rest)
    head = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
    decay = -(8 / q.shape[2] * (1 - layer_idx / num_layers)) * head
    return run(
        _linear.lightning_attention, [q, k, v], decay=decay, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        reverse=reverse,
    )  # fmt: skip


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``chunk_lightning_attn`` with fla's other order of arguments."""
    return chunk_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens,
        reverse=reverse, **rest,
    )  # fmt: skip
