"""Linear log-normal attention: exponentials of queries and keys, as concentrated as softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.nn._layer import Call, LinearLayer, State, wide
from attnforge.ops._linear_maps import additive_gates
from attnforge.ops.linear import gla

__all__ = ["LinearLogNormal"]

# The variance of log weights is A (alpha^2 var q + beta^2 var k) + B: the paper's fit.
_A, _B = 0.14855178144710912, -0.35487039130661086


class LinearLogNormal(LinearLayer):
    """o_t = phi(q_t)^T sum_j psi(k_j) v_j^T / phi(q_t)^T sum_j psi(k_j)

    phi(q) = e^{alpha q}, psi(k) = e^{beta k}, elementwise. Moment matching: alpha = s / std q,
    beta = s / std k with 2 A s^2 + B = var q var k, so that weights vary as those of softmax do.
    The deviations are running ones per head, updated in training as those of a batch norm, so
    that a token's output does not depend on later tokens.

    No exponential overflows: with z_t the running log-sum-exp of beta k, a channel's state is a
    softmax over the past, and o_t = softmax(alpha q_t + z_t)^T S_t.

    State: (S [N, H, D, V], z [N, H, D]). Source: Nahshan et al., Linear Log-Normal Attention
    (2023). Options: ``LinearLayer``.
    """

    parts = 2
    q_std: Tensor
    k_std: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.momentum = momentum
        self._project("q", "k", "v")
        self.register_buffer("q_std", torch.ones(num_heads))
        self.register_buffer("k_std", torch.ones(num_heads))

    @torch.no_grad()
    def _update(self, q: Tensor, k: Tensor) -> None:
        for x, kept in ((q, self.q_std), (k, self.k_std)):
            kept.lerp_(x.std((0, 1, 3)).to(kept.dtype), self.momentum)

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, "q", "k", "v")
        q, k = wide(q), wide(k)
        if self.training and x.shape[0] * x.shape[1] > 0:
            self._update(q, k)
        sq, sk = wide(self.q_std), wide(self.k_std)
        size = torch.sqrt((sq.square() * sk.square() - _B) / (2 * _A))
        alpha, beta = ((size / s)[:, None] for s in (sq, sk))
        past, z0 = (None, None) if state is None else state
        keys, gates, z, last = additive_gates(beta * k, z0, call.cu_seqlens)
        weights = torch.softmax(alpha * q + z, -1)
        o, new = gla(weights, keys, wide(v), gates, scale=1.0, initial_state=past, **call.options())
        return o.to(v.dtype), (new, last)  # type: ignore[return-value]
