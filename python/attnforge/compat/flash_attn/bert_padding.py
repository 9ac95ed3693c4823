"""Packing of padded batches by flash-attn's names: ``unpad_input``, its inverse ``pad_input``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices], rows in any order; differentiable."""
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of hidden_states [B, S, ...] that attention_mask [B, S] keeps, packed.

    unused_mask [B, S]: rows that are allocated, but not used. Returns (packed [T, ...], indices [T]
    into B * S, cu_seqlens [B + 1] int32, longest sequence, seqused [B] int32: rows in use).
    """
    kept = attention_mask.bool() if unused_mask is None else (attention_mask + unused_mask).bool()
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        longest,
        seqused,
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of ``unpad_input``: [batch, seqlen, ...] with zeros where no row belongs."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    out = out.index_copy(0, indices, hidden_states)
    return out.view(batch, seqlen, *hidden_states.shape[1:])
