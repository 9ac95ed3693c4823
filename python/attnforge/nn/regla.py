"""ReGLA: gated linear attention with a bounded feature map and a refined gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from attnforge.nn._layer import Call, LinearLayer, OutputNorm, State, heads, wide
from attnforge.nn.feature_maps import normalized_exp
from attnforge.ops.linear import gla

__all__ = ["ReGLA", "refined_log_gate"]


def refined_log_gate(f: Tensor, r: Tensor) -> Tensor:
    """log((1 - r') f'^2 + r' (1 - (1 - f')^2)), f' = sigmoid(f), r' = sigmoid(r), elementwise.

    That is log f' + log(f' + 2 r' (1 - f')): no difference of numbers near 1 or 0.
    """
    f, r = wide(f), wide(r)
    return logsigmoid(f) + torch.log(torch.sigmoid(f) + 2 * torch.sigmoid(r) * torch.sigmoid(-f))


class ReGLA(LinearLayer):
    """S_t = diag(g_t) S_{t-1} + phi(k_t) v_t^T        o_t = norm(phi(q_t)^T S_t)

    phi is the normalised exponential, D softmax(x) rescaled to a variance of 1. The forget gate
    f = sigmoid(W_f x) saturates; a second gate r = sigmoid(W_r x) moves it between f^2 and
    1 - (1 - f)^2: g = (1 - r) f^2 + r (1 - (1 - f)^2). An RMSNorm takes the denominator's place.

    State: (S [N, H, D, V],). Source: Lu et al., ReGLA (2025); the constant of the rescaling is
    ours. Options: ``LinearLayer``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self._project("q", "k", "v")
        self.f_proj = nn.Linear(hidden_size, self.key_width)
        self.r_proj = nn.Linear(hidden_size, self.key_width)
        nn.init.constant_(self.f_proj.bias, 3.0)  # half of the state is kept for 14 tokens
        self.norm = OutputNorm(self.v_head_dim)

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        q, k = (normalized_exp(y).to(v.dtype) for y in (q, k))
        gate = refined_log_gate(self.f_proj(x), self.r_proj(x))
        past = None if state is None else state[0]
        o, new = gla(q, k, v, heads(gate, self.num_heads), initial_state=past, **call.options())
        return self.norm(o), (new,)  # type: ignore[return-value]
