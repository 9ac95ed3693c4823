"""The paged benchmark: all sides compute the same thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnforge.testing import bench, bench_paged
from attnforge.testing.bench_paged import Shape

SMALL = Shape("decode", 64, batch=2, heads_q=4, heads_k=2, head_dim=32, v_head_dim=32)


@pytest.mark.parametrize("code", ["", "fp8", "int8", "int4"])
def test_decode_sides_agree(backend: str, code: str) -> None:
    workload = bench_paged.build(replace(SMALL, code=code), backend)
    ours = workload.candidate()
    for name, peer in workload.peers.items():
        assert callable(peer)
        theirs = peer()
        assert isinstance(theirs, torch.Tensor)
        assert isinstance(ours, torch.Tensor)
        slack = {"": 0.02, "fp8": 0.1, "int8": 0.05, "int4": 0.4}[code]
        gap = float((ours.flatten() - theirs.flatten()).abs().max())
        assert gap < slack, (name, gap)
    assert workload.errors is not None
    assert all(e.bound is not None and e.bound <= 1 for e in workload.errors().values())


@pytest.mark.parametrize("kind", ["chunk", "cascade", "append"])
def test_other_kinds_run(backend: str, kind: str) -> None:
    workload = bench_paged.build(
        replace(SMALL, kind=kind, rows=9 if kind == "chunk" else 1), backend
    )
    ours = workload.candidate()
    (peer,) = workload.peers.values()
    assert callable(peer)
    theirs = peer()
    if kind == "chunk":
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_cases() -> None:
    cases = bench.family_cases("paged", quick=True) + bench.family_cases("paged", sweep=True)
    names = [c.name for c in cases if not c.series]
    assert len(set(names)) == len(names) == 8
    assert cases[0].work == 8 * 8192 * 8 * 256 * 2  # K and V of 8 x 8192 keys, 8 heads, bf16
    assert len({c.series for c in cases}) == 1 + 6
