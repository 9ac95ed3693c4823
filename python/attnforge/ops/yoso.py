"""YOSO: attention whose weights are chances of a hash collision, sampled in linear time.

Zeng et al., 2021 (arXiv 2111.09714). With unit queries and keys

    E_ij = (1 - angle(q_i, k_j) / pi)^tau       the chance that tau random planes do not part them
    B_ij = mean over m hashes of [code(q_i) = code(k_j)]      unbiased for E_ij
    out_i = y_i / |y_i|,  y = E v  or  B v

B v is made without B: values are summed by the code of their key into a table of 2^tau rows per
hash, from which queries take the row of theirs. Gradients, with x_ij = <q_i, k_j> and g = dL/dy:

    dv = B^T g, of the same codes      dx_ij = <g_i, v_j> w_ij
    lower_bound     w = tau / 2 B: below E' = dE/dx in expectation and finite everywhere
    derivative      w = E'(x) where at least one hash collides, 1 / sqrt(1 - x^2) at most 10

and E in the place of B, all pairs colliding, if the expectation itself is asked for.
flops: m n (2^tau / n + 4 Dv) forward, m n D Dv of lower_bound; n^2 (2 D + m) of derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from attnforge.ops import _checks, _retrieval_ops
from attnforge.ops._checks import _name, _shape, fail
from attnforge.ops.flash import _choice

__all__ = ["yoso_attention"]

_OP = "yoso_attention"
GRADIENTS = ("lower_bound", "derivative")
_BLOCK = 1 << 22  # pairs, or numbers of tables, held at once
_STEEPEST = 10.0  # of 1 / sqrt(1 - x^2)


def _chance(x: Tensor) -> Tensor:
    """1 - acos(x) / pi, exact at both ends; x may pass 1 by rounding."""
    return torch.acos(-x.clamp(-1.0, 1.0)) / math.pi


def _slope(x: Tensor, tau: int) -> Tensor:
    """dE/dx, its pole cut off."""
    steep = (1.0 - x.square()).clamp_min(_STEEPEST**-2).rsqrt()
    return tau / math.pi * _chance(x).pow(tau - 1) * steep


def _rows(n: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, columns))
    return (slice(at, at + step) for at in range(0, n, step))


def _product(take: Tensor, put: Tensor, values: Tensor, tau: int) -> Tensor:
    """B values [N, S, C] for codes take [N, Sq, m] and put [N, Sk, m]: tables, one per hash."""
    heads, _, hashes = take.shape
    width = values.shape[-1]
    first = torch.arange(heads, device=values.device).unsqueeze(1) << tau
    out = values.new_zeros(heads, take.shape[1], width)
    rows = values.flatten(0, 1)
    for h in range(hashes):
        table = values.new_zeros(heads << tau, width)
        table.index_add_(0, (put[..., h] + first).flatten(), rows)
        out += table[(take[..., h] + first).flatten()].view_as(out)
    return out / hashes


def _weighted(take: Tensor, put: Tensor, a: Tensor, b: Tensor, x: Tensor, tau: int) -> Tensor:
    """sum_j B_ij <a_i, b_j> x_j of a [N, Sq, C], b [N, Sk, C], x [N, Sk, D]: C products of D."""
    out = torch.zeros(*a.shape[:2], x.shape[-1], dtype=a.dtype, device=a.device)
    step = max(1, _BLOCK // max(1, (a.shape[0] << tau) * x.shape[-1]))
    for c in range(0, a.shape[-1], step):
        part = b[..., c : c + step].unsqueeze(-1) * x.unsqueeze(-2)  # [N, Sk, c, D]
        found = _product(take, put, part.flatten(-2), tau).view(*a.shape[:2], -1, x.shape[-1])
        out += (a[..., c : c + step].unsqueeze(-2) @ found).squeeze(-2)
    return out


class _Yoso(Function):  # type: ignore[misc, unused-ignore]
    """y [N, Sq, Dv] of unit q [N, Sq, D], unit k, v, and the codes or None for the expectation."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, code_q: Any, code_k: Any, tau: int, rule: str
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, code_q, code_k)
        ctx.tau, ctx.rule = tau, rule
        if code_q is not None:
            return _product(code_q, code_k, v, tau)
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        for rows in _rows(q.shape[1], q.shape[0] * k.shape[1]):
            out[:, rows] = _chance(q[:, rows] @ k.mT).pow(tau) @ v
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, code_q, code_k = ctx.saved_tensors
        (g,) = grads
        tau = ctx.tau
        if code_q is not None and ctx.rule == "lower_bound":
            half = tau / 2
            return (
                half * _weighted(code_q, code_k, g, v, k, tau),
                half * _weighted(code_k, code_q, v, g, q, tau),
                _product(code_k, code_q, g, tau),
                *(None,) * 4,
            )
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows in _rows(q.shape[1], q.shape[0] * k.shape[1]):
            x = q[:, rows] @ k.mT
            if code_q is None:
                chance = _chance(x).pow(tau)
                dv += chance.mT @ g[:, rows]
                slope = _slope(x, tau) if ctx.rule == "derivative" else tau / 2 * chance
            else:
                met = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
                for a, b in zip(code_q[:, rows].unbind(-1), code_k.unbind(-1), strict=True):
                    met |= a.unsqueeze(-1) == b.unsqueeze(-2)
                slope = torch.where(met, _slope(x, tau), 0.0)
            dx = (g[:, rows] @ v.mT) * slope
            dq[:, rows] = dx @ k
            dk += dx.mT @ q[:, rows]
        if code_q is not None:
            dv = _product(code_k, code_q, g, tau)
        return dq, dk, dv, *(None,) * 4


