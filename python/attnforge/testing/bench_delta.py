"""Benchmark cases of the delta rules and of the diagonal scan, rows of the `linear` family.

The peer of a sequence is torch's `scaled_dot_product_attention` with a causal mask on the same q, k
and v, in the contiguous `[B, H, T, D]` that suits it: what a layer would run instead. The peer of
a step is `mul_` on the pool of states, which reads and writes the same bytes and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

import attnforge
from attnforge.testing.bench import Case, ErrorStat, Goal, Workload
from attnforge.testing.compare import compare
from attnforge.testing.delta import DeltaInputs

__all__ = ["Shape", "cases", "sweep"]

_DTYPE_NAME = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_RULES = {"none": "delta_rule", "scalar": "gated_delta_rule", "key": "kda"}
# The token recurrence in float64 with its graph: 2048 tokens of 64 x 64 states are 70 MB.
_ERROR_TIME = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """One sequence problem."""

    gate: str
    time: int = 8192
    backward: bool = False
    dtype: torch.dtype = torch.float32
    heads: int = 8
    dim: int = 64

    @property
    def name(self) -> str:
        way = "fwdbwd" if self.backward else "fwd"
        return f"{_RULES[self.gate]}-{_DTYPE_NAME[self.dtype]}-{way}-t{self.time}"

    @property
    def title(self) -> str:
        way = "forward+backward" if self.backward else "forward"
        what = f"{_DTYPE_NAME[self.dtype]} {_RULES[self.gate]} {way}"
        return f"{what} T{self.time} H{self.heads} D{self.dim}"

    @property
    def flops(self) -> float:
        """Three products with the state per token, and twice and a half of that backward."""
        forward = 6.0 * self.time * self.heads * self.dim**2
        return forward * 3.5 if self.backward else forward


def _make(shape: Shape) -> DeltaInputs:
    g = torch.Generator().manual_seed(0)
    lead = (1, shape.time, shape.heads)
    q, k, v, dout = (torch.randn((*lead, shape.dim), generator=g) for _ in range(4))
    tail = {"none": None, "scalar": (), "key": (shape.dim,)}[shape.gate]
    gate = None if tail is None else -0.1 * torch.rand((*lead, *tail), generator=g)
    cast = [x.to(shape.dtype) for x in (q, normalize(k, dim=-1), v, dout)]
    state = torch.zeros(1, shape.heads, shape.dim, shape.dim)
    return DeltaInputs(
        cast[0], cast[1], cast[2], gate, torch.rand(lead, generator=g), None, None, cast[3], state
    )


def _with_grad(
    inputs: list[torch.Tensor], run: Callable[..., torch.Tensor], dout: torch.Tensor
) -> Callable[[], object]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, dout)


def _errors(inputs: DeltaInputs, backend: str | None) -> dict[str, ErrorStat]:
    """Largest error of the output, and of its bound, over the first tokens of one head."""
    rows = {n: x[:, :_ERROR_TIME, :1] for n, x in inputs.leaves().items()}
    part = DeltaInputs(
        rows["q"], rows["k"], rows["v"], rows.get("g"), rows["beta"], None, None,
        inputs.dout[:, :_ERROR_TIME, :1], inputs.dstate[:, :1],
    )  # fmt: skip
    with torch.no_grad():
        truth = part.truth(grad=False)
    out, _ = part.call(backend)
    used = compare({"out": out}, truth).used
    worst = float((out.double() - truth.values["out"]).abs().max())
    return {"attnforge": ErrorStat(worst, used)}


def build(shape: Shape, backend: str | None = None) -> Workload:
    """Inputs and both sides of one sequence case."""
    x = _make(shape)
    rows = [y.transpose(1, 2).contiguous() for y in (x.q, x.k, x.v)]

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours(*leaves: torch.Tensor) -> torch.Tensor:
        q, k, v, *gates = leaves
        rule = getattr(attnforge, _RULES[shape.gate])
        out: torch.Tensor = rule(q, k, v, *gates, backend=backend)[0]
        return out

    given = [x.q, x.k, x.v, *([] if x.g is None else [x.g]), x.beta]
    candidate: Callable[[], object] = lambda: ours(*given)  # noqa: E731
    peer: Callable[[], object] = lambda: softmax(*rows)  # noqa: E731
    if shape.backward:
        candidate = _with_grad(given, ours, x.dout)
        peer = _with_grad(rows, softmax, x.dout.transpose(1, 2).contiguous())
    return Workload(candidate, {"sdpa": peer}, lambda: _errors(x, backend))


def _case(shape: Shape, repeats: int, goals: dict[str, Goal], series: str = "") -> Case:
    return Case(
        name=shape.name,
        title=shape.title,
        family="linear",
        resource="compute",
        work=shape.flops,
        build=lambda backend: build(shape, backend),
        peers=("sdpa",),
        goals=goals,
        series=series,
        x=shape.time,
        repeats=repeats,
    )


def _step(batch: int, dim: int, repeats: int) -> Case:
    heads = 16
    states = batch * heads * dim * dim

    def make(backend: str | None) -> Workload:
        pool, spare = (torch.randn(batch, heads, dim, dim) for _ in range(2))
        x = normalize(torch.randn(batch, heads, dim), dim=-1)
        beta = torch.rand(batch, heads)
        g = -0.1 * torch.rand(batch, heads)
        return Workload(
            lambda: attnforge.delta_step(x, x, x, pool, beta, g=g, backend=backend),
            {"mul_ of states": lambda: spare.mul_(1.0)},
        )

    return Case(
        name=f"delta_step-b{batch}-d{dim}",
        title=f"fp32 delta_step B{batch} H{heads} D{dim}",
        family="linear",
        resource="read",
        work=8.0 * states,
        build=make,
        peers=("mul_ of states",),
        goals={"mul_ of states": Goal(0.6, 0.8)},
        repeats=repeats,
    )


def cases(repeats: int) -> list[Case]:
    """The rows of the table: forward at least 6 times causal SDPA, with backward 3.6 times."""
    forward, both = {"sdpa": Goal(6, 30)}, {"sdpa": Goal(3.6, 20)}
    found = [_case(Shape(gate), repeats, forward) for gate in _RULES]
    found += [_case(Shape(gate, backward=True), repeats, both) for gate in _RULES]
    found += [
        _case(Shape("scalar", backward=back, dtype=torch.bfloat16), repeats, goals)
        for back, goals in ((False, forward), (True, both))
    ]
    return [*found, _step(64, 128, repeats)]


def sweep(repeats: int, lengths: tuple[int, ...]) -> list[Case]:
    """The gated delta rule over sequence length."""
    series = "gated_delta_rule, fp32, 8 heads, D64"
    return [_case(Shape("scalar", t), repeats, {}, series) for t in lengths]
