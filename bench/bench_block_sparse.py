"""The block_sparse family's speed table as a pytest-benchmark suite, ours and dense attention.

    pytest bench/bench_block_sparse.py --benchmark-only

As in ``bench_flash.py``: for following one implementation over time. Ratios come from
`attnforge bench block_sparse`, which interleaves both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from attnforge.testing.bench import Workload, family_cases

_CASES = {case.name: case for case in family_cases("block_sparse", quick=True)}
_RUNS = [(name, who) for name, case in _CASES.items() for who in ("attnforge", *case.peers)]


@functools.lru_cache(maxsize=1)  # one case's inputs at a time, shared by its implementations
def _built(name: str) -> Workload:
    return _CASES[name].build(None)


@pytest.mark.parametrize(("name", "implementation"), _RUNS)
def test_block_sparse(benchmark: Any, name: str, implementation: str) -> None:
    workload = _built(name)
    run: Callable[[], object] | str = workload.candidate
    if implementation != "attnforge":
        run = workload.peers[implementation]
    if isinstance(run, str):
        pytest.skip(run)  # why this peer cannot run here
    benchmark.group = name
    run()  # first touch, selection
    benchmark.pedantic(run, rounds=3, iterations=1)
