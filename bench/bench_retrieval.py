"""The retrieval family's speed table as a pytest-benchmark suite, every side of it.

    pytest bench/bench_paged.py --benchmark-only

As in ``bench_flash.py``: for following one implementation over time. Ratios come from
`attnforge bench retrieval`, which interleaves all sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from attnforge.testing.bench import Workload, family_cases

_CASES = {case.name: case for case in family_cases("retrieval", quick=True)}


@functools.lru_cache(maxsize=1)  # one case's inputs at a time, shared by its implementations
def _built(name: str) -> Workload:
    return _CASES[name].build(None)


_SIDES = [(name, side) for name, case in _CASES.items() for side in ("attnforge", *case.peers)]


@pytest.mark.parametrize(("name", "implementation"), _SIDES)
def test_retrieval(benchmark: Any, name: str, implementation: str) -> None:
    workload = _built(name)
    run: Callable[[], object] | str = workload.candidate
    if implementation != "attnforge":
        run = workload.peers[implementation]
    if isinstance(run, str):
        pytest.skip(run)  # why this peer cannot run here
    benchmark.group = name
    run()  # first touch, selection
    benchmark.pedantic(run, rounds=5, iterations=1)
    benchmark.extra_info["work_per_second"] = _CASES[name].work / benchmark.stats.stats.median
