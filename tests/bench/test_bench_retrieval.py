"""The retrieval benchmark: every case runs on small shapes, its peers compute the dense problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnforge.testing import bench, bench_retrieval
from attnforge.testing.bench_retrieval import Shape

SMALL = Shape("lsh", 700, heads_q=4, heads_k=2, head_dim=32, bits=3, tables=20)


@pytest.mark.parametrize("kind", ["lsh", "centroid", "quest", "indexed"])
def test_steps(cpu: str, kind: str) -> None:
    small = replace(SMALL, kind=kind, budget=0.5, planes=kind == "quest")
    workload = bench_retrieval.build(small, cpu)
    ours = workload.candidate()
    assert isinstance(ours, torch.Tensor)
    dense = [peer() for peer in workload.peers.values() if callable(peer)]
    for other in dense:
        assert isinstance(other, torch.Tensor)
        torch.testing.assert_close(other.flatten(), dense[0].flatten(), rtol=0.1, atol=0.02)  # type: ignore[attr-defined]
    assert float((ours.flatten() - dense[0].flatten()).abs().max()) < 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["encode", "kmeans"])
def test_making_an_index(cpu: str, kind: str) -> None:
    workload = bench_retrieval.build(replace(SMALL, kind=kind), cpu)
    workload.candidate()
    for peer in workload.peers.values():
        assert callable(peer)
        peer()


def test_cases() -> None:
    cases = bench.family_cases("retrieval", quick=True)
    assert len({c.name for c in cases}) == len(cases) == 8
    assert cases[0].work == 98304 * 8 * 128 * 4
    assert len({c.series for c in bench.family_cases("retrieval", sweep=True)}) == 3
