"""The additive recurrence of linear attention, token by token: the definition of ``linear_*``.

    S_t = decay_t S_{t-1} + k_t v_t^T    z_t = decay_t z_{t-1} + k_t
    n_t = scale q_t^T S_t                d_t = scale q_t^T z_t          o = n, or n over d

The decay is e^gate: one number per head or per token and head, or a vector over the rows of S
("key") or its columns ("value"). Without ``causal`` every row reads the state of its whole
sequence. Accumulation is float64 for float64 inputs and float32 otherwise. The backward keeps the
state of every token and walks from the last one,

    dS_t = decay_{t+1} dS_{t+1} + scale q_t dn_t^T    dgate_t = sum decay_t S_{t-1} dS_t

and the like for z, whose gradient comes from dd.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape

__all__ = ["Result", "backward", "forward", "recurrence", "step"]


class Result(NamedTuple):
    """The recurrence of one call in its accumulator; z and d are None without a denominator."""

    out: Tensor  # [B, T, HV, V]
    state: Tensor  # [N, HV, K, V]
    z: Tensor | None  # [N, HV, K]
    den: Tensor | None  # [B, T, HV]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _factor(gate: Tensor | None, kind: str, t: int) -> Tensor | None:
    """What S [.., HV, K, V] is multiplied by before token t."""
    if gate is None:
        return None
    if kind == "head":
        return torch.exp(gate)[:, None, None]
    now = torch.exp(gate[:, t])
    return {"scalar": now[..., None, None], "key": now[..., None], "value": now[..., None, :]}[kind]


def _normalized(n: Tensor, d: Tensor, p: LinearParams) -> Tensor:
    base = d + p.eps if p.normalize == "sum" else d.abs().clamp_min(p.eps)
    return n / base.unsqueeze(-1)


def _one(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, p: LinearParams, s: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences of one length: q, k [B, T, HV, K], v [B, T, HV, V] -> n, d, the last S and z."""
    if not p.causal:
        s = s + torch.einsum("bthk,bthv->bhkv", k, v)
        z = z + k.sum(1)
        n, d = torch.einsum("bthk,bhkv->bthv", q, s), torch.einsum("bthk,bhk->bth", q, z)
        return p.scale * n, p.scale * d, s, z
    rows, dens = [], []
    for t in range(q.shape[1]):
        factor = _factor(gate, p.gate_kind, t)
        if factor is not None:
            s = factor * s
            z = z if p.gate_kind == "value" else factor[..., 0] * z
        s, z = s + k[:, t, :, :, None] * v[:, t, :, None, :], z + k[:, t]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s))
        dens.append((q[:, t] * z).sum(-1))
    if not rows:
        return v.new_zeros(v.shape), q.new_zeros(q.shape[:-1]), s, z
    return p.scale * torch.stack(rows, 1), p.scale * torch.stack(dens, 1), s, z


def _spans(q: Tensor, p: LinearParams) -> Iterator[tuple[slice, slice, slice]]:
    """(batch, time, states) of sequences that are walked together."""
    if p.cu_seqlens is None:
        yield slice(None), slice(None), slice(None)
        return
    for n, (lo, hi) in enumerate(itertools.pairwise(p.cu_seqlens.tolist())):
        yield slice(None), slice(lo, hi), slice(n, n + 1)


