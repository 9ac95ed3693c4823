"""Benchmark cases of the `reductions` family: each statistic against the plain PyTorch formula.

The peer is what one writes without this family: the matrix P by a masked softmax, then one torch
call on it, with q and k in the contiguous `[B, H, S, D]` that suits torch. Ours gets the LSE that
the attention before it left; torch's softmax has no use for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import attnforge
from attnforge import reductions
from attnforge.ops.flash import cost
from attnforge.testing.bench import QUICK_REPEATS, REPEATS, Case, ErrorStat, Workload
from attnforge.testing.reductions import ScoreTruth, score_truth

__all__ = ["STATISTICS", "Shape", "build", "sweep", "table"]

_BLOCK, _TOPK, _THRESHOLD, _SPANS = 64, 32, 0.01, 8
_DTYPE_NAME = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# The truth of one head holds about eight float64 matrices: 270 MB at 2048.
_ERROR_MAX_SEQ = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """One causal problem."""

    statistic: str
    seqlen: int
    dtype: torch.dtype = torch.float32
    heads: int = 8
    head_dim: int = 64

    @property
    def name(self) -> str:
        return f"{self.statistic}-{_DTYPE_NAME[self.dtype]}-s{self.seqlen}"

    @property
    def title(self) -> str:
        return f"{_DTYPE_NAME[self.dtype]} {self.statistic} causal S{self.seqlen} D{self.head_dim}"


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, k [B, S, H, D] with the LSE, and the same as torch likes it."""

    q: torch.Tensor
    k: torch.Tensor
    lse: torch.Tensor
    q_rows: torch.Tensor  # [B, H, S, D], contiguous
    k_rows: torch.Tensor
    hidden: torch.Tensor  # [S, S] bool
    boundaries: torch.Tensor
    backend: str | None


def _make(shape: Shape, backend: str | None) -> Inputs:
    g = torch.Generator().manual_seed(0)
    size = (1, shape.seqlen, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, generator=g).to(shape.dtype) for _ in range(3))
    _, lse = attnforge.flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    rows = [x.transpose(1, 2).contiguous() for x in (q, k)]
    hidden = torch.ones(shape.seqlen, shape.seqlen, dtype=torch.bool).triu(1)
    ends = torch.linspace(0, shape.seqlen, _SPANS + 1).to(torch.int32)
    return Inputs(q, k, lse, rows[0], rows[1], hidden, ends, backend)


