"""FAST: attention by a polynomial of standardised queries and keys."""

from __future__ import annotations

from torch import Tensor

from attnforge.nn._layer import Call, LinearLayer, State
from attnforge.nn.feature_maps import standardize, taylor
from attnforge.ops._checks import fail
from attnforge.ops.linear import linear_attention

__all__ = ["FAST"]


class FAST(LinearLayer):
    """o_t = sum_j f(s_tj) v_j / sum_j f(s_tj), f(s) = sum_{l <= order} s^l / l!, s = scale q^ . k^

    q^ and k^ are q and k less their mean over channels, over their standard deviation. order 2
    (default) is positive for every s, and has 1 + D + D (D + 1) / 2 features: O(T D^3). order 1
    has 1 + D; its default scale 1 / D makes s a cosine, so that weights are not negative. That of
    order 2 is 1 / sqrt(D).

    State: (S [N, H, F, V], z [N, H, F]). Source: Gerami et al., FAST: Factorizable attention
    (2024); the scale is ours. Options: ``LinearLayer``.
    """

    parts = 2

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        order: int = 2,
        scale: float | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        if order not in (1, 2):
            fail(self._op, f"order is {order}; want 1 or 2")
        self.order = order
        self.scale = self.head_dim ** (-1.0 if order == 1 else -0.5) if scale is None else scale
        self._project("q", "k", "v")

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        q, k = (taylor(standardize(y), self.scale, self.order).to(v.dtype) for y in (q, k))
        pair = None if state is None else (state[0], state[1])
        return linear_attention(
            q, k, v, scale=1.0, normalize=True, initial_state=pair, **call.options()
        )  # type: ignore[return-value]
