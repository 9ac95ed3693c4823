"""Settings of every test: 2 threads, fixed seeds, poisoned memory, counted targets.

Poison is the default: ``torch.empty`` gives NaN, so an output that a kernel forgets to write fails
any comparison. The marker ``plain_memory`` turns that off where a test needs torch's own mode.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator

# Two xdist workers of two threads each on two cores: spinning at barriers would cost most of it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for _name in ("ATTNFORGE_BACKEND", "ATTNFORGE_DEBUG"):
    os.environ.pop(_name, None)
# Results of tuning on this machine must not change what is tested.
os.environ["ATTNFORGE_CACHE_DIR"] = tempfile.mkdtemp(prefix="attnforge-tests-")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from attnforge import _native  # noqa: E402
from attnforge.testing.cases import Target, use_isa  # noqa: E402
from attnforge.testing.poison import poisoned_memory  # noqa: E402

THREADS = 2
# Levels of matrix tiles have kernels of their own in these families alone.
TILE_FAMILIES = ("flash", "paged", "cascade", "block_sparse", "nsa")
ISA_LEVELS = ("baseline", "avx2", "avx512", "amx", "avx512_soft", "amx_soft")

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # time is not what is tested
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("default"), derandomize=False, max_examples=2000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "plain_memory: without the poison of uninitialised memory")
    torch.set_num_threads(THREADS)


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``thinned(n)``: one point in about n of a test, chosen by its name, is not exhaustive.

    Where a test has no parameter but the target all points stay, so that no level goes without it.
    """
    for item in items:
        mark = item.get_closest_marker("thinned")
        parameters = item.callspec.params.keys() if hasattr(item, "callspec") else set()
        draw = hashlib.sha256(item.name.encode()).digest()[0]
        if mark and parameters - {"target", "level"} and draw % mark.args[0]:
            item.add_marker("exhaustive")


@pytest.fixture(autouse=True)
def _settings(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    with poisoned_memory():
        yield


def _has_tiles(request: pytest.FixtureRequest) -> bool:
    """Whether kernels of matrix tiles may serve a test: of these families, in bf16."""
    parameters = getattr(request.node, "callspec", None)
    values = parameters.params.values() if parameters else ()
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    return any(name in request.path.name for name in TILE_FAMILIES) and (
        not dtypes or torch.bfloat16 in dtypes
    )


def _on(target: Target, request: pytest.FixtureRequest) -> Iterator[Target]:
    if target.backend == "cpu":
        if target.isa in _native.TILE_LEVELS and not _has_tiles(request):
            pytest.skip("these kernels are those of the level below")
        if reason := _native.unavailable():
            pytest.skip(reason)
        if target.isa and target.isa not in _native.isa_levels():
            pytest.skip(f"this CPU does not run {target.isa}")
        with use_isa(target.isa):
            yield target
    else:
        yield target


@pytest.fixture
def need() -> Callable[..., None]:
    """A test calls it with the levels that it compares: it is skipped where one does not run."""

    def check(*levels: str) -> None:
        if reason := _native.unavailable():
            pytest.skip(reason)
        for level in levels:
            if level not in _native.isa_levels():
                pytest.skip(f"this CPU does not run {level}")

    return check


@pytest.fixture(params=["reference", *ISA_LEVELS])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The reference, and the CPU kernels on every ISA level that runs here."""
    name = request.param
    target = Target(name) if name == "reference" else Target("cpu", name)
    yield from _on(target, request)


@pytest.fixture(params=ISA_LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The CPU kernels on every ISA level that runs here."""
    yield from _on(Target("cpu", request.param), request)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both backends; the CPU kernels on the level that was chosen for this machine."""
    yield from (target.backend for target in _on(Target(request.param), request))


@pytest.fixture
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels alone."""
    yield from (target.backend for target in _on(Target("cpu"), request))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tests by folder and by target, so that a level that did not run is seen."""
    folders: Counter[tuple[str, str]] = Counter()
    targets: Counter[tuple[str, str]] = Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            file, _, name = report.nodeid.partition("::")
            folders["/".join(file.split("/")[:2]), outcome] += 1
            ids = set(name.partition("[")[2].rstrip("]").split("-"))
            for label in ("reference", "cpu", *ISA_LEVELS):
                if label in ids:
                    targets[label, outcome] += 1
    for title, counts in (("folder", folders), ("target", targets)):
        for label in dict.fromkeys(name for name, _ in counts):
            parts = [
                f"{counts[label, o]} {o}"
                for o in ("passed", "failed", "skipped")
                if counts[label, o]
            ]
            terminalreporter.write_line(f"{title} {label:<18} {', '.join(parts)}")
