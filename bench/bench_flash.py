"""The flash family's speed table as a pytest-benchmark suite, ours and torch's side by side.

    pytest bench/bench_flash.py --benchmark-only

pytest-benchmark runs one implementation after the other, so its groups are for following one
implementation over time (`--benchmark-compare`). Ratios between implementations come from
`attnforge bench flash`, which interleaves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from attnforge.testing.bench import Workload, flash_cases

_CASES = {case.name: case for case in flash_cases(quick=True)}
_RUNS = [
    (name, implementation)
    for name, case in _CASES.items()
    for implementation in ("attnforge", *case.peers)
]


@functools.lru_cache(maxsize=1)  # one case's inputs at a time, shared by its implementations
def _built(name: str) -> Workload:
    return _CASES[name].build(None)


@pytest.mark.parametrize(("name", "implementation"), _RUNS)
def test_flash(benchmark: Any, name: str, implementation: str) -> None:
    case, workload = _CASES[name], _built(name)
    run: Callable[[], object] | str = workload.candidate
    if implementation != "attnforge":
        run = workload.peers[implementation]
    if isinstance(run, str):
        pytest.skip(run)  # why this peer cannot run here
    benchmark.group = name
    run()  # first touch, selection, compilation
    benchmark.pedantic(run, rounds=5, iterations=1)
    unit = "gflops" if case.resource == "compute" else "gbytes_per_s"
    benchmark.extra_info[unit] = case.work * 1e-9 / benchmark.stats.stats.median
