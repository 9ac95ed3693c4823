"""Squeezed Attention: k-means, thresholds, lists, growth, and a full budget as dense attention."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import CentroidIndex
from attnforge.ops.kmeans import assign, kmeans
from attnforge.testing.cases import Target
from attnforge.testing.compare import same_bits


def clustered(heads: int = 2, n: int = 600, dim: int = 16, groups: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(3)
    centres = 4 * torch.randn(heads, groups, dim, generator=g)
    at = torch.randint(0, groups, (heads, n), generator=g)
    near = centres.gather(1, at.unsqueeze(-1).expand(-1, -1, dim))
    return near + 0.3 * torch.randn(heads, n, dim, generator=g)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_objective_never_rises(metric: str) -> None:
    x = torch.randn(3, 400, 16)
    if metric == "cosine":
        x = x / x.norm(dim=-1, keepdim=True)
    last = torch.full((3,), math.inf, dtype=torch.float64)
    for n in (1, 2, 3, 5, 9):
        found = kmeans(x, 20, metric=metric, iterations=n)
        now = found.objective(x, metric)
        assert (now <= last + 1e-3).all()
        last = now


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("segment", [None, 100])
def test_clusters_are_consistent(metric: str, segment: int | None) -> None:
    x = clustered()
    found = kmeans(x, 40, metric=metric, segment=segment)
    assert found.counts.sum(-1).tolist() == [600, 600]
    for h in range(2):
        for c in range(found.counts.shape[1]):
            own = x[h, found.labels[h] == c]
            assert own.shape[0] == int(found.counts[h, c])
            if own.shape[0]:
                torch.testing.assert_close(found.centroids[h, c], own.mean(0), rtol=1e-4, atol=1e-4)
    again = kmeans(x, 40, metric=metric, segment=segment)
    assert torch.equal(found.labels, again.labels)
    one = kmeans(x[1:], 40, metric=metric, segment=segment)
    assert torch.equal(found.labels[1:], one.labels)


def test_strange_clusterings() -> None:
    x = torch.randn(1, 30, 8)
    each = kmeans(x, 30)
    assert each.counts.tolist() == [[1] * 30]  # every key is its own cluster, exactly
    assert torch.equal(each.centroids.gather(1, each.labels.unsqueeze(-1).expand_as(x)), x)
    assert kmeans(x, 99).counts.shape == (1, 30)
    same = kmeans(x[:, :1].expand(1, 50, 8), 20)
    assert sorted(same.counts[0].tolist())[-2:] == [0, 50]
    zero = kmeans(torch.zeros(1, 9, 8), 3)
    assert zero.labels.tolist() == [[0] * 9]
    assert zero.centroids.isfinite().all()
    assert kmeans(x[:, :1], 1).counts.tolist() == [[1]]
    assert kmeans(x[:, :0], 4).labels.shape == (1, 0)


def inputs(n: int = 500, rows: int = 1, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    k = clustered(2 * batch, n).view(batch, 2, n, 16).transpose(1, 2).contiguous()
    return torch.randn(batch, rows, 4, 16), k, torch.randn(batch, n, 2, 16)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_everything_is_dense_attention(target: Target, levels: int, rows: int) -> None:
    q, k, v = inputs(rows=rows)
    index = CentroidIndex.fit(k, v, num_centroids=30, levels=levels)
    want, lse = attnforge.flash_attention(q, k, v, return_lse=True, backend="reference")
    options: tuple[dict[str, float], ...] = ({"budget": 1.0}, {}, {"threshold": -math.inf})
    for option in options:
        for reduce in ("max", "mean", "none"):
            out, stat = attnforge.centroid_attention(
                q, index, **option, reduce=reduce, return_lse=True, backend=target.backend
            )
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stat, lse, rtol=1e-5, atol=1e-5)


def test_keys_are_grouped() -> None:
    _, k, v = inputs()
    index = CentroidIndex.fit(k, v, num_centroids=30, window=50)
    assert index.clustered == 450
    assert (index.labels.diff() >= 0).all()
    place = index.order.long().transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 16)
    assert same_bits(index.k[:, :450], k.gather(1, place))
    assert same_bits(index.k[:, 450:], k[:, 450:])
    sizes = torch.zeros(2, 2, 30, dtype=torch.int64).scatter_add_(
        -1, index.labels, torch.ones_like(index.labels)
    )
    assert torch.equal(sizes, index.counts.long())


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.8])
def test_calibration_meets_the_budget(per_head: bool, budget: float) -> None:
    q, k, v = inputs(n=1200, rows=32)
    index = CentroidIndex.fit(k, v, num_centroids=100, window=20)
    index.calibrate(q, budget, per_head=per_head)
    kept = torch.stack(
        [index.select(q[:, i : i + 1])[1].float() - 20 for i in range(32)]
    ) / index.clustered  # fmt: skip
    shares = kept.mean((0, 1)) if per_head else kept.mean().view(1)
    assert index.threshold.shape == ((2,) if per_head else (1,))
    for share in shares.tolist():
        assert budget - 1e-6 <= share < budget + 0.02


def test_ends_of_the_budget(target: Target) -> None:
    q, k, v = inputs(rows=3)
    index = CentroidIndex.fit(k, v, num_centroids=1, window=10)
    index.calibrate(100 * q, 0.5)
    _, lens = index.select(100 * q[:, :1], backend="reference")
    assert index.threshold.isfinite().all()
    assert (lens == 500).all()  # one cluster: all or nothing
    index.calibrate(q, 0.0)
    out = attnforge.centroid_attention(q[:, :1], index, backend=target.backend)
    want = attnforge.flash_attention(q[:, :1], k[:, -10:], v[:, -10:], backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow(target: Target) -> None:
    q, k, v = inputs()
    index = CentroidIndex.fit(k, v, num_centroids=30).calibrate(300 * q, 0.2)
    assert not index.threshold.isnan().any()
    out = attnforge.centroid_attention(300 * q, index, backend=target.backend)
    assert out.isfinite().all()


def test_two_levels_choose_a_part_of_one() -> None:
    q, k, v = inputs(n=1000)
    two = CentroidIndex.fit(k, v, num_centroids=80, levels=2).calibrate(q, 0.3)
    one = CentroidIndex.fit(k, v, num_centroids=80)
    one.threshold = two.threshold
    assert two.parent is not None
    assert two.coarse_counts is not None
    assert int(two.coarse_counts.sum()) == int(two.counts.sum())
    for b in range(2):
        for h in range(2):
            (a, n), (c, m) = ((x[0][b, h], int(x[1][b, h])) for x in (two.select(q), one.select(q)))
            assert set(a[:n].tolist()) <= set(c[:m].tolist())


def test_appended_keys_are_assigned(cpu: str) -> None:
    q, k, v = inputs(n=900)
    index = CentroidIndex.fit(k[:, :500], v[:, :500], num_centroids=30, window=50,
                              assign_every=64, levels=2)  # fmt: skip
    for at in range(500, 900, 50):
        index.append(k[:, at : at + 50], v[:, at : at + 50])
        assert index.length == at + 50
        assert 50 <= index.length - index.clustered < 50 + 64 + 50
    assert index.clustered > 700
    assert int(index.counts.sum()) == 4 * index.clustered
    want = attnforge.flash_attention(q, k, v, backend="reference")
    got = attnforge.centroid_attention(q, index, budget=1.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_prefill_beside_the_context(target: Target) -> None:
    q, k, v = inputs(rows=7)
    own = (torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16))
    index = CentroidIndex.fit(k, v, num_centroids=30)
    got = attnforge.centroid_attention(q, index, budget=1.0, new=own, backend=target.backend)
    both = [torch.cat([a, b], 1) for a, b in zip((k, v), own, strict=True)]
    want = attnforge.flash_attention(q, *both, causal=True, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_chosen_keys_carry_the_mass() -> None:
    q, k, v = inputs(n=1500)
    index = CentroidIndex.fit(k, v, num_centroids=60, window=0)
    _, total = attnforge.flash_attention(2 * q, k, v, return_lse=True)
    for reduce, least in (("none", 0.95), ("max", 0.9)):
        _, kept = attnforge.centroid_attention(
            2 * q, index, budget=0.3, reduce=reduce, return_lse=True
        )
        assert (kept - total).exp().mean() > least


def test_files(tmp_path: Path) -> None:
    q, k, v = inputs()
    index = CentroidIndex.fit(k, v, num_centroids=30, levels=2).calibrate(q, 0.4)
    index.save(tmp_path / "index.safetensors")
    again = CentroidIndex.load(tmp_path / "index.safetensors")
    assert again.options == index.options
    a, b = (attnforge.centroid_attention(q, x) for x in (index, again))
    assert same_bits(a, b)
    assert again.k.transpose(1, 2).is_contiguous()  # a cluster's keys are one run
    import safetensors.torch

    safetensors.torch.save_file({"k": k}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="no entry 'attnforge'"):
        CentroidIndex.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("clusters", [1, 63, 64, 130])
def test_the_nearest_is_the_first_of_equals(clusters: int, metric: str) -> None:
    """Over whole and broken runs of columns; every centroid stands there twice."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 8, generator=g)
    once = torch.randn(2, clusters, 8, generator=g)
    label = assign(x, torch.cat([once, once.flip(1)], 1), metric)
    unit = once / once.norm(dim=-1, keepdim=True) if metric == "cosine" else once
    away = torch.cdist(x.double(), unit.double())
    if metric == "cosine":
        away = -(x.double() @ unit.double().mT)
    assert int(label.max()) < clusters
    assert torch.equal(label, away.argmin(-1))


