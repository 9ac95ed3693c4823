"""The steps of k-means in plain PyTorch: the definition of ``nearest`` and ``cluster_sums``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest", "sums"]

_CHUNK = 1 << 19  # scores held at once: 2 MiB stay in a core's cache
_RUN = 64  # columns whose largest is found in vectors


def _first_largest(scores: Tensor) -> Tensor:
    """The column of each row's largest score [n, runs * _RUN], of equals the first: [n].

    torch's amax runs in vectors, its argmax does not: so one run alone is searched by argmax.
    """
    runs = scores.view(scores.shape[0], -1, _RUN)
    at = runs.amax(-1).argmax(-1)
    own = runs[torch.arange(scores.shape[0], device=scores.device), at]
    return at * _RUN + own.argmax(-1)


def nearest(x: Tensor, centroids: Tensor, shift: Tensor | None, labels: Tensor) -> None:
    """Fill labels [H, n]: the first largest of <x, c> - shift over centroids [H, C, D]."""
    n, clusters = x.shape[1], centroids.shape[1]
    # Whole runs: more copies of the first centroid, which wins against them.
    rest = -clusters % _RUN
    centroids = torch.cat([centroids, centroids[:, :1].expand(-1, rest, -1)], 1)
    if shift is not None:
        shift = torch.cat([shift, shift[:, :1].expand(-1, rest)], 1)
    step = max(1, _CHUNK // centroids.shape[1])
    for h in range(x.shape[0]):
        for start in range(0, n, step):
            scores = x[h, start : start + step] @ centroids[h].T
            if shift is not None:
                scores -= shift[h]
            labels[h, start : start + step] = _first_largest(scores)


def sums(x: Tensor, labels: Tensor, out: Tensor, counts: Tensor) -> None:
    """Fill out [H, C, D] with the sums of the rows of each label, counts [H, C] with how many."""
    heads, clusters, dim = out.shape
    flat = labels + clusters * torch.arange(heads, device=x.device).unsqueeze(1)
    found = out.view(-1, dim).zero_()
    found.index_add_(0, flat.flatten(), x.flatten(0, 1))
    counts.copy_(torch.bincount(flat.flatten(), minlength=heads * clusters).view(heads, clusters))
