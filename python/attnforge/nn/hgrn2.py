"""HGRN2: forget gates that are keys at the same time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from attnforge.nn._layer import Call, LinearLayer, OutputNorm, State, heads, wide
from attnforge.ops._checks import fail
from attnforge.ops.linear import gla

__all__ = ["HGRN2"]


class HGRN2(LinearLayer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T        o_t = norm(silu(q_t)^T S_t)

    f = b + (1 - b) sigmoid(W_f x) with a ``lower_bound`` b in [0, 1), which layers raise towards
    the top. State: (S [N, H, D, V],). Source: Qin et al., HGRN2 (2024). Options: ``LinearLayer``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        lower_bound: float = 0.0,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        if not 0.0 <= lower_bound < 1.0:
            fail(self._op, f"lower_bound is {lower_bound}; want 0 <= lower_bound < 1")
        self.lower_bound = lower_bound
        self._project("q", "v")
        self.f_proj = nn.Linear(hidden_size, self.key_width)
        self.norm = OutputNorm(self.v_head_dim)

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, v = self._heads(x, "q", "v")
        f = heads(wide(self.f_proj(x)), self.num_heads)
        gate, rest = logsigmoid(f), 1.0 - self.lower_bound
        if self.lower_bound:
            low = torch.full_like(gate, math.log(self.lower_bound))
            gate = torch.logaddexp(low, gate + math.log(rest))
        k = (rest * torch.sigmoid(-f)).to(v.dtype)
        past = None if state is None else state[0]
        o, new = gla(silu(q), k, v, gate, initial_state=past, **call.options())
        return self.norm(o), (new,)  # type: ignore[return-value]
