"""The paged benchmark: all sides compute the same thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnforge.testing import bench, bench_paged
from attnforge.testing.bench import Result, Timing, Versus
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


def measured(series: str, x: int, seconds: float, fraction: float) -> Result:
    """A result as a run would have it."""
    timing = Timing(seconds, seconds, 1, [seconds])
    peer = Versus("contiguous", 1.1, 1.0, 1.2, Timing(2 * seconds, 2 * seconds, 1, []), 5.0, None,
                  None)  # fmt: skip
    return Result(f"case-{x}", "title", "paged", "GB/s", 1e9, series, x, timing, 10.0, 20.0, "fake",
                  fraction, None, None, [peer], {}, 1, 0, 0.0)  # fmt: skip


def test_plots_show_time_and_fraction(tmp_path: Path) -> None:
    """A figure per series and one over the kinds of pages; the values are those of the results."""
    pytest.importorskip("matplotlib")
    from attnforge.testing import plots

    names = [c.series for c in bench.family_cases("paged", quick=True, sweep=True)]
    results = [measured(s, x, 1e-3 * x, 0.25) for s in dict.fromkeys(names) for x in (1, 2, 8)]
    env = {"device": "fake", "threads": 2}
    files = plots.save_plots(results, tmp_path, env, {}, name="paged")
    assert [f.name for f in files if "keys" in f.name][-1] == "paged-paged-decode-over-keys.png"
    assert len(files) == 1 + 6 + 1
    assert all(f.stat().st_size > 1000 for f in files)
    lines = plots._lines(results[:3], "time")
    assert lines == {"attnforge": [(1, 1.0), (2, 2.0), (8, 8.0)],
                     "contiguous": [(1, 2.0), (2, 4.0), (8, 16.0)]}  # fmt: skip
    assert plots._lines(results[:3], "fraction") == {"attnforge": [(x, 25.0) for x in (1, 2, 8)]}
