"""Cottention: attention by cosines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnforge.nn._layer import Call, LinearLayer, State, wide
from attnforge.nn._sequences import sequences
from attnforge.ops.linear import linear_attention

__all__ = ["Cottention"]


class Cottention(LinearLayer):
    """o_t = sum_{j <= t} cos(q_t, k_j) v_j / j^{sigmoid(m_h)}, j = 1, 2, ..; m_h learned per head.

    No softmax and no denominator. State: (S [N, H, D, V], tokens so far [N]). Source: Mongaras et
    al., Cottention (2024). Options: ``LinearLayer``.
    """

    parts = 2

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
        self.m = nn.Parameter(torch.full((num_heads,), 0.5))

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        q, k = (nn.functional.normalize(wide(y), dim=-1).to(v.dtype) for y in (q, k))
        past, count = (None, None) if state is None else state
        place, count = sequences(self._op, x, call.cu_seqlens).counted(count)
        m = torch.sigmoid(wide(self.m))
        power = m * place.to(m.dtype).log()[:, None]
        v = (wide(v) * torch.exp(-power).view(*v.shape[:3], 1)).to(v.dtype)
        o, new = linear_attention(q, k, v, scale=1.0, initial_state=past, **call.options())
        return o, (new, count)  # type: ignore[return-value]
