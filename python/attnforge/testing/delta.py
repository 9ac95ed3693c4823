"""Cases of the delta rules and the diagonal scan, with their float64 truth and bounds.

The truth is the token recurrence in float64 on the inputs as they were rounded, gradients by
autograd. A bound per element is, with u of the stored dtype, u32 = 2^-24 and C = ``GROWTH``,

    1.05 u |x| + C u32 S        S = max |x| over the head of the sequence's batch row

S for the gradient of gates also counts the terms that cancel in it, |q dq| + |k dk|, which add up
over a chunk. The recurrence contracts (keys of norm 1, beta within 0 .. 2), so errors do not grow
with length; C holds the rounding of sums of K and of 64 products and of solving 64 equations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import attnforge
from attnforge._params import DeltaParams
from attnforge.reference import delta as delta_reference
from attnforge.reference import scan as scan_reference
from attnforge.testing.oracle import Truth, unit_roundoff

__all__ = ["GROWTH", "DeltaCase", "DeltaInputs", "ScanInputs"]

GROWTH = 64.0
_U32 = unit_roundoff(torch.float32)


def _bound(x: Tensor, dtype: torch.dtype, heads: int | None, size: Tensor, growth: float) -> Tensor:
    """``heads``: the dimension of heads (None: channels alone); size: what S is the maximum of."""
    keep = {0} if heads is None else {0, heads}
    rest = [d for d in range(size.dim()) if d not in keep]
    top = size.abs().amax(rest, keepdim=True) if size.numel() else size.abs()
    if heads is None:
        top = size.abs().max() if size.numel() else torch.zeros(())
    return 1.05 * unit_roundoff(dtype) * x.abs() + growth * _U32 * top + 1e-37


def _grads(outs: list[Tensor], leaves: dict[str, Tensor], tops: list[Tensor]) -> dict[str, Tensor]:
    """Gradients by name, zeros where nothing depends on a leaf (no tokens)."""
    some = [(x, top) for x, top in zip(outs, tops, strict=True) if x.requires_grad]
    if not some:
        return {n: torch.zeros_like(x) for n, x in leaves.items()}
    found = torch.autograd.grad(
        [x for x, _ in some], list(leaves.values()), [top for _, top in some], allow_unused=True
    )
    return {
        n: torch.zeros_like(x) if y is None else y
        for (n, x), y in zip(leaves.items(), found, strict=True)
    }


@dataclass(frozen=True)
class DeltaInputs:
    """Operands of one call, with the gradients that come back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    dout: Tensor
    dstate: Tensor
    scale: float | None = None

    def call(self, backend: str | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        """Output and final state of the public function that the gate asks for."""
        options: dict[str, Any] = {
            "scale": self.scale,
            "initial_state": self.initial_state,
            "output_final_state": True,
            "cu_seqlens": self.cu_seqlens,
            "backend": backend,
            **more,
        }
        if self.g is None:
            out, state = attnforge.delta_rule(self.q, self.k, self.v, self.beta, **options)
        else:
            function = attnforge.gated_delta_rule if self.g.dim() == 3 else attnforge.kda
            out, state = function(self.q, self.k, self.v, self.g, self.beta, **options)
        assert state is not None
        return out, state

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        named = {n: getattr(self, n) for n in ("q", "k", "v", "g", "beta", "initial_state")}
        return {n: x for n, x in named.items() if x is not None}

    def run(self, backend: str | None = None, grad: bool = True) -> dict[str, Tensor]:
        """out, final_state and, by ``d`` + name, every gradient."""
        own: dict[str, Any] = {
            n: x.detach().clone().requires_grad_(grad) for n, x in self.leaves().items()
        }
        out, state = replace(self, **own).call(backend)
        found = {"out": out.detach(), "final_state": state.detach()}
        if grad:
            grads = torch.autograd.grad([out, state], list(own.values()), [self.dout, self.dstate])
            found.update({f"d{n}": x for n, x in zip(own, grads, strict=True)})
        return found

    def truth(self, grad: bool = True, growth: float = GROWTH) -> Truth:
        """Values and bounds of what ``run`` returns."""
        wide = {n: x.double().requires_grad_(grad) for n, x in self.leaves().items()}
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        p = DeltaParams(wide.get("g"), wide["beta"], wide.get("initial_state"),
                        self.cu_seqlens, scale)  # fmt: skip
        out, state = delta_reference.recurrence(wide["q"], wide["k"], wide["v"], p)
        truth, dtype = Truth(), self.q.dtype
        one, f32 = out.detach(), torch.float32
        truth.put("out", one, _bound(one, dtype, 2, one, growth))
        one = state.detach()
        truth.put("final_state", one, _bound(one, f32, 1, one, growth))
        if not grad:
            return truth
        tops = [self.dout.double(), self.dstate.double()]
        grads = _grads([out, state], wide, tops)
        for name, x in grads.items():
            size = x
            if name == "g":
                group = self.v.shape[2] // self.q.shape[2]
                products = torch.cat([wide[n].detach() * grads[n] for n in ("q", "k")], -1)
                terms = products.abs().sum(-1).repeat_interleave(group, 2)
                size = x.abs() + 0.5 * terms.reshape(*terms.shape, *[1] * (x.dim() - 3))
            dim = 1 if name == "initial_state" else 2
            stored = dtype if name in "qkv" else f32
            truth.put(f"d{name}", x, _bound(x, stored, dim, size, growth))
        return truth

    def cut(self, lo: int, hi: int, initial_state: Tensor | None) -> DeltaInputs:
        """Tokens lo .. hi - 1, from a state."""
        parts: dict[str, Any] = {
            n: x[:, lo:hi] for n, x in self.leaves().items() if n != "initial_state"
        }
        return replace(self, **parts, initial_state=initial_state, dout=self.dout[:, lo:hi])


@dataclass(frozen=True)
class DeltaCase:
    """A random problem by its numbers; ``make`` draws it.

    gate: "none", "scalar" or "key"; strength: gates are uniform in -strength .. 0.
    keys: "random" directions of norm 1, "same" one direction, "near" almost one direction.
    lengths: of packed sequences, None for a batch.
    """

    time: int = 100
    batch: int = 1
    heads: int = 1
    group: int = 1
    key_dim: int = 16
    value_dim: int = 16
    gate: str = "scalar"
    dtype: torch.dtype = torch.float32
    strength: float = 0.2
    beta: tuple[float, float] = (0.0, 1.0)
    keys: str = "random"
    lengths: tuple[int, ...] | None = None
    state: bool = True
    seed: int = 0

    def __str__(self) -> str:
        return ",".join(
            f"{f.name}={getattr(self, f.name)}".removeprefix("dtype=torch.")
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )

    def make(self) -> DeltaInputs:
        """The problem, drawn from its seed."""
        g = torch.Generator().manual_seed(self.seed)
        values = self.heads * self.group
        lead = (self.batch, self.time)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        k = normal(*lead, self.heads, self.key_dim)
        if self.keys != "random":
            k = k * (1e-3 if self.keys == "near" else 0.0) + normal(self.heads, self.key_dim)
        k = torch.nn.functional.normalize(k, dim=-1)
        low, high = self.beta
        beta = low + (high - low) * torch.rand((*lead, values), generator=g)
        shape = {"scalar": (*lead, values), "key": (*lead, values, self.key_dim)}.get(self.gate)
        gate = None if shape is None else -self.strength * torch.rand(shape, generator=g)
        n = self.batch if self.lengths is None else len(self.lengths)
        states = (n, values, self.key_dim, self.value_dim)
        ends = None if self.lengths is None else torch.tensor([0, *self.lengths]).cumsum(0)
        return DeltaInputs(
            q=normal(*lead, self.heads, self.key_dim).to(self.dtype),
            k=k.to(self.dtype),
            v=normal(*lead, values, self.value_dim).to(self.dtype),
            g=gate,
            beta=beta,
            initial_state=normal(*states) if self.state else None,
            cu_seqlens=None if ends is None else ends.to(torch.int32),
            dout=normal(*lead, values, self.value_dim).to(self.dtype),
            dstate=normal(*states),
        )


@dataclass(frozen=True)
class ScanInputs:
    """Operands of one diagonal scan, with the gradients that come back to it."""

    x: Tensor
    g: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    dout: Tensor
    dstate: Tensor

    def run(self, backend: str | None = None) -> dict[str, Tensor]:
        """out, final_state and, by ``d`` + name, every gradient."""
        named = {"x": self.x, "g": self.g, "initial_state": self.initial_state}
        own = {n: x.detach().clone().requires_grad_() for n, x in named.items() if x is not None}
        out, state = attnforge.hgrn(
            own["x"], own["g"], initial_state=own.get("initial_state"), output_final_state=True,
            cu_seqlens=self.cu_seqlens, backend=backend,
        )  # fmt: skip
        assert state is not None
        grads = torch.autograd.grad([out, state], list(own.values()), [self.dout, self.dstate])
        found = {"out": out.detach(), "final_state": state.detach()}
        return {**found, **{f"d{n}": x for n, x in zip(own, grads, strict=True)}}

    def truth(self) -> Truth:
        """Values and bounds of what ``run`` returns."""
        named = {"x": self.x, "g": self.g, "initial_state": self.initial_state}
        wide = {n: x.double().requires_grad_() for n, x in named.items() if x is not None}
        out, state = scan_reference.recurrence(
            wide["x"], wide["g"], wide.get("initial_state"), self.cu_seqlens
        )
        tops = [self.dout.double(), self.dstate.double()]
        values = {"out": out.detach(), "final_state": state.detach()}
        values |= {f"d{n}": x for n, x in _grads([out, state], wide, tops).items()}
        truth = Truth()
        for name, x in values.items():
            stored = self.x.dtype if name in ("out", "dx") else torch.float32
            truth.put(name, x, _bound(x, stored, None, x, 8.0))
        return truth
