"""Cases of the additive recurrence, their float64 truth and its bounds.

The truth is the whole matrix: o_i = scale sum_j sum_c q_ic k_jc D_ijc v_j with explicit decays D
between every pair of tokens, and autograd through that. Nothing is shared with the library's own
recurrence. All results are sums of products, so the same function of absolute values gives the
size M that rounding is relative to: with K = u32 (16 + 2 T), and u the output's unit roundoff,

    o     1.05 u |o| + K M (plus the denominator's share)      states   K M
    dq, dk, dv     1.05 u |x| + (2 u16 + K) M                  dstates  (2 u16 + K) M
    dgate    (2 u16 + K) sum over later tokens of what it is a difference of

where u16 counts for 16-bit dtypes only. Tensor cores take states and scores rounded beside 16-bit
inputs: ``rounding`` of them is added to K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnforge
from attnforge.testing.oracle import Truth, unit_roundoff

__all__ = ["LinearCase", "LinearInputs", "linear_inputs"]


@dataclass(frozen=True)
class LinearCase:
    """One call. gate: none, head, scalar, key or value; strength: of gates, uniform in 0 .. -x."""

    batch: int = 1
    time: int = 37
    heads: int = 2
    value_heads: int = 2
    key_dim: int = 16
    value_dim: int = 24
    gate: str = "none"
    strength: float = 1.0
    dtype: torch.dtype = torch.float32
    normalize: bool | str = False
    causal: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    scale: float | None = None
    states: bool = True  # initial states and gradients of final ones


class _Leaves(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    state: Tensor | None
    z: Tensor | None


def _each(x: _Leaves, f: Callable[[Tensor], Tensor]) -> _Leaves:
    return x._replace(**{n: f(t) for n, t in x._asdict().items() if t is not None})


@dataclass
class LinearInputs:
    """Tensors of a case as they were rounded, and gradients of its results."""

    case: LinearCase
    leaves: _Leaves
    dout: Tensor
    dstate: Tensor
    dz: Tensor

    def call(self, leaves: _Leaves, **more: Any) -> tuple[Tensor, Any]:
        """The public function of the case's gate."""
        c, (q, k, v, gate, state, z) = self.case, leaves
        initial = None if state is None else (state, z) if c.normalize else state
        options: dict[str, Any] = {
            "scale": c.scale, "initial_state": initial, "output_final_state": True,
            "normalize": c.normalize, **more,
        }  # fmt: skip
        if c.cu_seqlens is not None:
            options["cu_seqlens"] = torch.tensor(c.cu_seqlens, dtype=torch.int32)
        if c.gate == "none":
            return attnforge.linear_attention(q, k, v, causal=c.causal, **options)
        if c.gate == "head":
            return attnforge.retention(q, k, v, decay=gate, **options)
        if c.gate == "scalar":
            return attnforge.simple_gla(q, k, v, gate, **options)
        options["gk" if c.gate == "key" else "gv"] = gate
        return attnforge.gla(q, k, v, **options)

    def run(self, backend: str) -> dict[str, Tensor]:
        """Results and gradients by name."""
        leaves = _each(self.leaves, lambda x: x.detach().clone())
        wanted = {n: x for n, x in leaves._asdict().items() if x is not None}
        if self.case.gate == "head":
            wanted.pop("gate")  # a constant
        for x in wanted.values():
            x.requires_grad_()
        out, state = self.call(leaves, backend=backend)
        state, z = state if self.case.normalize else (state, None)
        found = {"out": out, "state": state} | ({} if z is None else {"z": z})
        ends = {"out": self.dout}
        if self.case.states:
            ends |= {"state": self.dstate} | ({} if z is None else {"z": self.dz})
        grads = torch.autograd.grad(
            [found[n] for n in ends], list(wanted.values()), list(ends.values())
        )
        named = {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}
        return {n: x.detach() for n, x in (found | named).items()}

    def truth(self, rounding: float = 0.0) -> Truth:
        """Values and bounds of everything that ``run`` returns.

        rounding: of the operands that a kernel rounds beyond their dtype, relative, summed up over
        the chain of products that leads to a result.
        """
        return _truth(self, rounding)


