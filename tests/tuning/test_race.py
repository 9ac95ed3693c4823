"""Who wins: right answers only, and only by more than the noise. Time is the toy's own clock."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnforge
from attnforge.registry import KernelSpec
from attnforge.tuning import measure, store
from attnforge.tuning.race import differs
from attnforge.tuning.runner import Outcome

Add = Callable[..., KernelSpec]


def outcomes(budget: float = 1e9, **options: object) -> list[Outcome]:
    return list(attnforge.tune("toy", budget=budget, **options).outcomes)  # type: ignore[arg-type]


def test_the_fastest_right_config_wins(toy: Any, add: Add) -> None:
    add("slow", "good", "best")
    toy.costs, toy.noise = {"slow": 2e-3, "good": 0.9e-3, "best": 0.8e-3}, 0.05
    for outcome in outcomes():
        assert outcome.status == "tuned"
        assert outcome.config["mode"] == "best"
        assert 1.15 < outcome.low <= outcome.gain <= outcome.high < 1.35


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("wrong", "out is not doubled"),
        ("unwritten", "out is not doubled"),
        ("fails", "MemoryError: no room"),
        ("wrong when large", "differs from the default's answer"),
    ],
)
def test_a_wrong_answer_never_wins(toy: Any, add: Add, mode: str, reason: str) -> None:
    add(mode, "good")
    toy.costs = {mode: 1e-6, "good": 0.9e-3}
    for outcome in outcomes():
        assert outcome.config["mode"] == "good"
        assert len(outcome.wrong) == 1
        assert reason in outcome.wrong[0]
    # Never timed; what passes the proof is screened, and never meets the default.
    assert toy.ran.count(mode) <= (2 * 70 if mode == "wrong when large" else 2)


def test_a_default_that_is_wrong_ends_the_run(toy: Any, add: Add) -> None:
    space = attnforge.SearchSpace({"mode": ["plain"]}, {"mode": "wrong"}, "")
    add(space=space)
    with pytest.raises(RuntimeError, match=r"toy\.scan is wrong or fails with its default"):
        outcomes()


def test_noise_does_not_win(toy: Any, add: Add) -> None:
    """12 configs of the same speed under 10% noise: the luckiest of the screen loses the duel."""
    add(*[f"same{n}" for n in range(12)])
    toy.noise = 0.1
    won = 0
    for seed in range(30):
        toy.random = random.Random(seed)
        won += sum(outcome.status == "tuned" for outcome in outcomes(force=True))
    assert won == 0


def test_a_gain_below_the_margin_does_not_win(toy: Any, add: Add) -> None:
    add("hardly")
    toy.costs = {"hardly": 1e-3 / 1.015}
    assert [outcome.status for outcome in outcomes()] == ["default", "default"]


def test_rank_of_the_interval() -> None:
    """Against the table of the sign test: n = 15 gives the 4th smallest at 2.5%."""
    assert [measure.lower_rank(n) for n in (5, 6, 15, 20)] == [None, 0, 3, 5]
    # the interval holds the median of a skewed distribution as often as it says
    rng, inside = random.Random(1), 0
    for _ in range(2000):
        sample = sorted(rng.lognormvariate(0.0, 1.0) for _ in range(15))
        inside += sample[3] <= 1.0 <= sample[-4]
    assert abs(inside / 2000 - 0.9648) < 3 * (0.9648 * 0.0352 / 2000) ** 0.5


def test_too_few_pairs_decide_nothing(toy: Any, add: Add) -> None:
    add("good")
    toy.costs = {"good": 0.5e-3}
    run = lambda mode: lambda: toy.launch(torch.ones(1, 8), torch.ones(1, 8), config={"mode": mode})  # noqa: E731
    gain = measure.duel((run("plain"), run("good")), 15, toy.now + 0.3, "cpu")
    assert gain.repeats < 6
    assert gain.middle == pytest.approx(2.0)
    assert gain.low == 0.0


def test_differs() -> None:
    want = torch.randn(4, 16, 8)
    rounded = want * (1 + 3e-7)
    assert differs({"out": rounded}, {"out": want}) is None
    one = want.clone()
    one[2, 5] = 0
    assert "out differs" in str(differs({"out": one}, {"out": want}))
    one[2, 5] = float("nan")
    assert "not finite" in str(differs({"out": one}, {"out": want}))
    edge = torch.full((2, 3), float("-inf"))
    assert differs({"lse": edge.clone()}, {"lse": edge}) is None


def test_a_second_run_keeps_what_is_there(toy: Any, add: Add, cache: Path) -> None:
    add("good")
    toy.costs = {"good": 0.5e-3}
    assert [o.status for o in outcomes()] == ["tuned", "tuned"]
    toy.ran.clear()
    again = outcomes()
    assert [o.status for o in again] == ["kept", "kept"]
    assert {o.config["mode"] for o in again} == {"good"}
    assert toy.ran == []
    assert [o.status for o in outcomes(force=True)] == ["tuned", "tuned"]


def test_a_run_that_is_stopped_keeps_finished_buckets(toy: Any, add: Add, cache: Path) -> None:
    add("good")
    toy.costs = {"good": 0.5e-3}

    def stop(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attnforge.tune("toy", progress=stop)
    (file,) = cache.glob("*.json")
    assert len(store.read(file)) == 1
    assert [o.status for o in outcomes()] == ["kept", "tuned"]


def test_without_a_budget_nothing_is_written(toy: Any, add: Add, cache: Path) -> None:
    add("good")
    toy.costs = {"good": 0.5e-3}
    assert {o.status for o in outcomes(budget=0.0)} == {"unfinished"}
    assert not list(cache.glob("*.json")) if cache.exists() else True


def test_one_problem_per_bucket(toy: Any, add: Add) -> None:
    add("good")
    report = attnforge.tune("toy", progress=None)
    assert len(report.outcomes) == 2
    assert "toy.scan float32 head_dim=8" in str(report)
    assert toy.request(100) in [o.request for o in report.outcomes]


def test_a_problem_without_inputs_is_skipped_and_said(
    toy: Any, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: object) -> None:
        raise ValueError("no inputs with masks")

    add("good")
    monkeypatch.setattr(sys.modules["toy_tuning"], "workload", refuse)
    report = attnforge.tune("toy")
    assert [o.status for o in report.outcomes] == ["skipped", "skipped"]
    assert "no inputs with masks" in str(report)
