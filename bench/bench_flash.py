"""The flash family's speed table as a pytest-benchmark suite, ours and torch's side by side.

    pytest bench/bench_flash.py --benchmark-only

pytest-benchmark runs one implementation after the other, so its groups are for following one
implementation over time (`--benchmark-compare`). Ratios between implementations come from
`attnforge bench flash`, which interleaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from attnforge.testing.bench import Workload, flash_cases
from attnforge.testing.bench_flash import PEERS

_CASES = flash_cases(quick=True)
_IMPLEMENTATIONS = ["attnforge", *PEERS]


@pytest.fixture(scope="module", params=_CASES, ids=lambda case: case.name)
def built(request: pytest.FixtureRequest) -> tuple[str, float, str, Workload]:
    """One case with its inputs, shared by its implementations and freed after them."""
    case = request.param
    return case.name, case.work, case.resource, case.build(None)


@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
def test_flash(
    benchmark: Any, built: tuple[str, float, str, Workload], implementation: str
) -> None:
    name, work, resource, workload = built
    run: Callable[[], object] | str | None = workload.candidate
    if implementation != "attnforge":
        run = workload.peers.get(implementation)
        if run is None:
            pytest.skip(f"{implementation} is no peer of {name}")
        if isinstance(run, str):
            pytest.skip(run)
    benchmark.group = name
    run()  # first touch, selection, compilation
    benchmark.pedantic(run, rounds=5, iterations=1)
    unit = "gflops" if resource == "compute" else "gbytes_per_s"
    benchmark.extra_info[unit] = work * 1e-9 / benchmark.stats.stats.median