def linear_inputs(case: LinearCase, seed: int = 0, **changes: Any) -> LinearInputs:
    """Random tensors of a case; with a denominator q and k are positive. changes: of leaves."""
    c, g = case, torch.Generator().manual_seed(seed)
    n = c.batch if c.cu_seqlens is None else len(c.cu_seqlens) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    rows = (c.batch, c.time)
    q, k = normal(*rows, c.heads, c.key_dim), normal(*rows, c.heads, c.key_dim)
    if c.normalize:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    v, dout = (normal(*rows, c.value_heads, c.value_dim) for _ in range(2))
    tail = {"none": None, "head": (), "scalar": (), "key": (c.key_dim,), "value": (c.value_dim,)}
    width, gate = tail[c.gate], None
    if width is not None:
        lead = () if c.gate == "head" else rows
        gate = -c.strength * torch.rand((*lead, c.value_heads, *width), generator=g)
    shape = (n, c.value_heads, c.key_dim)
    state, dstate = normal(*shape, c.value_dim), normal(*shape, c.value_dim)
    z, dz = normal(*shape).abs() + 0.1, normal(*shape)
    acc = torch.float64 if c.dtype is torch.float64 else torch.float32
    q, k, v, dout = (x.to(c.dtype) for x in (q, k, v, dout))
    gate = None if gate is None else gate.to(acc)
    leaves = _Leaves(
        q, k, v, gate, state.to(acc) if c.states else None,
        z.to(acc) if c.states and c.normalize else None,
    )._replace(**changes)  # fmt: skip
    return LinearInputs(c, leaves, dout, dstate.to(acc), dz.to(acc))


