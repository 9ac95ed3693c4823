"""Gated slot attention: a softmax over a few slots that hold keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from attnforge.nn._layer import Call, LinearLayer, OutputNorm, State, heads, wide
from attnforge.ops.gsa import gsa

__all__ = ["GatedSlotAttention"]


class GatedSlotAttention(LinearLayer):
    """K_t = K_{t-1} diag(f_t) + k_t (1 - f_t)^T        p_t = softmax(K_t^T q_t / sqrt(D))
    V_t = diag(f_t) V_{t-1} + (1 - f_t) v_t^T        o_t = norm(silu(V_t^T p_t))

    over M slots; f = sigmoid(W_f x)^{1 / temperature}, q and k through silu. State:
    (K [N, H, D, M], V [N, H, M, V]). Source: Zhang et al., Gated Slot Attention (2024). Options:
    ``LinearLayer``.
    """

    parts = 2

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        num_slots: int = 64,
        temperature: float = 8.0,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.temperature = temperature
        self._project("q", "k", "v")
        self.f_proj = nn.Linear(hidden_size, num_heads * num_slots, bias=False)
        self.norm = OutputNorm(self.v_head_dim)

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        gate = logsigmoid(heads(wide(self.f_proj(x)), self.num_heads)) / self.temperature
        strength = -torch.expm1(gate)
        o, new = gsa(silu(q), silu(k), v, strength, gate, initial_state=state, **call.options())  # type: ignore[arg-type]
        return self.norm(silu(o)), new  # type: ignore[return-value]
