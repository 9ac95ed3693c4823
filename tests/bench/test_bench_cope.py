"""The benchmark of contextual positions: both sides compute the same thing."""

from __future__ import annotations

import pytest
import torch

from attnforge.testing import bench, bench_cope
from attnforge.testing.bench_cope import Shape


@pytest.mark.parametrize("kind", ["fwd", "fwd+bwd"])
def test_both_sides_agree(backend: str, kind: str) -> None:
    workload = bench_cope.build(Shape(kind, 100, heads=2, head_dim=16), backend)
    plain = workload.peers["plain torch"]
    assert callable(plain)
    ours, theirs = workload.candidate(), plain()
    if kind == "fwd":
        ours, theirs = (ours,), (theirs,)
    for got, want in zip(ours, theirs, strict=True):
        want = want if want.dim() == 3 else want.transpose(1, 2)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_cases() -> None:
    cases = bench.family_cases("cope", quick=True)
    assert [c.name for c in cases] == [
        f"cope-{kind}-fp32-s{s}" for s in (512, 2048) for kind in ("fwd", "fwd+bwd")
    ]
    assert len({case.series for case in bench.family_cases("cope", sweep=True)}) == 1
