"""Problems of contextual position encoding, their float64 truth and its bounds.

The truth is the paper's formula in whole matrices, differentiated by autograd; nothing of it is
shared with the library's reference. Bounds follow ``oracle``, with two terms more. A sum of gates
p is off by dp = p (K + c u32), c additions for n keys, and moves the score by dp times the table's
largest step. Within dp of a whole position the slope is that of either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnforge
from attnforge.testing.oracle import Truth, unit_roundoff, visible

__all__ = ["CopeCase", "CopeInputs"]


@dataclass(frozen=True)
class CopeInputs:
    """Tensors and keywords of one call, and the cotangents of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    emb: Tensor
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor
    context: str = ""

    def run(self, backend: str | None = None) -> dict[str, Tensor]:
        """``out lse dq dk dv demb``."""
        wanted = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, self.emb)]
        out, lse = attnforge.cope_attention(
            *wanted, **self.options, return_lse=True, backend=backend
        )
        grads = torch.autograd.grad([out, lse], wanted, [self.dout, self.dlse])
        names = ("out", "lse", "dq", "dk", "dv", "demb")
        return dict(zip(names, [x.detach() for x in (out, lse, *grads)], strict=True))

    def truth(self, rounded: bool = False) -> Truth:
        """What ``run`` should give; rounded: P and the like go to 16 bits before products."""
        return _truth(self, rounded)

    def with_(self, **changes: Any) -> CopeInputs:
        """The same with other tensors."""
        return replace(self, **changes)


@dataclass(frozen=True)
class CopeCase:
    """A problem; lengths: pairs (rows, keys) of packed sequences."""

    batch: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 16
    v_head_dim: int | None = None
    positions: int = 12
    table_heads: int | None = 1  # None: one per query head
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    used: tuple[int, ...] | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    spread: float = 1.0
    seed: int = 0

    def make(self) -> CopeInputs:
        """Inputs: standard normal values, the same on every machine."""
        g = torch.Generator().manual_seed(self.seed)
        dv = self.head_dim if self.v_head_dim is None else self.v_head_dim
        lead: tuple[int, ...] = (self.batch,)
        rows, keys = self.seqlen_q, self.seqlen_k
        if self.lengths is not None:
            lead = ()
            rows, keys = (sum(pair[side] for pair in self.lengths) for side in (0, 1))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        shapes = (
            (*lead, rows, self.heads_q, self.head_dim), (*lead, keys, self.heads_k, self.head_dim),
            (*lead, keys, self.heads_k, dv), (*lead, rows, self.heads_q, dv),
        )  # fmt: skip
        q, k, v, dout = (normal(*shape).to(self.dtype) for shape in shapes)
        stat = torch.float64 if self.dtype is torch.float64 else torch.float32
        emb = normal(self.table_heads or self.heads_q, self.head_dim, self.positions) / 2
        dlse = normal(*lead, self.heads_q, rows).to(stat)
        options: dict[str, Any] = {"causal": self.causal, "window_size": self.window}
        if self.used is not None:
            options["seqused_k"] = torch.tensor(self.used, dtype=torch.int32)
        if self.lengths is not None:
            for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
                ends = torch.tensor([0, *(pair[side] for pair in self.lengths)])
                options[name] = ends.cumsum(0).to(torch.int32)
        return CopeInputs(q * self.spread, k, v, emb.to(stat), options, dout, dlse, repr(self))


class _Part(NamedTuple):
    rows: Any  # index of [B, Sq, ..] or of packed rows
    keys: Any


def _parts(inputs: CopeInputs) -> Iterator[_Part]:
    o = inputs.options
    used = None if "seqused_k" not in o else o["seqused_k"].tolist()
    if "cu_seqlens_q" in o:
        cu_q, cu_k = o["cu_seqlens_q"].tolist(), o["cu_seqlens_k"].tolist()
        for b in range(len(cu_q) - 1):
            end = cu_k[b + 1] if used is None else cu_k[b] + used[b]
            yield _Part(slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], end))
        return
    for b in range(inputs.q.shape[0]):
        end = inputs.k.shape[1] if used is None else used[b]
        yield _Part((b, slice(None)), (b, slice(0, end)))


