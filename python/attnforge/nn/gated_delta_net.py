"""Gated DeltaNet: the delta rule on a state that decays."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from attnforge.nn._layer import Call, OutputNorm, State, inverse_softplus_steps, wide
from attnforge.nn.delta_net import DeltaLayer
from attnforge.ops.delta import gated_delta_rule

__all__ = ["GatedDeltaNet"]


class GatedDeltaNet(DeltaLayer):
    """S~ = a_t S_{t-1}    S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T
    o_t = norm(S_t^T q_t / sqrt(D)) (.) silu(W_g x_t)

    log a = -e^{A_h} softplus(W_a x + b_h) per head; the rest as in ``DeltaNet``, state and options
    too. Source: Yang et al., Gated Delta Networks (2024).
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: int | bool | None) -> None:
        super().__init__(hidden_size, num_heads, **options)  # type: ignore[arg-type]
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(inverse_softplus_steps(num_heads))
        self.g_proj = nn.Linear(hidden_size, self.value_width, bias=False)
        self.norm = OutputNorm(self.v_head_dim, "silu")

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        conv, past = (None, None) if state is None else state
        (q, k, v), beta, conv = self._inputs(x, conv, call)
        gate = -wide(self.A_log).exp() * softplus(wide(self.a_proj(x)) + wide(self.dt_bias))
        o, new = gated_delta_rule(
            q, k, v, gate, beta, use_qk_l2norm_in_kernel=True, initial_state=past, **call.options()
        )
        return self.norm(o, self.g_proj(x)), (conv, new)  # type: ignore[return-value]
