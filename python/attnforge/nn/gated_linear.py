"""Gated linear attention: a forget gate per key channel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from attnforge.nn._layer import Call, LinearLayer, OutputNorm, State, heads, low_rank, wide
from attnforge.ops.linear import gla

__all__ = ["GatedLinearAttention"]


class GatedLinearAttention(LinearLayer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = norm(S_t^T q_t / sqrt(D)) (.) silu(W_r x_t)

    a = sigmoid(W_2 W_1 x + b)^{1 / temperature}, W_1 of rank ``gate_rank``. State:
    (S [N, H, D, V],). Source: Yang et al., Gated Linear Attention (2024), section 4.4. Options:
    ``LinearLayer``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        gate_rank: int = 16,
        temperature: float = 16.0,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.temperature = temperature
        self._project("q", "k", "v")
        self.gate = low_rank(hidden_size, gate_rank, self.key_width)
        self.r_proj = nn.Linear(hidden_size, self.value_width)
        self.norm = OutputNorm(self.v_head_dim, "silu")

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        gate = heads(logsigmoid(wide(self.gate(x))) / self.temperature, self.num_heads)
        past = None if state is None else state[0]
        o, new = gla(q, k, v, gate, initial_state=past, **call.options())
        return self.norm(o, self.r_proj(x)), (new,)  # type: ignore[return-value]
