"""DeltaNet: a token's value replaces what its key read before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnforge.nn._layer import Call, LinearLayer, OutputNorm, State, heads, wide
from attnforge.nn.short_conv import ShortConvolution
from attnforge.ops.delta import delta_rule

__all__ = ["DeltaLayer", "DeltaNet"]


class DeltaLayer(LinearLayer):
    """What layers with a delta rule share: q, k, v = silu(conv(W x)), q and k over their norms,
    beta = sigmoid(W_b x), twice that with ``negative_eigenvalues``.

    The operator does not see norms below about 1e-3: it adds 1e-6 to their squares.
    """

    parts = 2

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.most = 2.0 if negative_eigenvalues else 1.0
        self.qkv_proj = nn.Linear(hidden_size, 2 * self.key_width + self.value_width, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.conv = ShortConvolution(2 * self.key_width + self.value_width, conv_size)

    def _inputs(
        self, x: Tensor, past: Tensor | None, call: Call
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
        """(q, k, v), beta, the state of the convolution."""
        y, new = self.conv(self.qkv_proj(x), state=past, **call.conv())
        parts = y.split([self.key_width, self.key_width, self.value_width], -1)
        q, k, v = (heads(part, self.num_heads) for part in parts)
        return (q, k, v), self.most * torch.sigmoid(wide(self.b_proj(x))), new


class DeltaNet(DeltaLayer):
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = norm(S_t^T q_t / sqrt(D))

    q, k, v after a short convolution and silu, q and k over their norms, beta = sigmoid(W x)
    (times 2 with ``negative_eigenvalues``). State: (inputs of the convolution
    [N, conv_size - 1, 2 H D + H V], S [N, H, D, V]). Source: Yang et al., Parallelizing linear
    transformers with the delta rule (2024). Options: ``LinearLayer``.
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: int | bool | None) -> None:
        super().__init__(hidden_size, num_heads, **options)  # type: ignore[arg-type]
        self.norm = OutputNorm(self.v_head_dim)

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        conv, past = (None, None) if state is None else state
        (q, k, v), beta, conv = self._inputs(x, conv, call)
        o, new = delta_rule(
            q, k, v, beta, use_qk_l2norm_in_kernel=True, initial_state=past, **call.options()
        )
        return self.norm(o), (conv, new)  # type: ignore[return-value]
