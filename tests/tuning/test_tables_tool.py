"""``tools/tuning_tables.py``: a row of a table has won in every process and lost in none."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnforge.registry import KernelSpec, Request, list_kernels, tuned
from attnforge.registry.select import decide
from attnforge.tuning import lookup
from attnforge.tuning.measure import Gain
from attnforge.tuning.race import REPEATS

Add = Callable[..., KernelSpec]
ROOT = Path(__file__).resolve().parents[2]


def gain(middle: float) -> Gain:
    return Gain(middle, middle - 0.02, middle + 0.02, 1e-3, 1e-3, REPEATS)


@pytest.fixture
def tool(toy: Any, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool with one kind of toy problems, and gains that a test sets (a list per process)."""
    spec = importlib.util.spec_from_file_location("tuning_tables", ROOT / "tools/tuning_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    problems = ((toy.request(100), 2), (toy.request(1000), 1))
    monkeypatch.setattr(module, "kinds", lambda: iter([module.Kind("toy small", problems)]))
    module.gains = [[gain(1.2), gain(1.0)], [gain(1.1), gain(0.99)]]
    module.asked = []

    def duels(spec: KernelSpec, config: Any, kind: Any) -> list[Gain]:
        module.asked.append(config["mode"])
        found: list[Gain] = module.gains[len(module.asked) - 1]
        return found

    monkeypatch.setattr(module, "duels", duels)
    return module


def run(tool: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tuning_tables.py", "toy", *words])
    tool.asked.clear()
    code: int = tool.main()
    tuned.refresh()
    return code


def mode(request: Request) -> Any:
    config = decide(request, None).config
    assert config is not None
    return config["mode"]


def test_a_winner_gets_a_row_that_calls_find(
    toy: Any, add: Add, tool: Any, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("good", "better")
    toy.costs = {"good": 0.7e-3, "better": 0.6e-3}
    assert run(tool, monkeypatch) == 0
    assert tool.asked == ["better", "better"]
    (table,) = tables.iterdir()
    (row,) = json.loads(table.read_text())["entries"].values()
    assert row["problem"]["bucket"] == {"heads": 4}
    measured = row["measured"]
    assert (measured["gain"], measured["gain_low"]) == (1.1, 1.08)  # where it won by the least
    assert (measured["least"], measured["processes"], measured["problems"]) == (0.99, 2, 2)
    assert mode(toy.request(77)) == "better"

    # measured again, nothing wins: the row goes, and the file that is empty then
    tool.gains = [[gain(1.0), gain(1.0)]]
    run(tool, monkeypatch)
    assert tool.asked == ["better"]
    assert not list(tables.iterdir())
    assert mode(toy.request(77)) == "plain"


@pytest.mark.parametrize(
    ("gains", "processes"),
    [
        ([[1.2, 1.0], [1.03, 1.0]], 2),  # not by more than the noise in the second process
        ([[1.2, 0.97], [1.2, 1.0]], 1),  # slower elsewhere
        ([[1.0, 1.5], [1.2, 1.2]], 1),  # wins, but not what it is for
    ],
    ids=["noise", "slower elsewhere", "another problem"],
)
def test_what_does_not_stand_everywhere_gets_none(
    toy: Any, add: Add, tool: Any, tables: Path, monkeypatch: pytest.MonkeyPatch,
    gains: list[list[float]], processes: int,
) -> None:  # fmt: skip
    add("good")
    tool.gains = [[gain(middle) for middle in process] for process in gains]
    run(tool, monkeypatch)
    assert len(tool.asked) == processes
    assert not list(tables.iterdir())


def test_rows_of_other_kinds_stay_and_those_of_other_source_go(
    toy: Any, add: Add, tool: Any, tables: Path, ship: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = add("good")
    other = Request(**{**vars_of(toy.request()), "dtype": torch.float16})
    ship(spec, other, {"mode": "good"})
    row = ship(spec, toy.request(features=frozenset({"window"})), {"mode": "good"})
    ship(spec, toy.request(), {"mode": "good"}, environment={**row.environment, "source": "old"})
    assert run(tool, monkeypatch, "--check") == 1
    run(tool, monkeypatch, "--config", "mode=1")  # no such value: nothing is offered to a kernel
    (table,) = tables.iterdir()
    assert len(json.loads(table.read_text())["entries"]) == 3


def vars_of(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__slots__}


def test_a_config_differs_in_one_parameter(cpu: str) -> None:
    del cpu
    spec = importlib.util.spec_from_file_location("tuning_tables", ROOT / "tools/tuning_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for kind in module.kinds():
        kernel = module.best_spec(kind.first)
        assert kernel is not None
        found = module.candidates(kernel, kind.first)
        assert len(found) >= 4
        assert all(sum(value != 0 for value in config.values()) == 1 for config in found)
        alone = {lookup.Problem.alone(request).bucket.get("heads") for request, _ in kind.problems}
        assert len(alone) == 1, "problems of one kind share a row"
        assert len({threads for _, threads in kind.problems}) > 1 or torch.get_num_threads() == 1
        assert len({dict(request.sizes)["batch"] for request, _ in kind.problems}) > 1
    assert {kernel.op for kernel in list_kernels()} >= {"flash_fwd", "flash_bwd"}
