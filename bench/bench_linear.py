"""The linear family's speed table as a pytest-benchmark suite: ours, plain chunks, SDPA.

    pytest bench/bench_linear.py --benchmark-only

As in ``bench_flash.py``: for following one implementation over time. Ratios come from
`attnforge bench linear`, which interleaves all sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from attnforge.testing.bench import Workload, family_cases

_CASES = {case.name: case for case in family_cases("linear", quick=True)}
_SIDES = [(name, side) for name, case in _CASES.items() for side in ("attnforge", *case.peers)]


@functools.lru_cache(maxsize=1)  # one case's inputs at a time, shared by its implementations
def _built(name: str) -> Workload:
    return _CASES[name].build(None)


@pytest.mark.parametrize(("name", "implementation"), _SIDES)
def test_linear(benchmark: Any, name: str, implementation: str) -> None:
    workload = _built(name)
    run: Callable[[], object] | str = workload.candidate
    if implementation != "attnforge":
        run = workload.peers[implementation]
    if isinstance(run, str):
        pytest.skip(run)  # why this peer cannot run here
    benchmark.group = name
    run()  # first touch, selection
    benchmark.pedantic(run, rounds=5, iterations=1)
    benchmark.extra_info["rate"] = _CASES[name].work * 1e-9 / benchmark.stats.stats.median
