"""Benchmark cases of the `linear` family: each function against SDPA and plain PyTorch chunks.

`work` is what the recurrence itself needs, 4 K V flops per token and value head forward and 10 K V
backward: chunks do more. Peers get the contiguous `[B, H, T, D]` that suits torch; SDPA is causal
softmax attention of the same sizes, quadratic in T. A row is a `Function`: `FUNCTIONS` lists them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnforge
from attnforge.ops._linear_maps import retention_decay
from attnforge.testing import bench_delta
from attnforge.testing.bench import QUICK_REPEATS, REPEATS, Case, ErrorStat, Goal, Workload

__all__ = [
    "FUNCTIONS",
    "Function",
    "Shape",
    "build",
    "build_step",
    "chunked",
    "length_case",
    "sweep",
    "table",
]

_CHUNK = 64
_DTYPE_NAME = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Gates = tuple[Tensor, ...]


@dataclass(frozen=True)
class Function:
    """One function of the family.

    gates: extra operands [B, T, H, ...] from (rows, dim). ours: q, k, v, gates, backend -> o.
    plain: the same on [B, H, T, D] in plain PyTorch chunks.
    """

    name: str
    gates: Callable[[tuple[int, ...], int], Gates]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    goals: tuple[tuple[str, Goal], ...]  # of the forward by peer; with the backward 60% of them
    flops: tuple[int, int] = (4, 10)  # forward and backward, of K V per token and head


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem: K = V = dim, batch 1."""

    function: str
    time: int
    backward: bool = False
    dtype: torch.dtype = torch.float32
    heads: int = 8
    dim: int = 64

    @property
    def kind(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def name(self) -> str:
        return f"{self.function}-{self.kind}-{_DTYPE_NAME[self.dtype]}-t{self.time}"

    @property
    def title(self) -> str:
        return f"{_DTYPE_NAME[self.dtype]} {self.function} {self.kind} T{self.time} D{self.dim}"


def chunked(q: Tensor, k: Tensor, v: Tensor, log: Tensor | None = None) -> Tensor:
    """The additive recurrence by chunks of 64, on [B, H, T, D] with gates [B, H, T, 1 or D].

    Vector gates are factored over a whole chunk, as fits gates whose sum stays above -80 there.
    """
    shape, scale = v.shape, q.shape[-1] ** -0.5

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, _CHUNK, x.shape[-1])

    q, k, v = split(q * scale), split(k), split(v)  # [B, H, N, C, D]
    if log is None:
        pairs = k.transpose(-1, -2) @ v
        before = F.pad(pairs.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
        a = (q @ k.transpose(-1, -2)).tril()
        return (q @ before + a @ v).reshape(shape)
    b = split(log).cumsum(3)
    end = b[..., -1:, :]
    if log.shape[-1] == 1:
        gap = (b - b.transpose(-1, -2)).tril()
        a = (q @ k.transpose(-1, -2) * gap.exp()).tril()
    else:
        a = ((q * b.exp()) @ (k * (-b).exp()).transpose(-1, -2)).tril()
    pairs, keep = (k * (end - b).exp()).transpose(-1, -2) @ v, end.exp().transpose(-1, -2)
    state, states = torch.zeros_like(pairs[:, :, 0]), list[Tensor]()
    for n in range(pairs.shape[2]):
        states.append(state)
        state = keep[:, :, n] * state + pairs[:, :, n]
    out: Tensor = ((q * b.exp()) @ torch.stack(states, 2) + a @ v).reshape(shape)
    return out


_BY_NUMBERS = (("plain chunks", Goal(5, 8)), ("sdpa", Goal(20, 40)))


def _uniform(rows: tuple[int, ...]) -> Tensor:
    return -0.1 * torch.rand(rows, generator=torch.Generator().manual_seed(1))


def _plain_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    log = retention_decay(q.shape[1]).view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    return chunked(q, k, v, log.to(q.dtype))


_ADDITIVE = (
    Function(
        "linear_attention",
        lambda rows, dim: (),
        lambda q, k, v, backend: attnforge.linear_attention(q, k, v, backend=backend)[0],
        chunked,
        _BY_NUMBERS,
    ),
    Function(
        "retention",
        lambda rows, dim: (),
        lambda q, k, v, backend: attnforge.retention(q, k, v, backend=backend)[0],
        _plain_retention,
        _BY_NUMBERS,
    ),
    Function(
        "simple_gla",
        lambda rows, dim: (_uniform(rows),),
        lambda q, k, v, g, backend: attnforge.simple_gla(q, k, v, g, backend=backend)[0],
        lambda q, k, v, g: chunked(q, k, v, g.unsqueeze(-1)),
        _BY_NUMBERS,
    ),
    Function(
        "gla",
        lambda rows, dim: (_uniform((*rows, dim)),),
        lambda q, k, v, gk, backend: attnforge.gla(q, k, v, gk, backend=backend)[0],
        chunked,
        (("sdpa", Goal(8, 30)),),
    ),
)
FUNCTIONS: dict[str, Function] = {f.name: f for f in _ADDITIVE}


def _trained(run: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> Any:
    """A step of training: the forward and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, dout)


def build(shape: Shape, backend: str | None = None) -> Workload:
    """Inputs and all sides of one case."""
    f, g = FUNCTIONS[shape.function], torch.Generator().manual_seed(0)
    rows = (1, shape.time, shape.heads)
    size = (*rows, shape.dim)
    q, k, v, dout = (torch.randn(size, generator=g).to(shape.dtype) for _ in range(4))
    gates = list(f.gates(rows, shape.dim))
    swapped = [x.transpose(1, 2).contiguous() for x in (q, k, v, *gates)]
    swapped[3:] = [x.to(shape.dtype) for x in swapped[3:]]
    dswapped = dout.transpose(1, 2).contiguous()

    def ours(*inputs: Tensor) -> Tensor:
        return f.ours(*inputs, backend=backend)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out

    if shape.backward:
        return Workload(
            _trained(ours, [q, k, v, *gates], dout),
            {
                "plain chunks": _trained(f.plain, swapped, dswapped),
                "sdpa": _trained(sdpa, swapped[:3], dswapped),
            },
            dict,
        )

    def errors() -> dict[str, ErrorStat]:
        truth = f.plain(*(x.double() for x in swapped)).transpose(1, 2)
        found = {
            "attnforge": ours(q, k, v, *gates),
            "plain chunks": f.plain(*swapped).transpose(1, 2),
        }
        return {n: ErrorStat(float((x - truth).abs().max())) for n, x in found.items()}

    return Workload(
        lambda: ours(q, k, v, *gates),
        {"plain chunks": lambda: f.plain(*swapped), "sdpa": lambda: sdpa(*swapped[:3])},
        errors,
    )


def build_step(batch: int, heads: int, dim: int, backend: str | None) -> Workload:
    """One decoded token per sequence on a pool of states."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, dim, generator=g) for _ in range(3))
    log = _uniform((batch, heads))
    pools = [torch.zeros(batch, heads, dim, dim) for _ in range(2)]

    def plain() -> Tensor:
        state = pools[1]
        state.mul_(log.exp()[..., None, None]).add_(k.unsqueeze(-1) * v.unsqueeze(-2))
        out: Tensor = (q.unsqueeze(-2) @ state).squeeze(-2) * dim**-0.5
        return out

    return Workload(
        lambda: attnforge.linear_step(q, k, v, pools[0], g=log, backend=backend),
        {"plain torch": plain},
        dict,
    )


def _case(shape: Shape, repeats: int, series: str = "", peers: tuple[str, ...] = ()) -> Case:
    function = FUNCTIONS[shape.function]
    flops = function.flops[0] + function.flops[1] * shape.backward
    part = 0.6 if shape.backward else 1.0
    goals = {n: Goal(part * g.at_least, part * g.aim) for n, g in function.goals}
    return Case(
        name=shape.name,
        title=shape.title,
        family="linear",
        resource="compute",
        work=flops * shape.dim**2 * shape.heads * shape.time,
        build=lambda backend: build(shape, backend),
        peers=peers or ("plain chunks", "sdpa"),
        goals=goals if shape.dtype == torch.float32 and not peers else {},
        series=series,
        x=shape.time,
        repeats=repeats,
    )


def _keep_freed_memory() -> None:
    """Have glibc give results the memory of freed ones, which it does below 32 MB by itself.

    Results of long calls would lie in fresh pages, at 0.6 us each: a third of such a call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no memory of its own for a block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no memory goes back


def length_case(time: int, parts: int, repeats: int) -> Case:
    """Whether time grows with the tokens: a long sequence against calls on its parts."""
    shape = Shape("linear_attention", time)

    def build_parts(backend: str | None) -> Workload:
        _keep_freed_memory()
        g = torch.Generator().manual_seed(0)
        qkv = [torch.randn(1, time, shape.heads, shape.dim, generator=g) for _ in range(3)]
        pieces = list(zip(*(x.chunk(parts, 1) for x in qkv), strict=True))

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return FUNCTIONS[shape.function].ours(q, k, v, backend=backend)

        return Workload(lambda: ours(*qkv), {"its parts": lambda: [ours(*x) for x in pieces]}, dict)

    return Case(
        name=f"{shape.name}-parts",
        title=f"{shape.title} in {parts} parts",
        family="linear",
        resource="compute",
        work=4 * shape.dim**2 * shape.heads * time,
        build=build_parts,
        peers=("its parts",),
        goals={"its parts": Goal(1 / 1.1, 1)},
        repeats=repeats,
    )


def _step_case(batch: int, repeats: int, heads: int = 32, dim: int = 64) -> Case:
    return Case(
        name=f"linear_step-fp32-b{batch}",
        title=f"fp32 linear_step scalar gate B{batch} {heads} heads D{dim}",
        family="linear",
        resource="read",
        work=8 * dim**2 * heads * batch,  # the states read and written
        build=lambda backend: build_step(batch, heads, dim, backend),
        peers=("plain torch",),
        repeats=repeats,
    )


def table(quick: bool = False) -> list[Case]:
    """Every function at T 8192, forward and with its backward, one in bf16, one long, and steps."""
    n = QUICK_REPEATS if quick else REPEATS
    shapes = [Shape(name, 8192, backward) for backward in (False, True) for name in FUNCTIONS]
    bf16 = Shape("simple_gla", 8192, dtype=torch.bfloat16)
    own = [*(_case(x, n) for x in (*shapes, bf16)), _step_case(256, n)]
    # The last, as it changes how this process gets its memory.
    return [*own, *bench_delta.cases(n), length_case(65536, 8, n)]


def sweep(quick: bool = False) -> list[Case]:
    """Scalar gates over time, additive and with the delta rule."""
    lengths = (1024, 8192) if quick else (512, 2048, 8192, 32768, 65536)
    series = "simple_gla, fp32, 8 heads, D64"
    shapes = [Shape("simple_gla", t) for t in lengths]
    own = [_case(x, QUICK_REPEATS, series, ("plain chunks",)) for x in shapes]
    return [*own, *bench_delta.sweep(QUICK_REPEATS, lengths)]
