"""Short contexts are dense: the measured costs, what follows from them, and what explain says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnforge
from attnforge import policies
from attnforge.policies import _crossover
from attnforge.policies._crossover import Costs
from attnforge.testing.crossover import MEASURED, fit, measure

KEY = 2 * 2 * 16 * 4  # bytes of K and V of one key below


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Quest passes dense decode at 200 keys; TokenSelect never does; others are not measured."""
    found = {"Quest": [60 * KEY / 2**20, 0.5, 1.0], "TokenSelect": [0.0, 1.5, 1.0]}
    monkeypatch.setattr(_crossover, "_loaded", {"device": "a bench", "costs": found})
    return found


def test_costs_meet_dense_decode_where_they_say() -> None:
    costs = Costs(3.0, 0.2, 2.5)
    keys = costs.crossover(512, 2048)
    spent = 3.0 * 2**20 / 2048 + 0.2 * keys + 2.5 * 512
    assert spent == pytest.approx(keys)
    assert Costs(3.0, 1.0, 2.5).crossover(512, 2048) == math.inf


def test_a_fit_finds_the_costs_it_was_made_of() -> None:
    true = Costs(2.0, 0.25, 1.5)
    rows = [
        (n, b, (2.0 * 2**20 / 1024 + 0.25 * n + 1.5 * b) / n)
        for n in (2048, 8192, 32768) for b in (128, 512)
    ]  # fmt: skip
    assert fit(rows, 1024) == pytest.approx(true, abs=2e-3)
    flat = fit([(n, b, 0.5) for n in (1024, 4096) for b in (64, 128)], 1024)
    assert flat == pytest.approx(Costs(0.0, 0.5, 0.0), abs=2e-3)
    assert min(fit([(n, b, 0.5 - b / n) for n in (1024, 4096) for b in (64, 128)], 1024)) >= 0.0


def test_steps_up_to_the_crossover_are_dense(costs: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, h, 16, generator=g) for h in (4, 2, 2))
    policy = policies.Quest(40, page_size=8)
    for n, dense in ((200, True), (201, False)):
        want = attnforge.flash_attention(q[:, n - 1 : n], k[:, :n], v[:, :n], causal=True)
        got = policy.attend(q[:, n - 1 : n], k[:, :n], v[:, :n])
        assert torch.equal(got, want) is dense
    policy.crossover = 250
    last = (q[:, 249:250], k[:, :250], v[:, :250])
    assert torch.equal(policy.attend(*last), attnforge.flash_attention(*last))


@pytest.mark.parametrize(
    ("policy", "keys", "op", "note"),
    [
        (policies.Quest(40), 200, "flash", "dense: 200 keys, sparse above 200 (budget 40, "
         "crossover measured on a bench)"),
        (policies.Quest(40), 201, "indexed_fwd", "sparse: 201 keys, dense up to 200"),
        (policies.TokenSelect(40), 41, "indexed_fwd", "no step was faster than dense"),
        (policies.SparQ(40), 41, "indexed_fwd", "no crossover was measured"),
        (policies.RazorAttention(40), 40, "flash", "dense: 40 keys"),
    ],
)  # fmt: skip
def test_explain_says_which(
    costs: dict[str, Any], policy: policies.Policy, keys: int, op: str, note: str
) -> None:
    shape = (1, keys, 2, 16)
    answer = attnforge.explain(policy.attend, (1, 1, 4, 16), shape, shape)
    assert answer.function == f"{type(policy).__name__}.attend"
    assert answer.decisions[0].request.op.startswith(op)
    assert note in answer.note
    assert answer.note in str(answer)
    assert answer.to_dict()["note"] == answer.note
    gpu = attnforge.explain(policy.attend, (1, 1, 4, 16), shape, shape, device="cuda:sm_90")
    assert "no crossover was measured" in gpu.note


def test_what_is_committed_is_whole() -> None:
    """Every policy that is measured has costs, with where and when they come from."""
    found = _crossover.measured()
    assert set(found) == {"device", "threads", "isa", "commit", "date", "costs"}
    kinds = {type(make(256)).__name__ for make in MEASURED.values()}
    assert set(found["costs"]) == kinds
    assert all(len(own) == 3 and min(own) >= 0 for own in found["costs"].values())


def test_measuring_runs() -> None:
    costs = measure(["streaming"], contexts=(1100, 1200), repeats=1)
    assert list(costs) == ["StreamingLLM"]