class _Core(NamedTuple):
    out: Tensor
    lse: Tensor
    x: Tensor
    position: Tensor
    slope: Tensor
    prob: Tensor


def _formula(q: Tensor, k: Tensor, v: Tensor, emb: Tensor, scale: float, seen: Tensor) -> _Core:
    """q [H, R, D], k, v [H, N, ..], emb [H, D, P]; seen [R, N]."""
    x = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
    top = emb.shape[-1] - 1
    at = torch.sigmoid(x).flip(-1).cumsum(-1).flip(-1).clamp(max=top)
    floor = at.detach().long()
    table = q @ emb
    low, high = (table.gather(-1, n) for n in (floor, (floor + 1).clamp(max=top)))
    s = x + low + (at - floor) * (high - low)
    some = seen.any(-1)
    lse = torch.logsumexp(s[:, some], -1) if s.shape[-1] else s.new_zeros(s.shape[0], 0)
    prob = torch.zeros_like(s)
    prob[:, some] = torch.exp(s[:, some] - lse.unsqueeze(-1))
    stat = s.new_full(s.shape[:2], float("-inf"))
    stat[:, some] = lse
    slope = (high - low).masked_fill(at >= top, 0.0)
    return _Core(prob @ v, stat, x, at, slope, prob)


def _truth(inputs: CopeInputs, rounded: bool) -> Truth:
    q, k, v, emb = (x.detach().double().requires_grad_()
                    for x in (inputs.q, inputs.k, inputs.v, inputs.emb))  # fmt: skip
    scale, group = q.shape[-1] ** -0.5, q.shape[-2] // k.shape[-2]
    window = inputs.options["window_size"]
    values: dict[str, Tensor] = {}
    names = ("out", "lse", "dq", "dk", "dv", "demb")
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full(inputs.dlse.shape, float("-inf"))
    bounds = {n: torch.zeros_like(x.detach())
              for n, x in zip(names, (out, lse, q, k, v, emb), strict=True)}  # fmt: skip
    loss = q.new_zeros(())
    for part in _parts(inputs):
        rows = q[part.rows].transpose(0, 1)
        keys, value = (x[part.keys].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        tables = emb.expand(q.shape[-2], -1, -1)
        seen = visible(rows.shape[1], keys.shape[1], inputs.options["causal"], window)
        core = _formula(rows, keys, value, tables, scale, seen)
        where = (slice(None), part.rows) if q.dim() == 3 else part.rows[0]
        out[part.rows] = core.out.transpose(0, 1)
        lse[where] = core.lse
        d_o, d_l = inputs.dout[part.rows].double().transpose(0, 1), inputs.dlse[where].double()
        loss = (
            loss
            + (core.out * d_o).sum()
            + (core.lse * d_l).masked_fill(core.lse == float("-inf"), 0.0).sum()
        )
        with torch.no_grad():
            tensors = tuple(x.detach() for x in (rows, keys, value, tables))
            _add_bounds(inputs, bounds, part, where, core, tensors, (d_o, d_l), rounded)
    grads = torch.autograd.grad(loss, (q, k, v, emb), allow_unused=True)
    zeroed = (torch.zeros_like(x) if g is None else g
              for x, g in zip((q, k, v, emb), grads, strict=True))  # fmt: skip
    values = dict(zip(names, (out.detach(), lse.detach(), *zeroed), strict=True))
    found = Truth()
    for name in names:
        stored = inputs.emb.dtype if name in ("lse", "demb") else inputs.q.dtype
        rounding = torch.where(values[name].isinf(), 0.0, values[name].abs())
        floor = 64 * torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
        found.put(name, values[name],
                  bounds[name] + 1.05 * unit_roundoff(stored) * rounding + floor)  # fmt: skip
    return found


def _sum_groups(x: Tensor, heads_k: int) -> Tensor:
    """[Hq, N, X] -> [N, Hk, X]."""
    return x.view(heads_k, -1, *x.shape[1:]).sum(1).transpose(0, 1)


def _add_bounds(
    inputs: CopeInputs, bounds: dict[str, Tensor], part: _Part, where: Any, core: _Core,
    tensors: tuple[Tensor, ...], cotangents: tuple[Tensor, Tensor], rounded: bool,
) -> None:  # fmt: skip
    """Add one sequence's bounds; the letters are those of ``oracle``."""
    q, k, v, emb = tensors
    d_o, d_l = cotangents
    if k.shape[1] == 0 or q.shape[1] == 0:
        return
    ua = unit_roundoff(inputs.emb.dtype)
    half = unit_roundoff(inputs.q.dtype) if inputs.q.dtype.itemsize == 2 else 0.0
    scale, keys = q.shape[-1] ** -0.5, k.shape[1]
    seen = core.x > float("-inf")
    sizes = scale * q.norm(dim=-1, keepdim=True) * (k.norm(dim=-1).unsqueeze(1) * seen)
    size = sizes.amax(-1, keepdim=True)
    entry = q.norm(dim=-1, keepdim=True) * emb.norm(dim=1).amax(-1).view(-1, 1, 1)  # of the table
    off_x = 4 * ua * (1 + size)
    off_p = core.position * (off_x + (16 + keys / 4) * ua)
    rel = off_x + 4 * ua * entry + 2 * entry * off_p.amax(-1, keepdim=True) + 16 * ua
    p = core.prob.detach()
    mass = p @ v.abs()
    bounds["out"][part.rows] = (rel * mass + (half if rounded else 0.0) * mass).transpose(0, 1)
    bounds["lse"][where] = rel.squeeze(-1)
    o = core.out.detach()
    dp = d_o @ v.transpose(1, 2)
    dp_abs = d_o.abs() @ v.abs().transpose(1, 2)
    delta = (d_o * o).sum(-1, keepdim=True) - d_l.unsqueeze(-1)
    delta_abs = (d_o.abs() * o.abs()).sum(-1, keepdim=True) + d_l.abs().unsqueeze(-1)
    lost = half * half * delta_abs + (half * (d_o.abs() * mass).sum(-1, keepdim=True)
                                      if rounded else 0.0)  # fmt: skip
    weight = p * (dp.abs() + delta.abs())
    each = (2 * half + 3 * rel) * weight + p * (4 * ua * (dp_abs + delta_abs) + lost)
    # Positions: the slope, where it may be that of the other side, and the sums over keys.
    unsure = (core.position - core.position.round()).abs() <= off_p
    ds = (p * (dp - delta)).abs()
    moves, step = ds * core.slope.abs(), 8 * ua * entry + 2 * entry * unsure
    off_moves = each * core.slope.abs() + (ds + each) * step
    gate = torch.sigmoid(core.x)
    bent = gate * (1 - gate)
    sums = off_moves.cumsum(-1) + moves.cumsum(-1) * (2 * half + off_x + (16 + keys / 4) * ua)
    off_dx = each + bent * sums
    tables = off_dx.new_zeros(*q.shape[:2], emb.shape[-1])
    shared, floor = each + ds * (off_p + 4 * ua + 2 * half), core.position.long()
    for n in (-1, 0, 1):
        tables.scatter_add_(-1, (floor + n).clamp(0, emb.shape[-1] - 1), shared)
    dq = scale * off_dx @ k.abs() + tables @ emb.abs().transpose(1, 2)
    bounds["dq"][part.rows] = dq.transpose(0, 1)
    heads_k = inputs.k.shape[-2]
    bounds["dk"][part.keys] = _sum_groups(scale * off_dx.transpose(1, 2) @ q.abs(), heads_k)
    each_p = (2 * half + rel) * p
    bounds["dv"][part.keys] = _sum_groups(each_p.transpose(1, 2) @ d_o.abs(), heads_k)
    table = q.abs().transpose(1, 2) @ tables
    bounds["demb"] += table if inputs.emb.shape[0] > 1 else table.sum(0, keepdim=True)
