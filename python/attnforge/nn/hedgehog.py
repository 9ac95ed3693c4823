"""Hedgehog: a learned softmax feature map, alone or beside a window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnforge.nn._layer import Call, LinearLayer, State
from attnforge.nn.feature_maps import HedgehogFeatureMap
from attnforge.nn.window import window_linear_attention
from attnforge.ops.linear import linear_attention

__all__ = ["Hedgehog"]


class Hedgehog(LinearLayer):
    """o_t = sum_{j <= t} phi(q_t) . psi(k_j) v_j / sum_{j <= t} phi(q_t) . psi(k_j).

    phi(x) = softmax([W x, -W x]) with W per head, one map for q, one for k, both first the
    identity. window w > 0: the last w tokens are weighed by e^{q . k / sqrt(D)} and the others by
    e^{c_h} phi . psi with a learned c_h, under one denominator, as in LoLCATs.

    State: (S [N, H, 2 D, V], z [N, H, 2 D]), with a window that of ``window_linear_attention``.
    Sources: Zhang et al., Hedgehog (2024); Zhang et al., LoLCATs (2024). Options: ``LinearLayer``.
    """

    parts = 2

    def __init__(
        self, hidden_size: int, num_heads: int, *, head_dim: int | None = None, window: int = 0
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim)
        self.window = window
        self._project("q", "k", "v")
        self.q_map = HedgehogFeatureMap(num_heads, self.head_dim)
        self.k_map = HedgehogFeatureMap(num_heads, self.head_dim)
        if window:
            self.parts = 4
            self.log_factor = nn.Parameter(torch.zeros(num_heads))

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        if self.window:
            return window_linear_attention(
                q, k, v, (self.q_map, self.k_map), window=self.window, scale=self.head_dim**-0.5,
                log_factor=self.log_factor, state=state, **call.options(),
            )  # fmt: skip
        q, k = self.q_map(q).to(v.dtype), self.k_map(k).to(v.dtype)
        pair = None if state is None else (state[0], state[1])
        return linear_attention(
            q, k, v, scale=1.0, normalize=True, initial_state=pair, **call.options()
        )  # type: ignore[return-value]