def recurrence(q: Tensor, k: Tensor, v: Tensor, p: LinearParams) -> Result:
    """The definition, differentiable. Rows that no sequence has are 0."""
    acc, group = _accumulator(q.dtype), v.shape[2] // q.shape[2]
    q, k = (x.to(acc).repeat_interleave(group, 2) for x in (q, k))
    v = v.to(acc)
    n = q.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
    shape = (n, v.shape[2], q.shape[3])
    s0 = q.new_zeros((*shape, v.shape[3])) if p.initial_state is None else p.initial_state.to(acc)
    z0 = q.new_zeros(shape) if p.initial_z is None else p.initial_z.to(acc)
    outs, dens, states, zs = [], [], [], []
    for batch, time, which in _spans(q, p):
        gate = p.gate
        if gate is not None and p.gate_kind != "head":
            gate = gate[batch, time]
        rows, keys, values = (x[batch, time] for x in (q, k, v))
        numerator, d, s, z = _one(rows, keys, values, gate, p, s0[which], z0[which])
        outs.append(_normalized(numerator, d, p) if p.normalize else numerator)
        dens.append(d)
        states.append(s)
        zs.append(z)
    covered = sum(x.shape[1] for x in outs)
    outs.append(v[:, covered:] * 0.0)
    dens.append(q.new_zeros((q.shape[0], q.shape[1] - covered, v.shape[2])))
    state, z = (torch.cat([*x, y[:0]]) for x, y in ((states, s0), (zs, z0)))
    if not p.normalize:
        return Result(torch.cat(outs, 1), state, None, None)
    return Result(torch.cat(outs, 1), state, z, torch.cat(dens, 1))


def forward(q: Tensor, k: Tensor, v: Tensor, p: LinearParams, outputs: LinearOutputs) -> None:
    """Fill the outputs of ``linear_chunk_fwd``."""
    found = recurrence(q, k, v, p)
    outputs.out.copy_(found.out)
    if outputs.final_state.dim() > 1:
        outputs.final_state.copy_(found.state)
    if found.z is not None and found.den is not None:
        outputs.den.copy_(found.den)
        if outputs.final_z.dim() > 1:
            outputs.final_z.copy_(found.z)
    if outputs.out_lo.dim() > 1:
        outputs.out_lo.copy_(found.out - outputs.out)


class _Ends(NamedTuple):
    """Of sequences walked together: operands [B, T, HV, .], gradients of n and d, end states."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    dn: Tensor
    dd: Tensor
    s: Tensor  # initial
    z: Tensor
    ds: Tensor  # gradients of the final ones
    dz: Tensor


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _all_at_once(x: _Ends, p: LinearParams) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the gate (none), S and z of a bidirectional call."""
    s = x.s + torch.einsum("bthk,bthv->bhkv", x.k, x.v)
    z, dz = x.z + x.k.sum(1), x.dz + p.scale * (x.q * x.dd.unsqueeze(-1)).sum(1)
    ds = x.ds + p.scale * torch.einsum("bthk,bthv->bhkv", x.q, x.dn)
    dq = torch.einsum("bthv,bhkv->bthk", x.dn, s) + x.dd.unsqueeze(-1) * z.unsqueeze(1)
    dk = torch.einsum("bthv,bhkv->bthk", x.v, ds) + dz.unsqueeze(1)
    return p.scale * dq, dk, torch.einsum("bthk,bhkv->bthv", x.k, ds), x.q[..., 0], ds, dz