def test_sums_of_clusters(target: Target) -> None:
    backend = "reference" if target.backend == "reference" else None
    x, labels = torch.randn(3, 500, 72), torch.randint(0, 7, (3, 500))
    labels[labels == 2] = 1  # an empty cluster
    sums, counts = torch.ops.attnforge.cluster_sums(x, labels, 7, backend)
    own = torch.nn.functional.one_hot(labels, 7).double()
    torch.testing.assert_close(sums.double(), own.mT @ x.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(counts, own.sum(1).int())


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    kmeans(torch.randn(1, 50, 8), 5, iterations=3, progress=True)
    assert "k-means" in capsys.readouterr().err


def test_errors() -> None:
    q, k, v = inputs()
    index = CentroidIndex.fit(k, v, num_centroids=30)
    for call, text in (
        (lambda: CentroidIndex.fit(k, v[:, :4]), "k is float32"),
        (lambda: CentroidIndex.fit(k, v, levels=3), "levels is 3"),
        (lambda: CentroidIndex.fit(k, v, metric="dot"), "metric is 'dot'"),
        (lambda: CentroidIndex.fit(k, v, num_centroids=0), "num_centroids is 0"),
        (lambda: CentroidIndex.fit(k, v, window=-1), "window is -1"),
        (lambda: index.append(k[:1], v[:1]), "k has shape"),
        (lambda: index.calibrate(q, 1.5), "budget is 1.5"),
        (lambda: index.scores(q, reduce="sum"), "reduce is 'sum'"),
        (lambda: attnforge.centroid_attention(q[:1], index), "q has shape"),
        (lambda: attnforge.centroid_attention(q, index, budget=0.1, threshold=0.0), "both given"),
        (lambda: attnforge.centroid_attention(q, index, budget=-1.0), "budget is -1.0"),
        (lambda: kmeans(q, 3), "x has shape"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
