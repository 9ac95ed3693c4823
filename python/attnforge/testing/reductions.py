"""The float64 truth of the reductions, and how far a right kernel may be from it.

Whole matrices and explicit masks; nothing is shared with the library's own reference. The LSE is
an input like q and k and taken as it was rounded.

Derivation of the bounds (u = 2^-24, for float64 2^-53). A logit is a dot product in fp32, mapped
and shifted by the LSE: its absolute error in row i is at most

    K_i = 4 u (1 + S_max,i + |lse_i|) + 16 u        S_max,i >= |s_ij|, as in ``oracle``

so P_ij = exp(s_ij - lse_i) has the relative error K_i, and an absolute one of 2^-125 where it is
below the normal range and may become 0 (f below). Sums of n terms lose what the longest chain of
adds loses, (48 + n / 48 + 16) u at worst and a few u as errors of both signs go; 16 u are granted.
With c_ij = (K_i + 16 u) P_ij + f:

    column sums   sum_i |w_i| c_ij            span mass     sum_j c_ij over the span
    logits        K_i                         block max     the largest c_ij (or K_i) of the block,
                                                            since |max a - max b| <= max |a - b|
    entropy       sum_j (K_i + 16 u) P_ij (1 + |log P_ij|) + 100 f
    top-k         c at the r-th largest P: a map that is monotone in each P_ij moves the r-th
                  largest no further than that
    edges         P_ij > threshold is settled where |P_ij - threshold| > c_ij
    dQ, dK        scale sum |dS| (K_i + 32 u) |k|, then the rounding of the result, 1.05 u16 |dQ|
    dLSE          sum_j c_ij |dM|             dO . O        16 u sum |dO O|
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import reductions
from attnforge.testing import cases, oracle
from attnforge.testing.cases import FlashCase
from attnforge.testing.oracle import Truth, unit_roundoff

__all__ = ["ReductionInputs", "ScoreTruth", "check_edges", "check_topk", "reduction_inputs"]


@dataclass(frozen=True)
class ScoreTruth:
    """Float64 matrices [B, Hq, Sq, Sk] of one problem, and K [B, Hq, Sq, 1]."""

    logits: Tensor
    prob: Tensor
    seen: Tensor  # visible, in a row that has probabilities
    visible: Tensor
    slope: Tensor  # of the softcap
    rel: Tensor  # K with the LSE
    rel_logit: Tensor  # K without it
    unit: float
    flush: float

    @property
    def each(self) -> Tensor:
        """c: the error of one P within a sum."""
        return (self.rel + 16 * self.unit) * self.prob + self.flush


def score_truth(q: Tensor, k: Tensor, lse: Tensor, options: Mapping[str, Any]) -> ScoreTruth:
    """Everything that a statistic may need, from the keywords of the call."""
    b, sq, hq, d = q.shape
    sk, group = k.shape[1], q.shape[2] // k.shape[2]
    acc = torch.float64 if q.dtype is torch.float64 else torch.float32
    unit = unit_roundoff(acc)
    used = options.get("seqused_k")
    lengths = [sk] * b if used is None else used.tolist()
    window, causal = tuple(options.get("window_size", (-1, -1))), bool(options.get("causal"))
    rows = q.double().transpose(1, 2)
    keys = k.double().transpose(1, 2).repeat_interleave(group, 1)
    scale = options.get("softmax_scale")
    scale = d**-0.5 if scale is None else float(scale)
    visible = torch.zeros(b, 1, sq, sk, dtype=torch.bool)
    distance = torch.zeros(b, 1, sq, sk, dtype=torch.float64)
    for n, length in enumerate(lengths):
        visible[n, 0, :, :length] = oracle.visible(sq, length, causal, window)
        at = torch.arange(sq).unsqueeze(1) + (length - sq)
        distance[n, 0] = (at - torch.arange(sk)).abs()
    visible = visible.expand(b, hq, sq, sk)
    keys = keys.where(visible.any(2).unsqueeze(-1), 0.0)  # what no row sees counts nowhere
    s = scale * rows @ keys.transpose(-1, -2)
    size = (
        abs(scale)
        * rows.norm(dim=-1, keepdim=True)
        * _top(keys.norm(dim=-1).unsqueeze(2) * visible)
    )
    cap, slope = float(options.get("softcap", 0.0)), torch.ones_like(s)
    if cap > 0:
        t = torch.tanh(s / cap)
        s, slope, size = cap * t, 1 - t * t, size + cap
    slopes = options.get("alibi_slopes")
    if slopes is not None:
        bias = slopes.float().double().view(-1, hq, 1, 1) * distance
        s, size = s - bias, size + _top(bias.abs() * visible)
    s = s.masked_fill(~visible, float("-inf"))
    stat = lse.double().unsqueeze(-1)
    seen = visible & (stat != float("-inf"))
    prob = torch.where(seen, torch.exp(s - stat), 0.0)
    shift = torch.where(stat.isfinite(), stat.abs(), 0.0)
    rel = 4 * unit * (1 + size + shift) + 16 * unit
    rel_logit = 4 * unit * (1 + size) + 16 * unit
    flush = 2 * torch.finfo(acc).smallest_normal
    return ScoreTruth(s, prob, seen, visible, slope, rel, rel_logit, unit, flush)


def _at(device: str, x: Any) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _top(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)


def _block_top(x: Tensor, q_block: int, k_block: int, pad: float) -> Tensor:
    """Maxima of [.., Sq, Sk] over blocks that start at 0."""
    rows, keys = -x.shape[-2] % q_block, -x.shape[-1] % k_block
    x = torch.nn.functional.pad(x, (0, keys, 0, rows), value=pad)
    *batch, sq, sk = x.shape
    return x.view(*batch, sq // q_block, q_block, sk // k_block, k_block).amax((-3, -1))


@dataclass(frozen=True)
class ReductionInputs:
    """Operands of all statistics of one problem; ``run`` and ``truth`` go by the same names."""

    q: Tensor
    k: Tensor
    lse: Tensor
    options: dict[str, Any]
    weights: Tensor
    boundaries: Tensor
    dmass: Tensor  # cotangent of the span mass
    blocks: tuple[int, int]
    topk: int
    threshold: float
    context: str = ""

    @cached_property
    def scores(self) -> ScoreTruth:
        return score_truth(self.q, self.k, self.lse, self.options)

    def with_(self, **changes: Any) -> ReductionInputs:
        """The same with other tensors or, by any other name, keywords."""
        own = {n: changes.pop(n) for n in self.__dataclass_fields__ if n in changes}
        return replace(self, **own, options={**self.options, **changes})

    def call(self, name: str, *args: Any, backend: str | None = None, **more: Any) -> Any:
        """``reductions.<name>`` of q, k, ``args`` on the device of tests; results on the CPU."""
        args = (self.q, self.k, *args)
        options = {**self.options, **more, "backend": backend}
        args = tuple(_at(cases.DEVICE, x) for x in args)
        options = {name: _at(cases.DEVICE, x) for name, x in options.items()}
        found = getattr(reductions, name)(*args, **options)
        if isinstance(found, Tensor):
            return found.cpu()
        results = [x.cpu() for x in found]
        return reductions.Edges(*results) if name == "edges" else tuple(results)

    def run(self, backend: str | None = None) -> dict[str, Tensor]:
        """Every statistic that an element-wise bound can judge."""

        def call(name: str, *args: Any, **more: Any) -> Any:
            return self.call(name, *args, backend=backend, **more)

        found = {
            "sums": call("column_sums", self.lse),
            "weighted": call("column_sums", self.lse, row_weights=self.weights),
            "mass": call("span_mass", self.lse, self.boundaries),
            "top_prob": call("block_max", self.lse, *self.blocks),
            "top_logit": call("block_max", None, *self.blocks),
            "entropy": call("row_entropy", self.lse),
            "largest_prob": call("topk_keys", self.lse, self.topk)[0],
            "largest_logit": call("topk_keys", None, self.topk)[0],
        }
        return {**found, **self.gradients(backend)}

    def gradients(self, backend: str | None = None) -> dict[str, Tensor]:
        """``dq dk dlse`` of <span mass, dmass>; layouts of the inputs are kept."""
        moved = self.with_(
            **{n: getattr(self, n).detach().to(cases.DEVICE) for n in ("q", "k", "lse")}
        )
        leaves = [x.requires_grad_() for x in (moved.q, moved.k, moved.lse)]
        mass = moved.call("span_mass", moved.lse, self.boundaries, backend=backend)
        grads = [x.cpu() for x in torch.autograd.grad(mass, leaves, self.dmass)]
        return dict(zip(("dq", "dk", "dlse"), grads, strict=True))

    def truth(self) -> Truth:
        """The float64 truth of ``run``."""
        t, found = self.scores, Truth()
        each, inf = t.each, float("-inf")
        found.put("sums", t.prob.sum(2), each.sum(2))
        w = self.weights.double().unsqueeze(-1)
        found.put("weighted", (w * t.prob).sum(2), (w.abs() * each).sum(2))
        ends = self.boundaries.tolist()
        cuts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        found.put(
            "mass",
            torch.stack([t.prob[..., c].sum(-1) for c in cuts], -1),
            torch.stack([each[..., c].sum(-1) for c in cuts], -1),
        )
        found.put(
            "top_prob", _block_top(t.prob, *self.blocks, 0.0), _block_top(each, *self.blocks, 0.0)
        )
        found.put(
            "top_logit",
            _block_top(t.logits, *self.blocks, inf),
            _block_top(t.rel_logit.expand_as(t.prob), *self.blocks, 0.0),
        )
        log = torch.where(t.prob > 0, t.prob.log(), 0.0)
        error = ((t.rel + 16 * t.unit) * t.prob * (1 + log.abs())).sum(-1)
        found.put("entropy", -(t.prob * log).sum(-1), error + 100 * t.flush * t.prob.shape[-1])
        for name, seen, value, pad, bound in (
            ("largest_prob", t.seen, t.prob, 0.0, each),
            ("largest_logit", t.visible, t.logits, inf, t.rel_logit.expand_as(t.prob)),
        ):
            ranked = value.masked_fill(~seen, inf).sort(dim=-1, descending=True)
            top = ranked.values[..., : self.topk]
            missing = self.topk - top.shape[-1]
            top = torch.nn.functional.pad(top, (0, missing), value=inf)
            slack = bound.gather(-1, ranked.indices[..., : self.topk])
            slack = torch.nn.functional.pad(slack, (0, missing))
            found.put(name, top.masked_fill(top == inf, pad), slack)
        self._put_gradients(found, cuts)
        return found

    def _put_gradients(self, found: Truth, cuts: list[slice]) -> None:
        t = self.scores
        dmass = torch.zeros_like(t.prob)
        for n, c in enumerate(cuts):
            dmass[..., c] = self.dmass[..., n : n + 1].double()
        scale = self.options.get("softmax_scale")
        scale = self.q.shape[-1] ** -0.5 if scale is None else float(scale)
        used = self.options.get("seqused_k")
        live = torch.ones(self.k.shape[:2], dtype=torch.bool)
        if used is not None:
            live = torch.arange(self.k.shape[1]) < used.unsqueeze(1)
        k = self.k.double().where(live[..., None, None], 0.0)
        heads_kv, group = k.shape[2], self.q.shape[2] // k.shape[2]
        rows, keys = self.q.double().transpose(1, 2), k.transpose(1, 2)
        keys = keys.repeat_interleave(group, 1)
        ds = t.prob * dmass * t.slope * scale
        # 1 - tanh^2 cancels: its error is absolute.
        curved = 16 * t.unit * t.prob * dmass.abs() * abs(scale) if self.options["softcap"] else 0
        error = (t.rel + 32 * t.unit) * ds.abs() + curved + t.flush * dmass.abs() * abs(scale)

        def groups(x: Tensor) -> Tensor:
            return x.unflatten(1, (heads_kv, group)).sum(2).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return, unused-ignore]

        u = unit_roundoff(self.q.dtype)
        tiny = torch.finfo(self.q.dtype).smallest_normal * torch.finfo(self.q.dtype).eps
        dq, dk = (ds @ keys).transpose(1, 2), groups(ds.transpose(-1, -2) @ rows)
        dq_error = (error @ keys.abs()).transpose(1, 2)
        dk_error = groups(error.transpose(-1, -2) @ rows.abs())
        found.put("dq", dq, dq_error + 1.05 * u * dq.abs() + tiny)
        found.put("dk", dk, dk_error + 1.05 * u * dk.abs() + tiny)
        found.put("dlse", -(t.prob * dmass).sum(-1), (t.each * dmass.abs()).sum(-1))


def reduction_inputs(case: FlashCase, **changes: Any) -> ReductionInputs:
    """Operands of a dense ``FlashCase``: its q, k and options, and its true LSE rounded to fp32."""
    inputs = case.make()
    stat = torch.float64 if case.dtype is torch.float64 else torch.float32
    lse = inputs.truth(grad=False).values["lse"].to(stat)
    options = {n: x for n, x in inputs.options.items() if n != "sinks"}  # the LSE has them
    g = torch.Generator().manual_seed(case.seed + 1)
    keys = case.seqlen_k
    # An empty span, keys before the first and behind the last one.
    ends = sorted({0 if keys < 8 else 2, keys // 3, keys // 2, keys - keys // 9})
    fields: dict[str, Any] = {
        "weights": torch.rand(lse.shape, generator=g, dtype=stat) - 0.3,
        "boundaries": torch.tensor([ends[0], *ends, ends[-1]], dtype=torch.int32),
        "dmass": torch.randn(*lse.shape, len(ends) + 1, generator=g, dtype=stat),
        "blocks": (16, 24),
        "topk": 5,
        "threshold": 0.02,
        **changes,
    }
    return ReductionInputs(inputs.q, inputs.k, lse, options, context=inputs.context, **fields)


def check_topk(inputs: ReductionInputs, backend: str | None, with_lse: bool) -> None:
    """Indices: distinct visible keys, whose truth is within its bound of the value beside them."""
    t = inputs.scores
    lse = inputs.lse if with_lse else None
    values, indices = inputs.call("topk_keys", lse, inputs.topk, backend=backend)
    seen = t.seen if with_lse else t.visible
    truth, bound = (t.prob, t.each) if with_lse else (t.logits, t.rel_logit.expand_as(t.prob))
    there = torch.arange(inputs.topk) < seen.sum(-1, keepdim=True)
    assert torch.equal(indices >= 0, there), "padding"
    assert bool((indices[~there] == -1).all())
    safe = indices.clamp_min(0).long()
    if truth.shape[-1] == 0:
        return
    assert bool(seen.gather(-1, safe)[there].all()), "hidden key"
    error = (values.double() - truth.gather(-1, safe)).abs()
    good = (error <= bound.gather(-1, safe)) | (values.double() == truth.gather(-1, safe))
    assert bool(good[there].all()), "value and key differ"
    chosen = torch.zeros(seen.shape, dtype=torch.int32)
    chosen.scatter_add_(-1, safe, there.int())
    assert int(chosen.max()) <= 1, "a key twice"


def check_edges(inputs: ReductionInputs, backend: str | None, max_edges: int) -> None:
    """All edges that are settled, none that is settled not to be, in order, with their P."""
    t = inputs.scores
    found = inputs.call("edges", inputs.lse, inputs.threshold, max_edges, backend=backend)
    sure = int((t.prob > inputs.threshold + t.each).sum())
    maybe = int((t.prob > inputs.threshold - t.each).sum())
    assert sure <= int(found.total) <= maybe
    assert bool(found.overflow) == (int(found.total) > max_edges)
    where, prob = found.trimmed()
    assert where.shape[0] == prob.shape[0] == min(int(found.total), max_edges)
    assert bool((found.where[where.shape[0] :] == -1).all())
    assert not found.prob[where.shape[0] :].any()
    place = where.long().unbind(1)
    flat = torch.zeros(where.shape[0], dtype=torch.int64)
    for index, size in zip(place, t.prob.shape, strict=True):
        flat = flat * size + index
    assert bool((flat.diff() > 0).all()), "not in lexicographic order"
    assert bool(((prob.double() - t.prob[place]).abs() <= t.each[place]).all())
    certain = (t.prob > inputs.threshold + t.each).flatten().nonzero().flatten()
    if int(found.total) <= max_edges:
        assert bool(torch.isin(certain, flat).all()), "an edge is missing"
    elif flat.numel():
        early = certain[certain <= flat[-1]]
        assert bool(torch.isin(early, flat).all()), "an early edge gave way to a late one"
