"""Flowformer: attention as a flow from values to outputs that is conserved at both ends."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.nn._layer import Call, LinearLayer, State, heads, wide
from attnforge.nn._sequences import sequences
from attnforge.ops.linear import linear_attention
from attnforge.ops.scan import hgrn

__all__ = ["Flowformer"]

_EPS = 1e-6


class Flowformer(LinearLayer):
    """Causal flow attention, q and k through a sigmoid, sums over j <= t, t = 1, 2, ..:

        I_t = t / (q_t . sum k_j)          O_t = t / (k_t . sum q_j)
        i_t = q_t . sum O_j k_j / t        o_t = clamp(k_t . sum I_j q_j / t, -1, 1)
        c_t = t e^{o_t} / sum e^{o_j}      y_t = sigmoid(i_t) I_t / t q_t^T sum k_j (c_j v_j)^T

    with 1e-6 added to q, k and the sums inside the first four. Sums are fp32 diagonal scans.

    State: (sums of k and q, of O k and I q, [N, 2 H D] each, of e^o [N, H], the sum of k (c v)^T
    [N, H, D, V], tokens so far [N]). Source: Wu et al., Flowformer (2022), causal form. Options:
    ``LinearLayer``.
    """

    parts = 5

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

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        q, k, v = (wide(y) for y in self._heads(x, "q", "k", "v"))
        q, k = torch.sigmoid(q), torch.sigmoid(k)
        plain, weighed, competing, past, count = (None,) * 5 if state is None else state
        place, count = sequences(self._op, x, call.cu_seqlens).counted(count)
        t = place.to(q.dtype).view(*x.shape[:2], 1)
        qe, ke = q + _EPS, k + _EPS

        (ks, qs), plain = self._sums((k, q), plain, call)
        incoming, outgoing = t / (qe * (ks + _EPS)).sum(-1), t / (ke * (qs + _EPS)).sum(-1)
        pair = (k * outgoing[..., None], q * incoming[..., None])
        (ks, qs), weighed = self._sums(pair, weighed, call)
        sink = (qe * (ks + _EPS)).sum(-1) / t
        source = ((ke * (qs + _EPS)).sum(-1) / t).clamp(-1.0, 1.0).exp()
        total, competing = hgrn(
            source, torch.zeros_like(source), initial_state=competing, **call.options()
        )
        # Behind the last boundary sums are 0: values there must stay finite to be ignored.
        competition = source / torch.where(total > 0, total, 1.0) * t
        out, new = linear_attention(
            q * (incoming / t)[..., None], k, v * competition[..., None], scale=1.0,
            initial_state=past, **call.options(),
        )  # fmt: skip
        out = out * torch.sigmoid(sink)[..., None]
        return out.to(x.dtype), (plain, weighed, competing, new, count)  # type: ignore[return-value]

    def _sums(
        self, pair: tuple[Tensor, Tensor], past: Tensor | None, call: Call
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        both = torch.cat([y.flatten(2) for y in pair], -1)
        sums, new = hgrn(both, torch.zeros_like(both), initial_state=past, **call.options())
        first, second = heads(sums, 2 * self.num_heads).chunk(2, 2)
        return (first, second), new
