"""k-means over keys, batched over heads: Lloyd's iterations with a documented start.

    start    key floor((i + u) n / C) is centroid i, where u in [0, 1) comes from the seed: spread
             over the context, the same for every head, distinct keys
    assign   the nearest centroid; of equally near ones the first. "cosine" compares directions
             (a key of norm 0 goes to centroid 0), "euclidean" distances
    update   the mean of the cluster; an empty cluster keeps its centroid and has count 0

The objective never gets worse from one iteration to the next. Sums run in the order of the keys,
so labels depend on the keys and the seed alone. Cost: 2 n C D flops per iteration and head.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge.ops import _retrieval_ops
from attnforge.ops._checks import _shape, fail

__all__ = ["Clusters", "assign", "kmeans"]

METRICS = ("cosine", "euclidean")


class Clusters(NamedTuple):
    """Labels int64 [H, n], centroids fp32 [H, C, D] (means of the keys as they are), counts."""

    labels: Tensor
    centroids: Tensor
    counts: Tensor  # [H, C] int32

    def objective(self, x: Tensor, metric: str) -> Tensor:
        """What Lloyd's iterations lower, per head: squared distances, or 1 - cosine, summed."""
        c = self.centroids.gather(1, self.labels.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if metric == "euclidean":
            return (x.double() - c).square().sum((1, 2))
        return (1 - torch.cosine_similarity(x.double(), c.double(), -1)).sum(1)


def _directions(x: Tensor) -> Tensor:
    unit: Tensor = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return unit


def _nearest(x: Tensor, c: Tensor, metric: str) -> Tensor:
    """x [H, n, D] (unit rows for cosine), c [H, C, D] -> labels [H, n]."""
    shift = None
    if metric == "cosine":
        c = _directions(c)
    else:
        shift = c.square().sum(-1) / 2
    labels: Tensor = _retrieval_ops.nearest(x, c, shift, _retrieval_ops.served_by(x))
    return labels


def _means(x: Tensor, labels: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids and counts of a labelling; an empty cluster keeps its old centroid."""
    sums, counts = _retrieval_ops.cluster_sums(x, labels, old.shape[1], _retrieval_ops.served_by(x))
    sums /= counts.clamp_min(1).unsqueeze(-1)
    return torch.where(counts.unsqueeze(-1) > 0, sums, old), counts


def assign(x: Tensor, centroids: Tensor, metric: str = "cosine") -> Tensor:
    """The nearest of centroids [H, C, D] for every key of x [H, n, D]: int64 [H, n]."""
    x = x.float()
    return _nearest(_directions(x) if metric == "cosine" else x, centroids.float(), metric)


def _bar(steps: int, wanted: bool) -> Any:
    """tqdm's progress bar over ``steps``, or nothing where it is not wanted."""
    if not wanted:
        return None
    try:
        return importlib.import_module("tqdm").tqdm(total=steps, desc="k-means", unit="iteration")
    except ImportError:
        fail("kmeans", "progress needs the package tqdm; run: pip install 'attnforge[retrieval]', "
                       "or leave progress False", ImportError)  # fmt: skip


def _segments(n: int, clusters: int, segment: int | None) -> Iterator[tuple[slice, int]]:
    """Runs of keys and how many clusters each gets, in proportion."""
    size = segment if segment else n
    done = 0
    for start in range(0, n, max(1, size)):
        stop = min(n, start + size)
        share = max(1, round(clusters * stop / n) - done)
        done += share
        yield slice(start, stop), min(share, stop - start)


def kmeans(
    x: Tensor,
    num_centroids: int,
    *,
    metric: str = "cosine",
    iterations: int = 10,
    seed: int = 0,
    segment: int | None = None,
    progress: bool = False,
) -> Clusters:
    """Cluster the rows of x [H, n, D] of every head into num_centroids (at most n) clusters.

    segment: cluster runs of so many keys apart from each other: the cost is n * segment instead of
    n * n for clusters in proportion to n. progress: a tqdm bar. Everything is fp32.

    Raises ValueError on arguments that do not fit.
    """
    op = "kmeans"
    if x.dim() != 3 or not x.dtype.is_floating_point or x.shape[-1] == 0:
        fail(op, f"x has shape {_shape(x)}; want floating [heads, keys, head_dim]")
    for name, value in (("num_centroids", num_centroids), ("iterations", iterations)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fail(op, f"{name} is {value!r}; want an int >= 1")
    if metric not in METRICS:
        fail(op, f"metric is {metric!r}; want one of {', '.join(METRICS)}")
    if segment is not None and segment < 1:
        fail(op, f"segment is {segment}; want at least 1 key, or None for one run")
    x = x.detach().float()
    heads, n, dim = x.shape
    parts = list(_segments(n, min(num_centroids, max(1, n)), segment))
    generator = torch.Generator().manual_seed(seed)
    bar = _bar(len(parts) * iterations, progress)
    found: list[Clusters] = []
    for span, clusters in parts:
        own = x[:, span]
        rows = own.shape[1]
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        at = ((torch.arange(clusters, dtype=torch.float64) + u) * rows / clusters).long()
        c = own[:, at.clamp_max(rows - 1).to(x.device)].clone()
        unit = _directions(own) if metric == "cosine" else own
        labels, counts = torch.zeros(0), torch.zeros(0)
        for _ in range(iterations):
            labels = _nearest(unit, c, metric)
            c, counts = _means(unit, labels, c)
            if bar is not None:
                bar.update()
        c, counts = _means(own, labels, c)  # of the keys as they are, so that <q, c> has a meaning
        found.append(Clusters(labels, c, counts))
    if bar is not None:
        bar.close()
    if not found:
        return Clusters(
            x.new_zeros((heads, 0), dtype=torch.int64), x.new_zeros((heads, 1, dim)),
            x.new_zeros((heads, 1), dtype=torch.int32),
        )  # fmt: skip
    starts = [sum(part.counts.shape[1] for part in found[:i]) for i in range(len(found))]
    labels = torch.cat([p.labels + s for p, s in zip(found, starts, strict=True)], 1)
    return Clusters(
        labels, torch.cat([p.centroids for p in found], 1), torch.cat([p.counts for p in found], 1)
    )
