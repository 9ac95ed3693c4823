"""Benchmark cases of contextual positions: ours against the paper's formula in plain PyTorch.

The peer has the whole matrix of logits, a flipped cumulative sum of gates and two gathers from the
tables, in the `[B, H, S, D]` that suits torch; the backward is autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import attnforge
from attnforge.ops.flash import cost
from attnforge.testing.bench import QUICK_REPEATS, REPEATS, Case, Workload

__all__ = ["Shape", "build", "sweep", "table"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One causal problem in fp32 with a table of 64 positions."""

    kind: str  # "fwd" or "fwd+bwd"
    seqlen: int
    heads: int = 4
    head_dim: int = 64
    positions: int = 64

    @property
    def name(self) -> str:
        return f"cope-{self.kind}-fp32-s{self.seqlen}"


def _paper(q: Tensor, k: Tensor, v: Tensor, emb: Tensor) -> Tensor:
    """q, k, v [B, H, S, D]."""
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
    at = torch.sigmoid(logits).flip(-1).cumsum(-1).flip(-1).clamp(max=emb.shape[-1] - 1)
    above, below = at.ceil().long(), at.floor().long()
    entries, weight = q @ emb, at - below
    z = entries.gather(-1, above) * weight + entries.gather(-1, below) * (1 - weight)
    return torch.softmax(logits + z, -1) @ v


def _side(
    attend: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor | None
) -> Callable[[], object]:
    if dout is None:
        return lambda: attend(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def build(shape: Shape, backend: str | None = None) -> Workload:
    """Inputs and both sides of one case."""
    g = torch.Generator().manual_seed(0)
    size = (1, shape.seqlen, shape.heads, shape.head_dim)
    q, k, v, dout = (torch.randn(size, generator=g) for _ in range(4))
    emb = torch.randn(1, shape.head_dim, shape.positions, generator=g) / 8
    wanted = dout if shape.kind != "fwd" else None

    def ours(*x: Tensor) -> Tensor:
        out: Tensor = attnforge.cope_attention(*x, causal=True, backend=backend)
        return out

    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    rows_dout = None if wanted is None else dout.transpose(1, 2).contiguous()
    plain = _side(_paper, [*rows, emb.clone()], rows_dout)
    return Workload(_side(ours, [q, k, v, emb], wanted), {"plain torch": plain})


def _case(shape: Shape, repeats: int, series: str = "") -> Case:
    s, h, d = shape.seqlen, shape.heads, shape.head_dim
    work = cost(
        batch=1, seqlen_q=s, seqlen_k=s, heads_q=h, heads_kv=h, head_dim=d, causal=True,
        kind="fwd" if shape.kind == "fwd" else "fwd+bwd",
    )  # fmt: skip
    return Case(
        name=shape.name,
        title=f"fp32 CoPE {shape.kind} causal S{s} D{d}",
        family="cope",
        resource="compute",
        work=work.flops,  # of attention; positions are what it costs more
        build=lambda backend: build(shape, backend),
        peers=("plain torch",),
        series=series,
        x=s,
        repeats=repeats,
    )


def table(quick: bool = False) -> list[Case]:
    """Forward, and forward with backward, at 512 and 2048."""
    n = QUICK_REPEATS if quick else REPEATS
    return [_case(Shape(kind, s), n) for s in (512, 2048) for kind in ("fwd", "fwd+bwd")]


def sweep(quick: bool = False) -> list[Case]:
    """The forward over sequence length."""
    lengths = (256, 1024) if quick else (256, 512, 1024, 2048)
    series = "CoPE, causal, fp32, 4 heads, D64"
    return [_case(Shape("fwd", s), QUICK_REPEATS, series) for s in lengths]
