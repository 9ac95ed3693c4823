"""A winner must win again in fresh processes, or the default stays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnforge
from attnforge.registry import KernelSpec, Request, list_kernels
from attnforge.tuning import confirm, runner
from attnforge.tuning.measure import Gain
from attnforge.tuning.race import REPEATS

Add = Callable[..., KernelSpec]


def gain(low: float, repeats: int = REPEATS) -> Gain:
    return Gain(low + 0.1, low, low + 0.2, 1e-3, 1e-3, repeats)


@pytest.mark.parametrize(
    ("gains", "status", "asked"),
    [
        ([gain(1.1), gain(1.05)], "tuned", 2),
        ([gain(1.1), gain(1.01)], "default", 2),
        ([gain(0.9), gain(1.1)], "default", 1),
        ([gain(0.0, 3), gain(1.1)], "unfinished", 1),
    ],
    ids=["wins", "loses the second", "loses the first", "no time"],
)
def test_every_process_has_a_say(
    toy: Any, add: Add, monkeypatch: pytest.MonkeyPatch, gains: list[Gain], status: str, asked: int
) -> None:
    add("good")
    toy.costs = {"good": 0.7e-3}
    seen: list[tuple[str, Any, int]] = []

    def elsewhere(spec: KernelSpec, config: Any, request: Request, deadline: float) -> Gain:
        seen.append((spec.id, config["mode"], dict(request.sizes)["rows"]))
        return gains[len(seen) - 1]

    monkeypatch.setattr(runner, "elsewhere", elsewhere)
    problem = [toy.request(100)]
    monkeypatch.setattr(runner, "_requests", lambda *_: problem)
    (outcome,) = attnforge.tune("toy", budget=1e9, confirm=2).outcomes
    assert outcome.status == status
    assert seen == [("toy.scan", "good", 100)] * asked
    assert outcome.config["mode"] == ("good" if status == "tuned" else "plain")
    if status == "tuned":
        assert outcome.low == 1.05  # of the process where it won by the least


def fwd() -> tuple[KernelSpec, Request]:
    spec = next(s for s in list_kernels("flash_fwd") if s.backend == "cpu")
    sizes = (("batch", 1), ("heads", 2), ("seqlen_q", 40), ("seqlen_k", 40), ("window", 1))
    dims = (("head_dim", 16), ("v_head_dim", 16), ("group", 1))
    return spec, Request("flash_fwd", "cpu", "", torch.float32, dims, sizes=sizes)


def test_a_process_measures(cpu: str) -> None:
    spec, request = fwd()
    config = spec.space.config({**spec.space.default(request), "block_m": 24})
    found = confirm.elsewhere(spec, config, request, time.monotonic() + 0.3)
    assert 1 <= found.repeats <= REPEATS
    assert 0.01 < found.middle < 100
    assert found.default_s > 0
    assert math.isfinite(found.candidate_s)


def test_a_kernel_that_only_this_process_knows_is_refused(cpu: str) -> None:
    spec, request = fwd()
    mine, default = replace(spec, id="my.own"), spec.space.config(spec.space.default(request))
    with pytest.raises(RuntimeError, match=r"my\.own cannot be confirmed .*no kernel my\.own"):
        confirm.elsewhere(mine, default, request, time.monotonic() + 1.0)