def _prob(t: Inputs, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    s: torch.Tensor = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return s.masked_fill_(t.hidden, -math.inf).softmax(-1, dtype=torch.float32)


def _spans(prob: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    ends = boundaries.tolist()
    return torch.stack([prob[..., a:b].sum(-1) for a, b in itertools.pairwise(ends)], -1)


def _ours(name: str) -> Callable[[Inputs], torch.Tensor]:
    """The statistic of this family; ``head`` results are `[B, H, ...]`."""

    def run(t: Inputs) -> torch.Tensor:
        q, k, lse, backend = t.q, t.k, t.lse, t.backend
        if name == "column_sums":
            return reductions.column_sums(q, k, lse, causal=True, backend=backend)
        if name == "span_mass":
            return reductions.span_mass(q, k, lse, t.boundaries, causal=True, backend=backend)
        if name == "block_max":
            return reductions.block_max(q, k, lse, _BLOCK, _BLOCK, causal=True, backend=backend)
        if name == "row_entropy":
            return reductions.row_entropy(q, k, lse, causal=True, backend=backend)
        if name == "topk_keys":
            return reductions.topk_keys(q, k, lse, _TOPK, causal=True, backend=backend)[0]
        room = 16 * q.shape[1] * q.shape[2]
        found = reductions.edges(q, k, lse, _THRESHOLD, room, causal=True, backend=backend)
        return found.prob

    return run


def _plain(name: str) -> Callable[[Inputs], torch.Tensor]:
    """The same from the whole matrix."""

    def run(t: Inputs) -> torch.Tensor:
        prob = _prob(t, t.q_rows, t.k_rows)
        if name == "column_sums":
            return prob.sum(-2)
        if name == "span_mass":
            return _spans(prob, t.boundaries)
        if name == "block_max":
            return torch.nn.functional.max_pool2d(prob, _BLOCK)
        if name == "row_entropy":
            entropy: torch.Tensor = torch.special.entr(prob).sum(-1)
            return entropy
        if name == "topk_keys":
            return prob.topk(_TOPK, -1).values
        return prob[(prob > _THRESHOLD).nonzero(as_tuple=True)]

    return run


STATISTICS = ("column_sums", "span_mass", "block_max", "row_entropy", "topk_keys", "edges")


def _truth(name: str, t: ScoreTruth, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and bound of a statistic of one head, where it has a place of its own per element."""
    if name == "column_sums":
        return t.prob.sum(2), t.each.sum(2)
    if name == "span_mass":
        return _spans(t.prob, ends), _spans(t.each, ends)
    if name == "block_max":
        pool = torch.nn.functional.max_pool2d
        return pool(t.prob, _BLOCK), pool(t.each, _BLOCK)
    if name == "row_entropy":
        log = torch.where(t.prob > 0, t.prob.log(), 0.0)
        return -(t.prob * log).sum(-1), (t.each * (1 + log.abs())).sum(-1)
    top = t.prob.topk(_TOPK, -1)
    return top.values, t.each.gather(-1, top.indices)


def _errors(shape: Shape, t: Inputs) -> dict[str, ErrorStat]:
    """Errors of both sides on the first head; edges are a list and have none."""
    if shape.statistic == "edges" or shape.seqlen > _ERROR_MAX_SEQ:
        return {}
    scores = score_truth(t.q[:, :, :1], t.k[:, :, :1], t.lse[:, :1], {"causal": True})
    value, bound = _truth(shape.statistic, scores, t.boundaries)
    found = {}
    for name, run in (("attnforge", _ours), ("plain torch", _plain)):
        error = (run(shape.statistic)(t)[:, :1].double() - value).abs()
        found[name] = ErrorStat(float(error.max()), float((error / bound).max()))
    return found


def build(shape: Shape, backend: str | None = None) -> Workload:
    """Inputs and both sides of one case."""
    t = _make(shape, backend)
    ours, plain = _ours(shape.statistic), _plain(shape.statistic)
    return Workload(lambda: ours(t), {"plain torch": lambda: plain(t)}, lambda: _errors(shape, t))


def _case(shape: Shape, repeats: int, series: str = "") -> Case:
    s, h, d = shape.seqlen, shape.heads, shape.head_dim
    whole = cost(batch=1, seqlen_q=s, seqlen_k=s, heads_q=h, heads_kv=h, head_dim=d, causal=True)
    return Case(
        name=shape.name,
        title=shape.title,
        family="reductions",
        resource="compute",
        work=whole.flops / 2,  # Q K^T alone
        build=lambda backend: build(shape, backend),
        peers=("plain torch",),
        series=series,
        x=s,
        repeats=repeats,
    )


def table(quick: bool = False) -> list[Case]:
    """Every statistic at 2048 and 4096 in fp32, and column sums in bf16."""
    n = QUICK_REPEATS if quick else REPEATS
    shapes = [Shape(name, s) for s in (2048, 4096) for name in STATISTICS]
    return [_case(x, n) for x in (*shapes, Shape("column_sums", 2048, torch.bfloat16))]


def sweep(quick: bool = False) -> list[Case]:
    """Column sums over sequence length."""
    lengths = (512, 2048) if quick else (256, 512, 1024, 2048, 4096)
    series = "column sums, causal, fp32, 8 heads, D64"
    return [_case(Shape("column_sums", s), QUICK_REPEATS, series) for s in lengths]