def _backwards(x: _Ends, p: LinearParams) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the gate (or of nothing), S and z of a causal call."""
    states, s, z = [], x.s, x.z
    for t in range(x.q.shape[1]):
        factor = _factor(x.gate, p.gate_kind, t)
        states.append((s, z))
        if factor is not None:
            s, z = factor * s, z if p.gate_kind == "value" else factor[..., 0] * z
        s, z = s + _outer(x.k[:, t], x.v[:, t]), z + x.k[:, t]
    grads = [torch.zeros_like(t) for t in (x.q, x.k, x.v)]
    dgate = torch.zeros_like(x.q[..., 0] if x.gate is None or x.gate.dim() == 1 else x.gate)
    ds, dz = x.ds, x.dz
    for t in reversed(range(x.q.shape[1])):
        ds = ds + p.scale * _outer(x.q[:, t], x.dn[:, t])
        dz = dz + p.scale * x.q[:, t] * x.dd[:, t, :, None]
        grads[0][:, t] = p.scale * (
            (s @ x.dn[:, t].unsqueeze(-1))[..., 0] + z * x.dd[:, t, :, None]
        )
        grads[1][:, t] = (ds @ x.v[:, t].unsqueeze(-1))[..., 0] + dz
        grads[2][:, t] = (ds * x.k[:, t].unsqueeze(-1)).sum(-2)
        s, z = states[t]
        factor = _factor(x.gate, p.gate_kind, t)
        if factor is None:
            continue
        if p.gate_kind != "head":
            dgate[:, t] = _gate_grad(factor * s * ds, factor, z * dz, p.gate_kind)
        ds, dz = factor * ds, dz if p.gate_kind == "value" else factor[..., 0] * dz
    return (*grads, dgate, ds, dz)


def _gate_grad(through: Tensor, factor: Tensor, through_z: Tensor, kind: str) -> Tensor:
    if kind == "value":
        return through.sum(-2)
    by_row = through.sum(-1) + factor[..., 0] * through_z
    return by_row if kind == "key" else by_row.sum(-1)


def _numerators(
    dout: Tensor, outputs: LinearOutputs, p: LinearParams, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of n and d."""
    dn = dout.to(acc)
    if not p.normalize:
        return dn, torch.zeros_like(dn[..., 0])
    d, out = outputs.den.to(acc), outputs.out.to(acc)
    if outputs.out_lo.dim() > 1:
        out = out + outputs.out_lo.to(acc)
    one = torch.ones_like(d)
    base, slope = (d + p.eps, one) if p.normalize == "sum" else (
        d.abs().clamp_min(p.eps), torch.where(d.abs() > p.eps, d.sign(), 0.0 * one)
    )  # fmt: skip
    return dn / base.unsqueeze(-1), -(dn * out).sum(-1) / base * slope


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    dfinal_z: Tensor | None,
    tape: LinearTape,
    p: LinearParams,
    grads: LinearGrads,
) -> None:
    """Fill the gradients of ``linear_chunk_bwd``."""
    acc, heads = _accumulator(tape.q.dtype), tape.q.shape[2]
    group = tape.v.shape[2] // heads
    q, k = (x.to(acc).repeat_interleave(group, 2) for x in (tape.q, tape.k))
    v = tape.v.to(acc)
    dn, dd = _numerators(dout, tape.outputs, p, acc)
    n = q.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
    shape = (n, v.shape[2], q.shape[3])

    def whole(x: Tensor | None, *more: int) -> Tensor:
        return q.new_zeros((*shape, *more)) if x is None else x.to(acc)

    s, ds = whole(p.initial_state, v.shape[3]), whole(dfinal_state, v.shape[3])
    z, dz = whole(p.initial_z), whole(dfinal_z)
    for x in grads:
        x.zero_()
    for batch, time, which in _spans(q, p):
        at = (batch, time)
        gate = p.gate if p.gate is None or p.gate_kind == "head" else p.gate[at]
        ends = _Ends(q[at], k[at], v[at], gate, dn[at], dd[at], s[which], z[which], ds[which],
                     dz[which])  # fmt: skip
        dq, dk, dv, dgate, ds0, dz0 = (_backwards if p.causal else _all_at_once)(ends, p)
        for target, found in ((grads.dq, dq), (grads.dk, dk)):
            by_head = found.reshape(*found.shape[:2], heads, group, found.shape[3])
            target[at] = by_head.sum(3).to(target.dtype)
        grads.dv[at] = dv.to(v.dtype)
        if grads.dgate.dim() > 1:
            grads.dgate[at] = dgate
        for target, found in ((grads.dinitial_state, ds0), (grads.dinitial_z, dz0)):
            if target.dim() > 1:
                target[which] = found


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    indices: Tensor | None,
    p: LinearParams,
    out: Tensor,
) -> None:
    """One token of the recurrence per row, on a pool of states; see ``linear_step``."""
    slots = torch.arange(q.shape[0], device=q.device) if indices is None else indices.long()
    live = slots >= 0
    own, gate = slots[live], p.gate
    if gate is not None and p.gate_kind != "head":
        gate = gate[live].unsqueeze(1)
    p = p._replace(gate=gate, initial_state=state[own], initial_z=None if z is None else z[own])
    rows, keys, values = (x[live].unsqueeze(1) for x in (q, k, v))
    found = recurrence(rows, keys, values, p)
    state[own] = found.state
    if z is not None and found.z is not None:
        z[own] = found.z
    out.zero_()
    out[live] = found.out[:, 0].to(out.dtype)
