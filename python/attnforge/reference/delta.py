"""The delta rules token by token: the definition of ``delta_*``.

    S~ = e^{g_t} S_{t-1}                      what the state keeps: of each head, or key channel
    e  = v_t - S~^T k_t                       what it lacks of the value
    S_t = S~ + k_t (beta_t e)^T               o_t = scale S_t^T q_t

Without gates this is DeltaNet, with one per head Gated DeltaNet, with one per channel Kimi Delta
Attention. Accumulation is float64 for float64 inputs and float32 otherwise. The backward writes the
formulas out, since an operator may run where autograd records nothing, and is checked against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import DeltaGrads, DeltaParams

__all__ = ["backward", "forward", "recurrence", "step"]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _decay(g: Tensor | None, t: int) -> Tensor | float:
    """What S [B, HV, K, V] is multiplied by before token t."""
    if g is None:
        return 1.0
    factor = torch.exp(g[:, t])
    return factor[..., None, None] if factor.dim() == 2 else factor[..., None]


class _Step(NamedTuple):
    """What one token leaves behind."""

    kept: Tensor  # S~ [B, HV, K, V]
    error: Tensor  # e [B, HV, V]
    state: Tensor  # S_t


def _walk(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, s: Tensor) -> Iterator[_Step]:
    """The recurrence over sequences of one length, all operands [B, T, HV, ..]."""
    for t in range(k.shape[1]):
        kept = _decay(g, t) * s
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", kept, k[:, t])
        s = kept + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        yield _Step(kept, error, s)


class _Span(NamedTuple):
    """Sequences of one length in the accumulator, heads of q and k repeated over the group."""

    rows: slice
    states: slice
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
    initial: Tensor  # [N, HV, K, V]


def _spans(q: Tensor, k: Tensor, v: Tensor, p: DeltaParams) -> Iterator[_Span]:
    acc, heads = _accumulator(q.dtype), v.shape[2]
    q, k = (x.to(acc).repeat_interleave(heads // q.shape[2], 2) for x in (q, k))
    ends = [0, q.shape[1]] if p.cu_seqlens is None else p.cu_seqlens.tolist()
    n = q.shape[0] if p.cu_seqlens is None else len(ends) - 1
    initial = p.initial_state
    if initial is None:
        initial = q.new_zeros((n, heads, q.shape[3], v.shape[3]))
    for i, (lo, hi) in enumerate(itertools.pairwise(ends)):
        rows = slice(lo, hi)
        own = slice(None) if p.cu_seqlens is None else slice(i, i + 1)
        g = None if p.g is None else p.g[:, rows].to(acc)
        beta, state = p.beta[:, rows].to(acc), initial[own].to(acc)
        yield _Span(rows, own, q[:, rows], k[:, rows], v[:, rows].to(acc), g, beta, state)


def recurrence(q: Tensor, k: Tensor, v: Tensor, p: DeltaParams) -> tuple[Tensor, Tensor]:
    """The definition, differentiable: o and final states. Rows that no sequence has are 0."""
    acc = _accumulator(q.dtype)
    outs, states, covered = [v[:, :0].to(acc)], [], 0
    for span in _spans(q, k, v, p):
        state = span.initial
        for t, step in enumerate(_walk(span.k, span.v, span.g, span.beta, state)):
            state = step.state
            out = p.scale * torch.einsum("bhkv,bhk->bhv", state, span.q[:, t])
            outs.append(out.unsqueeze(1))
        states.append(state)
        covered = span.rows.stop
    outs.append(v.new_zeros(v[:, covered:].shape, dtype=acc))
    if not states:
        states.append(q.new_zeros((0, v.shape[2], q.shape[3], v.shape[3]), dtype=acc))
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
    """Fill the gradients of ``delta_chunk_bwd``, token by token from the end."""
    acc = _accumulator(q.dtype)
    for x in grads:
        x.zero_()
    for span in _spans(q, k, v, p):
        ds = torch.zeros_like(span.initial)
        if dfinal_state is not None:
            ds = dfinal_state[span.states].to(acc)
        steps = list(_walk(span.k, span.v, span.g, span.beta, span.initial))
        for t in range(len(steps) - 1, -1, -1):
            kept, error, state = steps[t]
            row = span.rows.start + t
            key, beta = span.k[:, t], span.beta[:, t, :, None]
            do = p.scale * dout[:, row].to(acc)
            ds = ds + torch.einsum("bhk,bhv->bhkv", span.q[:, t], do)
            dwrite = torch.einsum("bhkv,bhk->bhv", ds, key)
            derror = beta * dwrite
            dkept = ds - torch.einsum("bhk,bhv->bhkv", key, derror)
            dq = torch.einsum("bhkv,bhv->bhk", state, do)
            dk = torch.einsum("bhkv,bhv->bhk", ds, beta * error)
            dk = dk - torch.einsum("bhkv,bhv->bhk", kept, derror)
            for target, x in ((grads.dq, dq), (grads.dk, dk)):  # over the heads that share one
                shared = x.reshape(x.shape[0], q.shape[2], -1, x.shape[2])
                target[:, row] = shared.sum(2).to(target.dtype)
            grads.dv[:, row] = derror.to(v.dtype)
            grads.dbeta[:, row] = (dwrite * error).sum(-1)
            if span.g is not None:
                along = (kept * dkept).sum(-1)
                grads.dg[:, row] = along if span.g.dim() == 4 else along.sum(-1)
            ds = _decay(span.g, t) * dkept
        if p.initial_state is not None:
            grads.dinitial_state[span.states] = ds


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
