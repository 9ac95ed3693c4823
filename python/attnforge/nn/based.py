"""Based: the Taylor series of the exponential far away, the exponential itself nearby."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from attnforge.nn._layer import Call, LinearLayer, State
from attnforge.nn.feature_maps import taylor
from attnforge.nn.window import window_linear_attention

__all__ = ["Based"]


class Based(LinearLayer):
    """Weights of value j for query t, with s = q_t . k_j / sqrt(D), over their sum:

        e^s for the last ``window`` tokens, 1 + s + s^2 / 2 = phi(q_t) . phi(k_j) for those before

    q and k have head_dim = 16 channels by default, so that phi has 153: the 273 of the paper with
    every pair of channels once. The paper has window and Taylor layers in turns; one denominator
    over both spends each weight once. State: that of ``window_linear_attention``. Source: Arora et
    al., Simple linear attention language models (2024), section 4. Options: ``LinearLayer``.
    """

    parts = 4

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int = 16,
        v_head_dim: int | None = None,
        window: int = 64,
    ) -> None:
        if v_head_dim is None:
            v_head_dim = hidden_size // num_heads
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.window = window
        self._project("q", "k", "v")

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        scale = self.head_dim**-0.5
        phi = partial(taylor, scale=scale)
        return window_linear_attention(
            q, k, v, (phi, phi), window=self.window, scale=scale, state=state, **call.options()
        )
