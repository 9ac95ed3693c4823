"""Softmax over the last tokens and linear attention over all before them, one denominator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge.nn._layer import Call, State, wide
from attnforge.nn._sequences import Sequences, last, sequences, shifted
from attnforge.ops.flash import flash_attention_varlen, merge_states
from attnforge.ops.linear import linear_attention

__all__ = ["window_linear_attention"]

Maps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class _Past(NamedTuple):
    """keys, values [N, w, H, D]: the last tokens; known: how many of them there are [N]; far: the
    linear state of those before, [N, H, F, V + 1]."""

    keys: Tensor
    values: Tensor
    known: Tensor
    far: Tensor


def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_maps: Maps,
    *,
    window: int,
    scale: float,
    log_factor: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: State | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Weights e^{scale q_t . k_j} of the last ``window`` tokens j, c phi(q_t) . psi(k_j) before.

        o_t = (sum_near e^{s_tj} v_j + c phi(q_t)^T S_{t-w}) / (sum_near e^{s_tj} + c phi(q_t)^T z)

    q, k [B, T, H, D], v [B, T, H, V]; feature_maps: (phi, psi), positive inner products; c is
    e^{log_factor[h]}. The state is (keys [N, w, H, D] and values of the last w tokens, how many
    there are [N], the state of those before [N, H, F, V + 1], whose last column is z). Time is
    O(T (w D + F V)), whatever the past. Sources: Based (Arora et al., 2024), LoLCATs (Zhang et
    al., 2024).
    """
    s = sequences("nn.window_linear_attention", q, cu_seqlens)
    q_rows, k_rows, v_rows = (wide(x).flatten(0, 1) for x in (q, k, v))
    past = None if state is None else _Past(*state)
    call = Call(s.ends.to(torch.int32), output_final_state, backend)
    near, log_near = _near(q_rows, k_rows, v_rows, past, window, scale, s, call)
    outside, log_z, far = _far(q_rows, k_rows, v_rows, past, feature_maps, window, s, call)
    if log_factor is not None:
        log_z = log_z + wide(log_factor)[:, None]
    out, _ = merge_states([near, outside], [log_near, log_z], backend=backend)
    new: State = ()
    if output_final_state:
        keys, values, known = (None,) * 3 if past is None else past[:3]
        known = s.counted(known)[1].clamp_max(window)
        new = (last(k_rows, keys, window, s), last(v_rows, values, window, s), known, far)
    return out.to(v.dtype).view_as(v), new


def _near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: _Past | None,
    window: int,
    scale: float,
    s: Sequences,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the window: out [rows, H, V], LSE [H, rows]."""
    ends, features = s.ends, dict[str, Any]()
    if past is not None:
        # Every sequence gets its window in front; what is not there yet has a bias of -inf.
        n, w = past.keys.shape[:2]
        slots = torch.arange(w, device=q.device)
        front = ends[:-1, None] + torch.arange(n, device=q.device)[:, None] * w + slots
        new = torch.arange(q.shape[0], device=q.device) + (s.owner + 1) * w
        order = torch.argsort(torch.cat([front.flatten(), new]))
        k = torch.cat([past.keys.flatten(0, 1).to(k.dtype), k])[order]
        v = torch.cat([past.values.flatten(0, 1).to(v.dtype), v])[order]
        bias = torch.zeros(k.shape[0], dtype=k.dtype, device=k.device)
        bias[: n * w] = torch.where(slots < w - past.known[:, None], -torch.inf, 0.0).flatten()
        features["key_bias"] = bias[order][None]
        ends = ends + w * torch.arange(n + 1, device=q.device)
    out, lse = flash_attention_varlen(
        q, k, v, cu_seqlens_q=s.ends.to(torch.int32), cu_seqlens_k=ends.to(torch.int32),
        causal=True, window_size=(window - 1, 0), softmax_scale=scale, return_lse=True,
        backend=call.backend, **features,
    )  # fmt: skip
    return out, lse


def _far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: _Past | None,
    maps: Maps,
    window: int,
    s: Sequences,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention over what has left the window: out [rows, H, V], log z [H, rows], state."""
    keys, values, known, far = (None,) * 4 if past is None else past
    # When row t enters the window, the token ``window`` rows before it leaves.
    left = (s.counted(known)[0] > window)[:, None, None]
    phi, psi = maps[0](q[None]), maps[1](shifted(k, keys, window, s)[None])
    v = shifted(v, values, window, s)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    out, final = linear_attention(
        phi, psi * left, v[None], scale=1.0, initial_state=far, **call.options()
    )
    z = out[0, ..., -1]
    there = z > 0  # else nothing has left the window yet, or it weighs nothing
    safe = torch.where(there, z, 1.0)
    log_z = torch.where(there, safe.log(), -torch.inf)
    return out[0, ..., :-1] / safe[..., None], log_z.transpose(0, 1), final  # type: ignore[return-value]
