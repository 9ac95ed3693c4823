"""Models that are the additive recurrence in other variables: Mamba-2, softmax over the past."""

from __future__ import annotations

from torch import Tensor

from attnforge.ops._checks import fail
from attnforge.ops._linear_checks import accumulator
from attnforge.ops._linear_maps import additive_gates
from attnforge.ops.linear import gla, simple_gla

__all__ = ["additive_gla", "mamba2_ssd"]


def mamba2_ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's state space: h_t = e^{a dt_t} h_{t-1} + b_t (dt_t x_t)^T, y_t = c_t^T h_t + d x_t.

    That is ``simple_gla`` with q = c, k = b, v = dt x, g = a dt and scale 1. x [B, T, H, P],
    dt [B, T, H] after softplus and bias, a [H] below 0, b and c [B, T, G, N] with H a multiple of
    the G groups, d [H] or None. States are [sequences, H, N, P], the transpose of Mamba's [P, N].
    Differentiable in everything. Source: Dao and Gu, 2024, section 6.
    """
    if dt.shape != x.shape[:-1] or a.shape != x.shape[-2:-1]:
        fail(
            "mamba2_ssd",
            f"dt and a are {tuple(dt.shape)} and {tuple(a.shape)}; want [batch, time, heads] = "
            f"{tuple(x.shape[:-1])} and [heads]; expand() what is shared",
        )
    wide = accumulator(x.dtype)
    y, state = simple_gla(
        c, b, (x * dt.unsqueeze(-1)).to(x.dtype), dt.to(wide) * a.to(wide), scale=1.0,
        initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    if d is not None:
        y = y + (x * d.unsqueeze(-1)).to(x.dtype)
    return y, state  # type: ignore[return-value]


def additive_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Each channel of S is a softmax over the past: S_t = sum_{j <= t} e^{k_j - z_t} v_j^T.

    z_t is the running log-sum-exp of the logits k [B, T, H, K]. Causal Latte has q = softmax(q)
    and scale 1, LightNet q = silu(q); ABC takes both passes of gated slot attention with these
    weights. The state is the pair (S [N, HV, K, V], z [N, H, K]). Logits may be -inf. Packed
    boundaries are read by the host.
    """
    state, z = (None, None) if initial_state is None else initial_state
    keys, gates, _, last = additive_gates(k, z, cu_seqlens)
    out, final = gla(
        q, keys.to(q.dtype), v, gates, scale=scale, initial_state=state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    return out, None if final is None else (final, last)  # type: ignore[return-value]
