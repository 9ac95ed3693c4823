"""What linear layers share: the call, its checks, projections to heads, output norm and gate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from attnforge.ops import _linear_checks
from attnforge.ops._checks import _shape, fail

__all__ = ["Call", "LinearLayer", "OutputNorm", "State", "heads", "inverse_softplus_steps", "wide"]

State = tuple[Tensor, ...]


class Call(NamedTuple):
    """Options that a layer hands on to the operators, by their names there."""

    cu_seqlens: Tensor | None
    output_final_state: bool
    backend: str | None

    def options(self) -> dict[str, Any]:
        return self._asdict()

    def conv(self) -> dict[str, Any]:
        """Of a short convolution, which is no operator and has no backend."""
        return {"cu_seqlens": self.cu_seqlens, "output_final_state": self.output_final_state}


class LinearLayer(nn.Module):
    """x [B, T, hidden_size] -> (y [B, T, hidden_size], state or None), causal, linear in T.

    cu_seqlens: [N + 1] boundaries of sequences packed into a batch of one.
    state: what ``output_final_state=True`` returned, a tuple of tensors with the sequences first;
        the call goes on where that one ended, be it for a prompt or for one token.
    backend: as in ``flash_attention``.

    fp32, bf16, fp16 and, on the reference, fp64; states and gates are at least fp32. Gradients
    reach inputs, parameters and states.
    """

    parts = 1  # tensors of the state

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self._op = f"nn.{type(self).__name__}"
        if head_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                fail(self._op, f"hidden_size {hidden_size} is no multiple of {num_heads} heads; "
                               "want one, or head_dim given")  # fmt: skip
            head_dim = hidden_size // num_heads
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim, self.v_head_dim = head_dim, head_dim if v_head_dim is None else v_head_dim
        self.key_width, self.value_width = num_heads * head_dim, num_heads * self.v_head_dim
        self.o_proj = nn.Linear(self.value_width, hidden_size, bias=False)

    def _project(self, *names: str) -> None:
        """Adds projections q_proj, k_proj, v_proj by their letters."""
        for name in names:
            width = self.value_width if name == "v" else self.key_width
            setattr(self, f"{name}_proj", nn.Linear(self.hidden_size, width, bias=False))

    def _heads(self, x: Tensor, *names: str) -> list[Tensor]:
        """The projections of x, [B, T, heads, D]."""
        return [heads(getattr(self, f"{name}_proj")(x), self.num_heads) for name in names]

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        output_final_state: bool = False,
        backend: str | None = None,
    ) -> tuple[Tensor, State | None]:
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            fail(self._op, f"x is {_shape(x)}; want [batch, time, {self.hidden_size}]")
        if state is not None and (not isinstance(state, tuple) or len(state) != self.parts):
            got = f"{len(state)} of them" if isinstance(state, tuple) else type(state).__name__
            fail(self._op, f"state is a tuple of {self.parts} tensors; got {got}; want what "
                           "output_final_state=True returned", TypeError)  # fmt: skip
        o, new = self.mix(x, state, Call(cu_seqlens, output_final_state, backend))
        return self.o_proj(o.flatten(2)), new if output_final_state else None

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        """Outputs of the heads [B, T, heads, v_head_dim], and the state if it is asked for."""
        raise TypeError(f"attnforge.{self._op}: a layer defines mix()")


class OutputNorm(nn.Module):
    """weight (.) x / rms(x) over the last dimension, times act(gate): "silu", "sigmoid" or None.

    Where a layer has no denominator, this keeps its outputs in range.
    """

    def __init__(self, dim: int, activation: str | None = None, *, weight: bool = True) -> None:
        super().__init__()
        self.dim, self.activation, self.eps = dim, activation, 1e-5
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = rms_norm(x, (self.dim,), self.weight, self.eps)
        if gate is None:
            return x
        if self.activation is not None:
            gate = (nn.functional.silu if self.activation == "silu" else torch.sigmoid)(gate)
        return x * gate.view_as(x)


def heads(x: Tensor, count: int) -> Tensor:
    """[.., count * D] -> [.., count, D]."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def wide(x: Tensor) -> Tensor:
    """x at the precision of states and gates: fp64 stays, all else is fp32."""
    return x.to(_linear_checks.accumulator(x.dtype))


def low_rank(inputs: int, rank: int, outputs: int, *, bias: bool = True) -> nn.Sequential:
    """A projection through ``rank`` dimensions."""
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


def inverse_softplus_steps(count: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """Biases b with softplus(b) log-uniform in low .. high: the first step sizes of Mamba-2."""
    steps = torch.exp(torch.empty(count).uniform_(math.log(low), math.log(high)))
    return steps + torch.log(-torch.expm1(-steps))
