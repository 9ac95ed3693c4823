"""A toy operator with a search space, an empty cache directory, and a clock that kernels turn."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge.registry import Config, KernelSpec, Request, SearchSpace, register, tuned, unregister
from attnforge.registry.predicates import Device
from attnforge.tuning import measure, store
from attnforge.tuning.device import device_name, shipped_environment
from attnforge.tuning.entry import Entry, Problem

OP = "toy_scan"


def toy_request(rows: int = 100, **changes: Any) -> Request:
    sizes = (("batch", 2), ("heads", 3), ("rows", rows))
    return Request(**{"op": OP, "device": "cpu", "arch": "", "dtype": torch.float32,
                      "dims": (("head_dim", 8),), "sizes": sizes, **changes})  # fmt: skip


class ToyWorkload:
    """Doubles a matrix; ``proof`` is a smaller one."""

    def __init__(self, rows: int) -> None:
        self.x = torch.arange(1.0, rows * 8 + 1).view(rows, 8)
        self.outputs = {"out": torch.empty_like(self.x)}

    def run(self, launch: Callable[..., Any]) -> None:
        launch(self.x, self.outputs["out"])

    def wrong(self) -> str | None:
        return None if torch.equal(self.outputs["out"], 2 * self.x) else "out is not doubled"

    @property
    def proof(self) -> ToyWorkload:
        return self._proof

    _proof: ToyWorkload


def workload(request: Request) -> ToyWorkload:
    made = ToyWorkload(dict(request.sizes)["rows"])
    made._proof = ToyWorkload(3)
    return made


def problems(op: str) -> list[Request]:
    return [toy_request(100), toy_request(1000)]


@dataclass
class Toy:
    """The clock and the cost in seconds of a call by mode; ``noise`` is the sigma of its log."""

    costs: dict[str, float] = field(default_factory=dict)
    noise: float = 0.0
    now: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(0))
    ran: list[str] = field(default_factory=list)

    def launch(self, x: Tensor, out: Tensor, *, config: Config) -> None:
        mode = str(config["mode"])
        self.ran.append(mode)
        self.now += self.costs.get(mode, 1e-3) * self.random.lognormvariate(0.0, self.noise)
        if mode == "fails":
            raise MemoryError("no room")
        if mode == "unwritten":
            return
        torch.mul(x, 2, out=out)
        if mode == "wrong":
            out[-1, -1] += 1
        if mode == "wrong when large" and len(x) > 3:
            out[-1] = 0

    request = staticmethod(toy_request)

    def space(self, *modes: str, **options: Any) -> SearchSpace:
        return SearchSpace({"mode": ["plain", *modes]}, {"mode": "plain"}, "it is plain", **options)

    def spec(self, *modes: str, id: str = "toy.scan", **options: Any) -> KernelSpec:
        space = options.pop("space", None) or self.space(*modes)
        return KernelSpec(**{"id": id, "op": OP, "backend": id.split(".")[0], "launch": self.launch,
                             "requires": (Device("cpu"),), "space": space, **options})  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory; the directory of results in it is not made yet."""
    monkeypatch.setenv("ATTNFORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_warned", set())
    tuned.refresh()
    yield tmp_path / "cache" / "tune"
    tuned.refresh()


@pytest.fixture
def toy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """The toy operator without kernels; kernels that a test registers are removed again."""
    made = Toy()
    clock = SimpleNamespace(perf_counter=lambda: made.now, monotonic=lambda: made.now)
    monkeypatch.setattr(measure, "time", clock)
    module = ModuleType("toy_tuning")
    module.workload, module.problems = workload, problems  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_tuning", module)
    monkeypatch.setattr(tuned, "_SIZED", dict(tuned._SIZED))
    names = ("batch", "heads", "rows")
    how = tuned.Sized(
        names, lambda *sizes: sizes, "toy_tuning:workload", "toy_tuning:problems",
        alone=("heads",), layouts=frozenset({"packed"}),
    )  # fmt: skip
    tuned.sized(OP, how)
    yield made
    from attnforge.registry.spec import list_kernels

    for spec in list_kernels(OP):
        unregister(spec.id)


@pytest.fixture
def add(toy: Toy) -> Callable[..., KernelSpec]:
    """Register a toy kernel with these modes beside ``plain``."""
    return lambda *modes, **options: register(toy.spec(*modes, **options))


@pytest.fixture
def tables(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory in the place of the package's tables."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setattr(store, "tables_directory", lambda: folder)
    tuned.refresh()
    return folder


@pytest.fixture
def ship(tables: Path) -> Callable[..., Entry]:
    """Write a row of the package for every call with the sequences of a request."""

    def write(spec: KernelSpec, request: Request, config: Any, **changes: Any) -> Entry:
        measured = {"date": "2026-01-31", "gain": 1.12}
        problem, holds_for = Problem.alone(request), shipped_environment(spec)
        row = replace(Entry(spec.id, problem, holds_for, config, {}, measured), **changes)
        device = device_name(request)
        assert device is not None
        path = store.file_of(tables, request.op, device)
        old = json.loads(path.read_text())["entries"] if path.exists() else {}
        path.write_text(json.dumps({"entries": {**old, row.key: row.to_json()}}))
        tuned.refresh()
        return row

    return write
