"""Lightning attention of TransNormerLLM: a constant decay per head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from attnforge.nn._layer import Call, LinearLayer, OutputNorm, State
from attnforge.ops.linear import lightning_attention

__all__ = ["LightningAttention"]


class LightningAttention(LinearLayer):
    """S_t = e^{-s_h} S_{t-1} + k_t v_t^T        o_t = srms(S_t^T q_t) (.) W_u x_t

    q, k = silu(W x); s_h = 2^{-8 h / H} (1 - layer_idx / num_layers), h = 1 .. H; srms divides by
    the root mean square over all heads and has no weight. State: (S [N, H, D, V],). Sources: Qin
    et al., TransNormerLLM (2023) and Lightning Attention-2 (2024). Options: ``LinearLayer``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        layer_idx: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self._project("q", "k", "v")
        self.u_proj = nn.Linear(hidden_size, self.value_width, bias=False)
        self.norm = OutputNorm(self.value_width, weight=False)

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        o, new = lightning_attention(
            silu(q), silu(k), v, layer_idx=self.layer_idx, num_layers=self.num_layers,
            initial_state=None if state is None else state[0], **call.options(),
        )  # fmt: skip
        return self.norm(o.flatten(2), self.u_proj(x)).view_as(o), (new,)  # type: ignore[return-value]