def _products(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D [.., T, T, W], decays from before the first token to each [.., T, W], and to the end."""
    total = torch.cumsum(gate.clamp_min(-1e4), -2)
    later = torch.ones(gate.shape[-2], gate.shape[-2], dtype=torch.bool).tril()[..., None]
    gap = (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(~later, -torch.inf)
    return gap.exp(), total.exp(), (total[..., -1:, :] - total).exp()


def _whole(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, s0: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """n / scale and the last state of sequences [.., T, D]; key and value are log gates."""
    if q.shape[-2] == 0:
        return v * 0.0, s0
    if not causal:
        s = s0 + k.transpose(-1, -2) @ v
        return q @ s, s
    (dk, bk, ek), (dv, bv, ev) = _products(key), _products(value)
    a = torch.einsum("...ic,...jc,...ijc->...ij", q, k, dk)
    out = torch.einsum("...ij,...jw,...ijw->...iw", a, v, dv)
    out = out + ((q * bk) @ s0) * bv
    end = bk[..., -1, :, None] * s0 * bv[..., -1, None, :]
    return out, end + (k * ek).transpose(-1, -2) @ (v * ev)


def _sequences(case: LinearCase) -> Iterator[tuple[slice, slice]]:
    """(time, states): of a packed batch one by one, else all at once."""
    if case.cu_seqlens is None:
        yield slice(0, case.time), slice(None)
        return
    for n, (lo, hi) in enumerate(itertools.pairwise(case.cu_seqlens)):
        yield slice(lo, hi), slice(n, n + 1)


def _every(case: LinearCase, x: _Leaves) -> tuple[Tensor, Tensor]:
    """Numerators [B, T, HV, V + 1] and states [N, HV, K, V + 1]: the last column is of ones."""
    group = case.value_heads // case.heads
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    q, k = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (x.q, x.k))
    v = torch.cat([x.v, torch.ones_like(x.v[..., :1])], -1).transpose(1, 2)
    n = case.batch if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    shape = (n, case.value_heads, case.key_dim)
    s0 = q.new_zeros((*shape, case.value_dim)) if x.state is None else x.state
    z0 = q.new_zeros(shape) if x.z is None else x.z
    s0 = torch.cat([s0, z0.unsqueeze(-1)], -1)
    key, value = torch.zeros_like(k), torch.zeros_like(v)
    if x.gate is not None:
        if case.gate == "value":
            value = torch.cat([x.gate.transpose(1, 2), value[..., -1:]], -1)
        else:
            gate = x.gate[:, None, None] if case.gate == "head" else x.gate.transpose(1, 2)
            key = (gate if case.gate == "key" else gate.reshape(*gate.shape[:3], 1)
                   if case.gate == "scalar" else gate) + key  # fmt: skip
    outs, states = [], []
    for time, which in _sequences(case):
        a, b, c, by_key, by_value = (t[:, :, time] for t in (q, k, v, key, value))
        out, state = _whole(a, b, c, by_key, by_value, s0[which], case.causal)
        outs.append(scale * out)
        states.append(state)
    covered = sum(t.shape[2] for t in outs)
    outs.append(v[:, :, covered:] * 0.0)
    return torch.cat(outs, 2).transpose(1, 2), torch.cat([*states, s0[:0]])


def _base(case: LinearCase, d: Tensor, eps: float = 1e-10) -> Tensor:
    return d.abs().clamp_min(eps) if case.normalize == "abs" else d + eps


def _covered(case: LinearCase) -> Tensor:
    """[1, T, 1, 1]: rows of a sequence."""
    end = case.time if case.cu_seqlens is None else case.cu_seqlens[-1]
    return (torch.arange(case.time) < end)[None, :, None, None]


class _Run(NamedTuple):
    numerators: Tensor
    states: Tensor
    leaves: _Leaves
    grads: dict[str, Tensor]


def _differentiate(case: LinearCase, x: _Leaves, dn: Tensor, dstates: Tensor) -> _Run:
    leaves = _each(x, lambda t: t.detach().double().requires_grad_())
    numerators, states = _every(case, leaves)
    given = {n: t for n, t in leaves._asdict().items() if t is not None}
    found = torch.autograd.grad(
        [numerators, states], list(given.values()), [dn, dstates], allow_unused=True
    )
    grads = {
        n: torch.zeros_like(t) if g is None else g
        for (n, t), g in zip(given.items(), found, strict=True)
    }
    return _Run(numerators.detach(), states.detach(), leaves, grads)


def _gate_sizes(case: LinearCase, size: _Run, dn: Tensor, dstates: Tensor) -> Tensor:
    """For every token, the sum over later ones of the sizes that its gate's gradient cancels."""
    g, group = size.grads, case.value_heads // case.heads
    q, k, v = (x.detach() for x in size.leaves[:3])
    if case.gate == "value":
        terms = size.numerators[..., :-1] * dn[..., :-1] + v * g["v"]
        last = (dstates * size.states).sum(2)[..., :-1]
    else:
        terms = (q * g["q"] + k * g["k"]).repeat_interleave(group, 2)
        last = (dstates * size.states).sum(3)
    if case.gate == "scalar":
        terms, last = terms.sum(-1), last.sum(-1)
    total = torch.zeros_like(terms)
    for time, which in _sequences(case):
        total[:, time] = terms[:, time].flip(1).cumsum(1).flip(1) + last[which].unsqueeze(1)
    return total


def _truth(inputs: LinearInputs, rounding: float) -> Truth:
    case, found = inputs.case, Truth()
    x = _each(inputs.leaves, lambda t: t.detach().double())
    dout = inputs.dout.double() * _covered(case)
    ends = torch.cat([inputs.dstate.double(), inputs.dz.double().unsqueeze(-1)], -1)
    ends = ends * float(case.states)
    if not case.normalize:
        ends[..., -1] = 0.0
    absolute = _each(x, torch.abs)._replace(gate=x.gate)
    unit = unit_roundoff(case.dtype)
    half = 2 * unit if case.dtype.itemsize == 2 else 0.0
    fine = unit_roundoff(torch.float64 if case.dtype is torch.float64 else torch.float32)
    k = fine * (16 + 2 * case.time) + rounding

    numerators, states = _every(case, x)
    positive = replace(case, scale=None if case.scale is None else abs(case.scale))
    sizes, state_sizes = _every(positive, absolute)
    n, d = numerators[..., :-1], numerators[..., -1:]
    if case.normalize:
        base = torch.where(_covered(case), _base(case, d), 1.0)
        out = n / base
        slope = torch.sign(d) if case.normalize == "abs" else torch.ones_like(d)
        dd = -(dout * out).sum(-1, keepdim=True) / base * slope
        dn = torch.cat([dout / base, dd], -1)
        far = (sizes[..., :-1] + out.abs() * sizes[..., -1:]) / base.abs()
        # d / base is a difference that its own rounding and that of <dO, o> enter.
        relative = 1 + sizes[..., -1:] / base.abs()
        more = (dout.abs() * (far + out.abs())).sum(-1, keepdim=True) / base.abs()
        dn_size = torch.cat([dout.abs() / base.abs(), more], -1) * relative
    else:
        out, far = n, sizes[..., :-1]
        dn = torch.cat([dout, torch.zeros_like(d)], -1)
        dn_size = dn.abs()
    found.put("out", out, 1.05 * unit * out.abs() + 2 * k * far + 1e-30)
    exact = _differentiate(case, x, dn, ends)
    size = _differentiate(positive, absolute, dn_size, ends.abs())
    found.put("state", states[..., :-1], k * state_sizes[..., :-1] + 1e-30)
    if case.normalize:
        found.put("z", states[..., -1], k * state_sizes[..., -1] + 1e-30)
    for name, value in exact.grads.items():
        if name == "gate":
            bound = (half + 2 * k) * _gate_sizes(case, size, dn_size, ends.abs())
            found.put("dgate", value, 2 * bound + 1e-30) if case.gate != "head" else None
            continue
        stored = unit if name in "qkv" else fine
        bound = 1.05 * stored * value.abs() + (half + 2 * k) * size.grads[name]
        found.put(f"d{name}", value, bound + 1e-30)
    return found
