"""The block_sparse benchmark: cases, sides that compute the same, work that follows the lists."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge.testing import bench, bench_block_sparse
from attnforge.testing.bench_block_sparse import Shape


def test_lists_of_full_density_are_dense() -> None:
    workload = bench_block_sparse.build(Shape("blocks", 256, heads=2, kv_heads=2, density=1.1))
    dense = workload.peers["dense"]
    assert callable(dense)
    torch.testing.assert_close(workload.candidate(), dense(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("method", ["moba", "nsa", "moba select", "nsa select"])
@pytest.mark.parametrize("backward", [False, True])
def test_sides_run(method: str, backward: bool) -> None:
    if backward and "select" in method:
        method = "blocks"
    workload = bench_block_sparse.build(Shape(method, 640, 4, 1, 16, backward=backward))
    (peer,) = workload.peers.values()
    assert callable(peer)
    ours, theirs = workload.candidate(), peer()
    if backward:
        assert [x.shape for x in ours] == [x.shape for x in theirs]  # type: ignore[attr-defined]
    elif "select" in method:
        assert isinstance(ours, attnforge.BlockSelection)
    else:
        assert ours.shape == theirs.shape  # type: ignore[attr-defined]


def test_cases() -> None:
    cases = bench.family_cases("block_sparse", quick=True)
    assert len({case.name for case in cases}) == len(cases) == 8
    dense = cases[0].work / bench_block_sparse._share(Shape("blocks", 8192))
    assert dense == pytest.approx(4 * 64 * 8 * 8192 * 8193 / 2)
    assert 0.1 < bench_block_sparse._share(Shape("blocks", 8192)) < 0.13
    assert len({case.series for case in bench.family_cases("block_sparse", sweep=True)}) == 1
