"""The reductions benchmark: both sides compute the same thing, within the bound."""

from __future__ import annotations

import pytest
import torch

from attnforge.testing import bench, bench_reductions
from attnforge.testing.bench_reductions import STATISTICS, Shape

# Torch rounds 16-bit logits, so that its list of edges is another one.
SIDES = [(s, torch.float32) for s in STATISTICS]
SIDES += [(s, torch.bfloat16) for s in STATISTICS if s != "edges"]


@pytest.mark.parametrize(("statistic", "dtype"), SIDES)
def test_both_sides_agree(backend: str, statistic: str, dtype: torch.dtype) -> None:
    workload = bench_reductions.build(Shape(statistic, 192, dtype, heads=2, head_dim=16), backend)
    plain = workload.peers["plain torch"]
    assert callable(plain)
    ours, theirs = workload.candidate(), plain()
    if statistic == "edges":
        room = min(ours.shape[0], theirs.shape[0])  # so short rows have more edges than room
        ours, theirs = ours[:room], theirs[:room]
    rough = {} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(ours, theirs, **rough)
    errors = workload.errors()
    assert set(errors) == (set() if statistic == "edges" else {"attnforge", "plain torch"})
    if errors:
        assert errors["attnforge"].bound is not None
        assert errors["attnforge"].bound <= 1


def test_cases() -> None:
    cases = bench.family_cases("reductions", quick=True)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) == 2 * len(STATISTICS) + 1
    assert all(case.work == 64 * 2 * 8 * (s * (s + 1) // 2) for case in cases[:6] for s in [2048])
    assert len({case.series for case in bench.family_cases("reductions", sweep=True)}) == 1
    with pytest.raises(ValueError, match="there is: block_sparse, cope, flash, linear, paged, red"):
        bench.family_cases("nothing")
