"""Kimi Delta Attention: the delta rule with a forget gate per key channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from attnforge.nn._layer import (
    Call,
    OutputNorm,
    State,
    heads,
    inverse_softplus_steps,
    low_rank,
    wide,
)
from attnforge.nn.delta_net import DeltaLayer
from attnforge.ops.delta import kda

__all__ = ["KimiDeltaAttention"]


class KimiDeltaAttention(DeltaLayer):
    """S~ = diag(a_t) S_{t-1}    S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T
    o_t = norm(S_t^T q_t / sqrt(D)) (.) sigmoid(W_4 W_3 x_t)

    log a = -e^{A_h} softplus(W_2 W_1 x + b) per channel, W_1 and W_3 of rank head_dim; the rest as
    in ``DeltaNet``, state and options too. Source: Kimi Linear (2025).
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: int | bool | None) -> None:
        super().__init__(hidden_size, num_heads, **options)  # type: ignore[arg-type]
        self.f_proj = low_rank(hidden_size, self.head_dim, self.key_width, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(inverse_softplus_steps(self.key_width))
        self.g_proj = low_rank(hidden_size, self.v_head_dim, self.value_width)
        self.norm = OutputNorm(self.v_head_dim, "sigmoid")

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        conv, past = (None, None) if state is None else state
        (q, k, v), beta, conv = self._inputs(x, conv, call)
        steps = softplus(wide(self.f_proj(x)) + wide(self.dt_bias))
        gate = -wide(self.A_log).exp()[:, None] * heads(steps, self.num_heads)
        o, new = kda(
            q, k, v, gate, beta, use_qk_l2norm_in_kernel=True, initial_state=past, **call.options()
        )
        return self.norm(o, self.g_proj(x)), (conv, new)  # type: ignore[return-value]