def _unit(x: Tensor) -> Tensor:
    """x over its norm; 0 stays 0, with gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def _mask(name: str, mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    _checks.tensor(_OP, name, mask)
    if mask.dtype is not torch.bool or mask.shape != x.shape[:2]:
        fail(_OP, f"{name} is {_name(mask.dtype)} {_shape(mask)}; want bool {tuple(x.shape[:2])}")
    return mask.view(*mask.shape, 1, 1)


def yoso_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_hashes: int = 32,
    tau: int = 9,
    seed: int = 0,
    expectation: bool = False,
    gradient: str = "lower_bound",
    normalize: bool = True,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """YOSO attention of q [B, Sq, Hq, D] to k [B, Sk, Hk, D] and v [B, Sk, Hk, Dv]; not causal.

    num_hashes, tau: m hashes of tau bits (1 .. 15). seed: of the planes, which all heads share: the
    same result for the same seed on the same device. expectation: E in place of the sample, O(n^2).
    gradient: "lower_bound" or "derivative", see above. normalize: out_i is y_i / |y_i|, else y_i.
    query_mask, key_mask: bool [B, S], False for padding: such rows give 0, such keys weigh nothing.
    backend: of the hashing.

    Returns [B, Sq, Hq, Dv] of q's dtype; everything inside is fp32 (fp64 of fp64). A query that no
    key collides with, and one without keys, gives 0. Raises ValueError on what does not fit.
    """
    _checks.tensors(_OP, q, k, v)
    _checks.dense(_OP, q, k, v)
    for name, value, least, most in (("num_hashes", num_hashes, 1, 1024), ("tau", tau, 1, 15)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            fail(_OP, f"{name} is {value!r}; want an int in {least} .. {most}")
    if gradient not in GRADIENTS:
        fail(_OP, f"gradient is {gradient!r}; want one of {', '.join(GRADIENTS)}")
    sees, there = _mask("query_mask", query_mask, q), _mask("key_mask", key_mask, k)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    group = q.shape[2] // max(1, k.shape[2])
    rows = [_unit(q.to(wide)), _unit(k.to(wide)), v.to(wide)]
    if there is not None:
        rows[2] = torch.where(there, rows[2], 0.0)
    codes: list[Tensor | None] = [None, None]
    if not expectation:
        generator = torch.Generator().manual_seed(seed)
        planes = torch.randn(q.shape[3], tau * num_hashes, generator=generator).to(q.device)
        choice = _choice(_OP, backend)
        for n, x in enumerate(rows[:2]):
            own = x.detach().float()
            code = _retrieval_ops.lsh_encode(own, None, planes, tau, num_hashes, choice).long()
            codes[n] = code.repeat_interleave(group if n else 1, 1).flatten(0, 1)
    heads = [
        x.repeat_interleave(group if n else 1, 2).transpose(1, 2).flatten(0, 1)
        for n, x in enumerate(rows)
    ]
    y = _Yoso.apply(*heads, *codes, tau, gradient)  # type: ignore[no-untyped-call]
    out = y.view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    if sees is not None:
        out = torch.where(sees, out, 0.0)
    found: Tensor = (_unit(out) if normalize else out).to(q.dtype)
    return found
