"""Squeezed Attention: a context's keys in clusters, of which a query attends to the promising ones.

Hooper et al., 2024 (arXiv 2411.09688). Offline the keys of a fixed context are clustered; online
each query scores the centroids, estimates every key's share of the softmax by its cluster's, and
attends exactly to the keys above a threshold. What is done differently from the public code: any
batch and grouped query heads, scores in logarithms (exp overflows otherwise), empty clusters that
are never chosen, sums in a fixed order, and keys at the threshold are kept.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import _checks, _retrieval_ops, retrieval
from attnforge.ops._checks import _name, _shape, fail
from attnforge.ops.flash import flash_attention, merge_states
from attnforge.ops.indexed import indexed_attention
from attnforge.ops.kmeans import METRICS, assign, kmeans

__all__ = ["CentroidIndex", "centroid_attention"]

_CLASS = "CentroidIndex"
_TENSORS = ("k", "v", "order", "labels", "centroids", "counts", "coarse", "coarse_counts", "parent",
            "threshold", "coarse_threshold")  # fmt: skip


class CentroidIndex:
    """Keys of a context grouped by cluster, with their centroids. Make one with ``fit``.

    k, v: [B, S, Hk, D], the clustered keys in the order of their clusters, behind them the tail:
        the window and what was appended and not assigned yet, which is always attended to. In
        memory a head lies behind the other: the keys of a cluster are one run.
    order: [B, Hk, clustered] int32, the position that each clustered slot came from.
    labels: [B, Hk, clustered] int64, rising. centroids: [B, C, Hk, D]. counts: [B, Hk, C] int32.
    coarse, coarse_counts, parent: the centroids of centroids of a second level, and the coarse
        cluster [B, Hk, C] of each fine one.
    threshold: log share, [1] or per KV head [Hk], set by ``calibrate``; -inf keeps every key.
    """

    def __init__(self, tensors: dict[str, Tensor | None], options: dict[str, Any]) -> None:
        self.options = options  # metric, window, assign_every
        for name in _TENSORS:
            setattr(self, name, tensors.get(name))

    k: Tensor
    v: Tensor
    order: Tensor
    labels: Tensor
    centroids: Tensor
    counts: Tensor
    coarse: Tensor | None
    coarse_counts: Tensor | None
    parent: Tensor | None
    threshold: Tensor
    coarse_threshold: Tensor

    @classmethod
    def fit(
        cls,
        k: Tensor,
        v: Tensor,
        *,
        num_centroids: int | None = None,
        levels: int = 1,
        metric: str = "cosine",
        iterations: int = 10,
        seed: int = 0,
        window: int = 100,
        segment: int | None = None,
        assign_every: int = 256,
        progress: bool = False,
    ) -> CentroidIndex:
        """Cluster k [B, S, Hk, D] (as attention sees it, after RoPE), per sequence and KV head.

        num_centroids: of each head; None is 5% of the clustered keys, the paper's choice. levels: 2
            adds a level of a fifth as many, clusters of the centroids. metric, iterations, seed,
            segment, progress: of ``kmeans``.
        window: the last keys stay out of the clusters and are always attended to.
        assign_every: how many appended keys wait in the tail, beyond the window, before they are
            assigned to clusters.

        Raises ValueError on arguments that do not fit. Cost: k-means, and a copy of K and V.
        """
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype is not v.dtype:
            fail(_CLASS, f"k is {_name(k.dtype)} {_shape(k)}, v {_name(v.dtype)} {_shape(v)}; want "
                         "[batch, keys, heads, head_dim] of one dtype")  # fmt: skip
        if levels not in (1, 2):
            fail(_CLASS, f"levels is {levels!r}; want 1 or 2")
        if metric not in METRICS:
            fail(_CLASS, f"metric is {metric!r}; want one of {', '.join(METRICS)}")
        for name, value, least in (("window", window, 0), ("assign_every", assign_every, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                fail(_CLASS, f"{name} is {value!r}; want an int >= {least}")
        b, s, h, d = k.shape
        n = max(0, s - window)
        wanted = max(1, n // 20) if num_centroids is None else num_centroids
        rows = k[:, :n].detach().transpose(1, 2).reshape(b * h, n, d)
        found = kmeans(rows, wanted, metric=metric, iterations=iterations, seed=seed,
                       segment=segment, progress=progress)  # fmt: skip
        labels = found.labels.view(b, h, n)
        index = cls({}, {"metric": metric, "window": window, "assign_every": assign_every})
        index.centroids = found.centroids.view(b, h, -1, d).transpose(1, 2).to(k.dtype)
        index.counts = found.counts.view(b, h, -1)
        index.order = torch.arange(n, dtype=torch.int32, device=k.device).expand(b, h, n)
        index._group(k.detach(), v.detach(), labels)
        index.coarse = index.coarse_counts = index.parent = None
        if levels == 2:
            index._coarsen(max(1, found.counts.shape[1] // 5), iterations, seed)
        index.threshold = torch.full((1,), -math.inf, device=k.device)
        index.coarse_threshold = torch.full((1,), -math.inf, device=k.device)
        return index

    def _group(self, k: Tensor, v: Tensor, labels: Tensor) -> None:
        """Order the first keys of k and v by labels [B, Hk, n]; the tail stays behind them."""
        n = labels.shape[2]
        self.labels, at = torch.sort(labels, dim=-1, stable=True)
        self.order = self.order.gather(-1, at)
        found = []
        for x in (k, v):
            place = at.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
            rows = x[:, :n].transpose(1, 2).gather(2, place)
            found.append(_appended(rows.transpose(1, 2), x[:, n:]))
        self.k, self.v = found

    def _coarsen(self, clusters: int, iterations: int, seed: int) -> None:
        """A second level over the centroids; empty fine clusters weigh nothing."""
        b, c, h, d = self.centroids.shape
        fine = self.centroids.transpose(1, 2).reshape(b * h, c, d)
        found = kmeans(fine, clusters, metric=self.options["metric"], iterations=iterations,
                       seed=seed)  # fmt: skip
        self.parent = found.labels.view(b, h, c)
        self.coarse = found.centroids.view(b, h, -1, d).transpose(1, 2).to(self.k.dtype)
        sums = torch.zeros(b, h, self.coarse.shape[1], dtype=torch.int32, device=self.k.device)
        self.coarse_counts = sums.scatter_add_(-1, self.parent, self.counts)

    @property
    def clustered(self) -> int:
        """Keys of each head that are in clusters; those behind them are the tail."""
        return self.labels.shape[2]

    @property
    def length(self) -> int:
        """Keys of each sequence."""
        return self.k.shape[1]

    def append(self, k: Tensor, v: Tensor) -> CentroidIndex:
        """Add keys [B, m, Hk, D] and values behind the others; returns self.

        They are attended to exactly. Once the tail holds assign_every keys beyond the window, its
        older keys go to the nearest clusters, whose means and counts follow.
        """
        if (
            k.shape[:1] + k.shape[2:] != self.k.shape[:1] + self.k.shape[2:]
            or k.shape[:3] != (v.shape[:3])
        ):
            b, _, h, d = self.k.shape
            fail(_CLASS, f"k has shape {_shape(k)}, v {_shape(v)}; want [{b}, keys, {h}, {d}] like "
                         "those of the index")  # fmt: skip
        self.k = _appended(self.k, k.detach().to(self.k.dtype))
        self.v = _appended(self.v, v.detach().to(self.v.dtype))
        if self.length - self.clustered >= self.options["window"] + self.options["assign_every"]:
            self._assign(self.length - self.options["window"])
        return self

    def _assign(self, end: int) -> None:
        """Put keys clustered .. end - 1 into clusters."""
        n = self.clustered
        b, _, h, d = self.k.shape
        new = self.k[:, n:end].transpose(1, 2).float()  # [B, Hk, m, D]
        centroids = self.centroids.transpose(1, 2).float()
        label = assign(new.flatten(0, 1), centroids.flatten(0, 1), self.options["metric"])
        label = label.view(b, h, -1)
        wide = label.unsqueeze(-1).expand(-1, -1, -1, d)
        sums = (centroids * self.counts.unsqueeze(-1)).scatter_add_(2, wide, new)
        ones = torch.ones_like(label, dtype=torch.int32)
        self.counts = self.counts.scatter_add(-1, label, ones)
        mean = sums / self.counts.clamp_min(1).unsqueeze(-1)
        kept = torch.where(self.counts.unsqueeze(-1) > 0, mean, centroids)
        self.centroids = kept.transpose(1, 2).to(self.k.dtype)
        at = torch.arange(n, end, dtype=torch.int32, device=self.k.device).expand(b, h, -1)
        self.order = torch.cat([self.order, at], -1)
        self._group(self.k, self.v, torch.cat([self.labels, label], -1))
        if self.parent is not None and self.coarse_counts is not None:
            zero = torch.zeros_like(self.coarse_counts)
            self.coarse_counts = zero.scatter_add_(-1, self.parent, self.counts)

    # ---- scores ----

    def scores(
        self, q: Tensor, *, reduce: str = "max", softmax_scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        """The log share of a key of each cluster, fp32 [B, H, C], for all rows of q at once.

        q [B, Sq, Hq, D]. Shares of the rows are averaged; over a group of query heads reduce takes
        the "max" or the "mean" of shares (H = Hk), "none" keeps them apart (H = Hq). With two
        levels, clusters whose coarse cluster is below its threshold are -inf.
        """
        if reduce not in ("max", "mean", "none"):
            fail(_CLASS, f"reduce is {reduce!r}; want 'max', 'mean' or 'none'")
        fine = self._reduced(q, self.centroids, self.counts, reduce, softmax_scale, backend)
        if self.coarse is None or self.parent is None or self.coarse_counts is None:
            return fine
        top = self._reduced(q, self.coarse, self.coarse_counts, reduce, softmax_scale, backend)
        low = top < self._limits(self.coarse_threshold, top)
        parent = self.parent.repeat_interleave(fine.shape[1] // self.parent.shape[1], 1)
        return fine.masked_fill(low.gather(-1, parent), -math.inf)

    def _reduced(
        self, q: Tensor, centroids: Tensor, counts: Tensor, reduce: str,
        softmax_scale: float | None, backend: str | None,
    ) -> Tensor:  # fmt: skip
        s = retrieval.score_centroids(
            q, centroids, counts, softmax_scale=softmax_scale, backend=backend
        )
        mean = s[:, :, 0] if s.shape[2] == 1 else torch.logsumexp(s, 2) - math.log(s.shape[2])
        if reduce == "none":
            return mean
        group = retrieval.by_group(mean, counts.shape[1])
        if reduce == "max":
            best: Tensor = group.amax(2)
            return best
        return torch.logsumexp(group, 2) - math.log(group.shape[2])

    @staticmethod
    def _limits(threshold: Tensor, scores: Tensor) -> Tensor:
        """A threshold [1] or [Hk] beside scores [B, H, C]: [1, H|1, 1]."""
        if threshold.shape[0] > 1:
            threshold = threshold.repeat_interleave(scores.shape[1] // threshold.shape[0])
        return threshold.view(1, -1, 1)

    def calibrate(
        self, q: Tensor, budget: float, *, per_head: bool = False, coarse_budget: float = 0.5,
        reduce: str = "max", softmax_scale: float | None = None, backend: str | None = None,
    ) -> CentroidIndex:  # fmt: skip
        """Set the threshold that keeps a share ``budget`` of the clustered keys; returns self.

        q [B, n, Hq, D]: queries like those to come, each taken alone, such as the last of the
        context. The share is over all queries and heads together, so that heads with a flat
        distribution keep more (the paper's choice), or over each KV head's own with per_head. It is
        at least budget, by less than one cluster of one query unless scores tie. 1 keeps all, 0
        only the tail.
        coarse_budget: the share that the first of two levels lets through.
        """
        if not 0.0 <= budget <= 1.0:
            fail(_CLASS, f"budget is {budget!r}; want a share of keys, 0 .. 1")
        b, n, hq, d = q.shape
        if n == 0 or b != self.k.shape[0]:
            fail(_CLASS, f"q has shape {_shape(q)}; want [{self.k.shape[0]}, queries >= 1, "
                         f"{hq}, {d}]")  # fmt: skip
        pairs = [(self.centroids, self.counts, budget, "threshold")]
        if self.coarse is not None and self.coarse_counts is not None:
            share = coarse_budget if budget < 1.0 else 1.0
            pairs.append((self.coarse, self.coarse_counts, share, "coarse_threshold"))
        for centroids, counts, share, name in pairs:
            each = [
                self._reduced(q[:, i : i + 1], centroids, counts, reduce, softmax_scale, backend)
                for i in range(n)
            ]
            scores = torch.stack(each)  # [n, B, H, C]
            weight = counts.repeat_interleave(scores.shape[2] // counts.shape[1], 1)
            weight = weight.expand_as(scores).double()
            if per_head:
                own = counts.shape[1]
                split = [
                    retrieval.by_group(x.flatten(0, 1), own).movedim(1, 0).reshape(own, -1)
                    for x in (scores, weight)
                ]
                limits = [_quantile(s, w, share) for s, w in zip(*split, strict=True)]
            else:
                limits = [_quantile(scores.flatten(), weight.flatten(), share)]
            setattr(self, name, torch.stack(limits).to(scores.device))
        return self

    # ---- lists ----

    def select(
        self, q: Tensor, *, budget: float | None = None, threshold: float | Tensor | None = None,
        reduce: str = "max", softmax_scale: float | None = None, backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Slots of k and v to attend to: ids [B, H, N] ascending and lens [B, H].

        What stands behind a length is undefined.

        budget: a share of the clustered keys, the same number for every head: the best by their
        cluster. Else threshold, a log share, or the calibrated one. The tail is always there.
        """
        scores = self.scores(q, reduce=reduce, softmax_scale=softmax_scale, backend=backend)
        if budget is None:
            limit = self.threshold if threshold is None else torch.as_tensor(threshold)
            limit = self._limits(limit.reshape(-1).to(scores), scores).squeeze(-1)
            chosen = retrieval.select_threshold(scores, limit, backend=backend)
            return self._slots(*chosen, backend)
        if not 0.0 <= budget <= 1.0:
            fail("centroid_attention", f"budget is {budget!r}; want a share of keys, 0 .. 1")
        labels = self.labels.repeat_interleave(scores.shape[1] // self.labels.shape[1], 1)
        tail = self.length - self.clustered
        own = torch.nn.functional.pad(scores.gather(-1, labels), (0, tail), value=-math.inf)
        count = math.ceil(budget * self.clustered) + tail
        return retrieval.select_topk(own, count, last=tail, backend=backend)

    def _slots(self, clusters: Tensor, lens: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        """Clusters [B, H, C] as the slots of their keys, ascending, and those of the tail."""
        lead, last = clusters.shape[:2], clusters.shape[2]
        ends = torch.nn.functional.pad(self.counts.cumsum(-1, dtype=torch.int32), (1, 0))
        ids, sizes = _retrieval_ops.expand_runs(
            clusters.reshape(-1, last), lens.reshape(-1), ends.reshape(-1, ends.shape[-1]),
            self.clustered, self.length, self.length,
            _retrieval_ops.served_by(clusters, backend),
        )  # fmt: skip
        return ids.view(*lead, self.length), sizes.view(lead)

    # ---- files ----

    def save(self, path: str | Path) -> None:
        """Write the index to a safetensors file (extra ``retrieval``)."""
        tensors = {n: x.contiguous() for n in _TENSORS if (x := getattr(self, n)) is not None}
        _safetensors("save_file")(tensors, str(path), {"attnforge": json.dumps(self.options)})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> CentroidIndex:
        """Read what ``save`` wrote."""
        with _safetensors("safe_open")(str(path), "pt", device=device) as file:
            metadata = file.metadata() or {}
            if "attnforge" not in metadata:
                fail(_CLASS, f"{path} has no entry 'attnforge'; want a file that save() wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in ("k", "v"):
            tensors[name] = _appended(tensors[name], tensors[name][:, :0])
        return cls(tensors, json.loads(metadata["attnforge"]))


def _appended(x: Tensor, new: Tensor) -> Tensor:
    """[B, S, Hk, D] with new keys behind x, head by head in memory."""
    return torch.cat([x.transpose(1, 2), new.transpose(1, 2)], 2).transpose(1, 2)


def _safetensors(name: str) -> Any:
    """A function of the package safetensors."""
    try:
        home = "safetensors" if name == "safe_open" else "safetensors.torch"
        return getattr(importlib.import_module(home), name)
    except ImportError:
        fail(_CLASS, "saving and loading need the package safetensors; "
                     "run: pip install 'attnforge[retrieval]'", ImportError)  # fmt: skip


def _quantile(scores: Tensor, weight: Tensor, share: float) -> Tensor:
    """The largest score such that those at or above it weigh at least ``share`` of all, fp32."""
    if share >= 1.0:
        return torch.tensor(-math.inf)
    order = scores.argsort(descending=True, stable=True)
    total = weight[order].cumsum(0)
    if share <= 0.0 or float(total[-1]) == 0.0:
        return torch.tensor(math.inf)
    return scores[order[int((total < share * total[-1]).sum())]].float().cpu()


def centroid_attention(
    q: Tensor,
    index: CentroidIndex,
    *,
    budget: float | None = None,
    threshold: float | Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    reduce: str = "max",
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of q [B, Sq, Hq, D] to the keys that ``index.select`` chooses, in their clusters.

    Decode (Sq = 1) and prefill of an input behind the context: all rows of a head share a set of
    keys, chosen by their averaged shares. new: (k, v) [B, Sq, Hk, D] of the input itself, which
    are attended to causally beside the index and are not appended to it.

    budget, threshold, reduce: of ``CentroidIndex.select``; with neither budget nor threshold the
    calibrated threshold holds. Returns out [B, Sq, Hq, Dv], or (out, lse) with the LSE over the
    keys attended to. A budget of 1 is exact attention. Has no gradient.
    """
    op = "centroid_attention"
    _checks.tensor(op, "q", q)
    if budget is not None and threshold is not None:
        fail(op, "budget and threshold are both given; want one of them, or neither")
    if q.dim() != 4 or q.shape[0] != index.k.shape[0] or q.shape[3] != index.k.shape[3]:
        fail(op, f"q has shape {_shape(q)}; want [{index.k.shape[0]}, rows, heads, "
                 f"{index.k.shape[3]}] like the keys of the index")  # fmt: skip
    q = q.detach()
    ids, lens = index.select(q, budget=budget, threshold=threshold, reduce=reduce,
                             softmax_scale=softmax_scale, backend=backend)  # fmt: skip
    out, lse = indexed_attention(q, index.k, index.v, ids=ids, lens=lens, return_lse=True,
                                 softmax_scale=softmax_scale, backend=backend)  # fmt: skip
    if new is not None:
        own = flash_attention(q, *new, causal=True, return_lse=True, softmax_scale=softmax_scale,
                              backend=backend)  # fmt: skip
        out, lse = merge_states([out, own[0]], [lse, own[1]], backend=backend)
    return (out, lse) if return_lse else out
