"""The delta rules token by token: the definition of ``delta_*``.

    S~ = e^{g_t} S_{t-1}                      what the state keeps: of each head, or key channel
    e  = v_t - S~^T k_t                       what it lacks of the value
    S_t = S~ + k_t (beta_t e)^T               o_t = scale S_t^T q_t

Accumulation is float64 for float64 inputs and float32 otherwise; the backward is autograd through
the recurrence. Without gates this is DeltaNet, with one per head Gated DeltaNet, with one per
channel Kimi Delta Attention.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnforge._params import DeltaGrads, DeltaParams

__all__ = ["backward", "forward", "recurrence", "step"]


def _one(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, s: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Sequences of one length, all [B, T, HV, ..] -> rows of o and the last state."""
    rows = []
    for t in range(q.shape[1]):
        if g is not None:
            factor = torch.exp(g[:, t])
            s = (factor[..., None, None] if factor.dim() == 2 else factor[..., None]) * s
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", s, k[:, t])
        s = s + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
        rows.append(scale * torch.einsum("bhkv,bhk->bhv", s, q[:, t]))
    return rows, s


def recurrence(q: Tensor, k: Tensor, v: Tensor, p: DeltaParams) -> tuple[Tensor, Tensor]:
    """The definition, differentiable: o and final states. Rows that no sequence has are 0."""
    acc = torch.float64 if q.dtype is torch.float64 else torch.float32
    batch, time, heads, width = v.shape
    q, k = (x.to(acc).repeat_interleave(heads // q.shape[2], 2) for x in (q, k))
    v, beta = v.to(acc), p.beta.to(acc)
    g = None if p.g is None else p.g.to(acc)
    spans = [(0, time)] if p.cu_seqlens is None else list(itertools.pairwise(p.cu_seqlens.tolist()))
    n = batch if p.cu_seqlens is None else len(spans)
    s0 = p.initial_state
    s0 = q.new_zeros((n, heads, q.shape[3], width)) if s0 is None else s0.to(acc)
    outs, states = [v.new_zeros((batch, 0, heads, width))], [s0[:0]]
    for i, (lo, hi) in enumerate(spans):
        own = s0 if p.cu_seqlens is None else s0[i : i + 1]
        gate = None if g is None else g[:, lo:hi]
        rows, s = _one(q[:, lo:hi], k[:, lo:hi], v[:, lo:hi], gate, beta[:, lo:hi], p.scale, own)
        outs += [row.unsqueeze(1) for row in rows]
        states.append(s)
    covered = spans[-1][1] if spans else 0
    outs.append(v.new_zeros((batch, time - covered, heads, width)))
    return torch.cat(outs, 1), torch.cat(states)


def forward(
    q: Tensor, k: Tensor, v: Tensor, p: DeltaParams, out: Tensor, final_state: Tensor
) -> None:
    """Fill the outputs of ``delta_chunk_fwd``."""
    found, state = recurrence(q, k, v, p)
    out.copy_(found)
    if final_state.dim() > 1:
        final_state.copy_(state)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: DeltaParams,
    grads: DeltaGrads,
) -> None:
    """Fill the gradients of ``delta_chunk_bwd``: autograd through ``recurrence``."""
    acc = torch.float64 if q.dtype is torch.float64 else torch.float32
    given = (q, k, v, p.g, p.beta, p.initial_state)
    leaves = [None if x is None else x.detach().to(acc).requires_grad_() for x in given]
    with torch.enable_grad():
        q, k, v, g, beta, state = leaves  # type: ignore[assignment]
        assert beta is not None
        out, final = recurrence(q, k, v, p._replace(g=g, beta=beta, initial_state=state))
        outs, douts = [out], [dout.to(acc)]
        if dfinal_state is not None:
            outs, douts = [out, final], [*douts, dfinal_state.to(acc)]
        inputs = [x for x in leaves if x is not None]
        some = [(x, d) for x, d in zip(outs, douts, strict=True) if x.requires_grad]
        found = iter(
            torch.autograd.grad(
                [x for x, _ in some], inputs, [d for _, d in some], allow_unused=True
            )
            if some
            else [None] * len(inputs)
        )
    for leaf, target in zip(leaves, grads, strict=True):
        if leaf is not None:
            value = next(found)
            target.copy_(torch.zeros_like(leaf) if value is None else value)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    indices: Tensor | None,
    p: DeltaParams,
    out: Tensor,
) -> None:
    """One token per row, [B, H, D], on a pool of states updated in place; see ``delta_step``."""
    slots = torch.arange(q.shape[0], device=q.device) if indices is None else indices.long()
    live = slots >= 0
    rows, keys, values, beta = (x[live].unsqueeze(1) for x in (q, k, v, p.beta))
    g = None if p.g is None else p.g[live].unsqueeze(1)
    own = slots[live]
    p = p._replace(g=g, beta=beta, initial_state=state[own])
    found, states = recurrence(rows, keys, values, p)
    state[own] = states
    out.zero_()
    out[live] = found[:, 0].to(out.dtype)
