"""Gates of channels: GLA, slots (GSA, ABC) and HGRN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.compat.fla._common import Result, backwards, known, old_state_name, run
from attnforge.ops import linear as _linear
from attnforge.ops._checks import fail
from attnforge.ops.gsa import gsa
from attnforge.ops.scan import hgrn

__all__ = [
    "chunk_gla",
    "chunk_gsa",
    "chunk_hgrn",
    "fused_chunk_gla",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn",
]


@old_state_name
def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:
    """``attnforge.gla`` with gates g [B, T, H, K]."""
    return fused_recurrent_gla(
        q, k, v, g, None, scale, initial_state, output_final_state, False, state_v_first, cu_seqlens
    )


fused_chunk_gla = chunk_gla


@old_state_name
def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``attnforge.gla`` with gates of key channels, gk, or of value channels, gv."""
    known("fused_recurrent_gla", rest)
    if reverse and gv is not None:
        gv = backwards(gv, cu_seqlens)
    return run(
        _linear.gla, [q, k, v, gk], gv=gv, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``attnforge.gsa``; without g the slots are those of ABC: s normalised by its running sum."""
    known("chunk_gsa", rest)
    if g is None:
        if cu_seqlens is not None:
            fail("chunk_gsa", "g is None beside cu_seqlens; want gates, or batched sequences")
        z = s.float().logcumsumexp(1)
        g, s = torch.cat((z[:, :1], z[:, :-1]), 1) - z, (s - z).exp().to(k.dtype)
    return gsa(
        q, k, v, s, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """``chunk_gsa`` with fla's other order of arguments."""
    if reverse:
        q, k, v, s = (backwards(x, cu_seqlens) for x in (q, k, v, s))
        g = None if g is None else backwards(g, cu_seqlens)
    out, state = chunk_gsa(
        q, k, v, s, g, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )
    return (backwards(out, cu_seqlens) if reverse else out), state


def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """``attnforge.hgrn`` of x, g [B, T, D]."""
    state = None if initial_state is None else initial_state.float()
    return hgrn(
        x, g, initial_state=state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )


chunk_hgrn = fused_recurrent_hgrn
