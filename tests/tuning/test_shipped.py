"""Rows of the package: no promise of an untuned call is lost by them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnforge
from attnforge import diagnose
from attnforge.cli.doctor import _tuning_line
from attnforge.registry import KernelSpec, list_kernels, tuned
from attnforge.registry.select import decide
from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import assert_same, same_bits
from attnforge.tuning import device, lookup, store
from attnforge.tuning.entry import Entry, Problem

Add = Callable[..., KernelSpec]
Ship = Callable[..., Entry]
ROOT = Path(__file__).resolve().parents[2]


def mode(request: Any) -> str:
    config = decide(request, None).config
    assert config is not None
    return str(config["mode"])


def sized(toy: Any, batch: int, heads: int, rows: int, *features: str) -> Any:
    sizes = (("batch", batch), ("heads", heads), ("rows", rows))
    return toy.request(sizes=sizes, features=frozenset(features))


def test_a_row_serves_every_call_with_the_same_sequence(toy: Any, add: Add, ship: Ship) -> None:
    ship(add("good"), sized(toy, 1, 4, 100), {"mode": "good"})
    for batch, rows in ((1, 1), (1, 100_000), (7, 100), (64, 3)):
        assert mode(sized(toy, batch, 3, rows)) == "good"
        assert mode(sized(toy, batch, 4, rows, "packed")) == "good"
    assert mode(sized(toy, 1, 5, 100)) == "plain"  # heads are a sequence's own
    assert mode(sized(toy, 1, 4, 100, "window")) == "plain"
    assert mode(sized(toy, 1, 4, 100, "window", "packed")) == "plain"
    assert mode(replace(sized(toy, 1, 4, 100), dtype=torch.float16)) == "plain"
    assert mode(replace(sized(toy, 1, 4, 100), dims=(("head_dim", 16),))) == "plain"


def test_a_row_without_sizes_costs_calls_no_look_at_them(toy: Any, add: Add, ship: Ship) -> None:
    how = tuned.operator("toy_scan")
    assert how is not None
    tuned.sized("toy_scan", how._replace(alone=()))
    ship(add("good"), toy.request(), {"mode": "good"})
    assert mode(replace(toy.request(), sizes=())) == "good"
    assert mode(sized(toy, 3, 100, 7, "packed")) == "good"
    assert "toy_scan" not in tuned.active


@pytest.mark.parametrize(
    "bucket",
    [{"rows": 128, "pairs": 4}, {"heads": 4, "rows": 128}, {"heads": 4, "batch": 1}, {}],
    ids=lambda bucket: "+".join(bucket) or "none",
)
def test_a_row_that_knows_more_or_less_serves_nothing(
    toy: Any, add: Add, ship: Ship, bucket: dict[str, int]
) -> None:
    request = sized(toy, 1, 4, 128)
    problem = replace(Problem.alone(request), bucket=bucket)
    ship(add("good"), request, {"mode": "good"}, problem=problem)
    assert mode(request) == "plain"


def test_processors_and_not_threads_or_versions(
    toy: Any, add: Add, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = toy.space("good", environment=lambda: {"threads": torch.get_num_threads()})
    row = ship(add(space=space), toy.request(), {"mode": "good"})
    assert set(row.environment) == {"source", "processors"}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert mode(toy.request()) == "good"
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert mode(toy.request()) == "good"
    monkeypatch.setattr(device, "processors", lambda: 1000)
    assert mode(toy.request()) == "plain"
    (state,) = lookup.shipped()
    assert state == (row, f"processors {os.cpu_count()}, now 1000")


def test_rows_of_other_source_cost_calls_nothing_and_are_told(
    toy: Any, add: Add, ship: Ship
) -> None:
    digest = ["one"]
    space = toy.space("good", source=lambda: digest[0])
    spec = add(space=space)
    ship(spec, toy.request(), {"mode": "good"})
    assert mode(toy.request()) == "good"
    assert "toy_scan" in tuned.active
    (told,) = diagnose._tuning_report()
    assert told == {"kernel": "toy.scan", "config": {"mode": "good"}, "not_used": None}
    assert _tuning_line([told]).endswith("1 of 1 results that come with the package are in use")

    digest[0] = "two"
    tuned.refresh()
    assert mode(toy.request()) == "plain"
    assert "toy_scan" not in tuned.active
    (told,) = diagnose._tuning_report()
    assert told["not_used"] == "source one, now two"
    assert _tuning_line([told]).endswith("are in use (not: toy.scan: source one, now two)")


# --- the kernels of flash, with rows that change the last bits ------------------------------------

ROWS = {
    "flash_fwd": {"block_m": 24, "block_n": 64, "wave_bytes": 2 << 20},
    "flash_bwd": {"block_m": 48, "block_n": 32, "chunks": 32},
}
LENGTHS = ((40, 40), (700, 700), (3, 90), (333, 400))


@pytest.fixture
def shipped(cpu: str, ship: Ship, request: pytest.FixtureRequest) -> None:
    """Such a row for each of forward and backward of the calls below."""
    case = FlashCase(seqlen_q=64, seqlen_k=64, heads_q=4, heads_k=2, causal=True).make()
    found = attnforge.explain(
        attnforge.flash_attention, case.q.requires_grad_(), case.k, case.v, **case.options
    )
    for decision in found.decisions:
        assert decision.chosen is not None
        ship(decision.chosen, decision.request, ROWS[decision.request.op])


def packed(lengths: tuple[tuple[int, int], ...] = LENGTHS) -> FlashInputs:
    return FlashCase(lengths=lengths, heads_q=4, heads_k=2, causal=True).make()


def test_a_row_is_used_and_changes_bits(
    cpu: str, request: pytest.FixtureRequest, cache: Path
) -> None:
    """Without this the tests below would prove nothing."""
    inputs = packed()
    plain = inputs.run(cpu)
    request.getfixturevalue("shipped")
    tuned_ = inputs.run(cpu)
    assert not same_bits(tuned_["out"], plain["out"])
    assert not same_bits(tuned_["dq"], plain["dq"])


@pytest.mark.usefixtures("shipped")
def test_threads_change_no_bit(cpu: str) -> None:
    inputs = packed()
    torch.set_num_threads(1)
    want = inputs.run(cpu)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same(inputs.run(cpu), want, f"{threads} threads")


@pytest.mark.usefixtures("shipped")
def test_neighbours_change_no_bit(cpu: str) -> None:
    """A packed sequence, alone in a pack, alone and dense, and in a dense batch."""
    inputs = packed()
    whole = inputs.run(cpu)
    cu_q, cu_k = (inputs.options[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k"))
    options = {n: x for n, x in inputs.options.items() if not n.startswith("cu_seqlens")}
    for b in range(len(LENGTHS)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        names = {"out": rows, "dq": rows, "dk": keys, "dv": keys}
        want = {n: whole[n][at] for n, at in names.items()} | {"lse": whole["lse"][:, rows]}
        assert inputs.dlse is not None
        parts = (inputs.q[rows], inputs.k[keys], inputs.v[keys], inputs.dout[rows],
                 inputs.dlse[:, rows])  # fmt: skip
        for batch in (1, 3):
            q, k, v, dout, dlse = (x.expand(batch, *x.shape).contiguous() for x in parts)
            dense = FlashInputs(attnforge.flash_attention, q, k, v, options, dout, dlse)
            got = dense.run(cpu)
            assert_same({n: x[-1] for n, x in got.items()}, want, f"{LENGTHS[b]}, batch {batch}")


# --- the tables themselves ------------------------------------------------------------------------


def table_rows() -> list[Any]:
    folder = ROOT / "python/attnforge/tuning/tables"
    return [
        pytest.param(path, row, id=f"{path.stem}-{n}")
        for path in sorted(folder.glob("*.json"))
        for n, row in enumerate(store.read(path, shipped=True))
    ]


@pytest.mark.parametrize(("path", "row"), table_rows())
def test_a_row_of_the_package_is_one_that_may_serve(path: Path, row: Entry) -> None:
    """Whatever source it is of: names and values that the kernel has, and no more than is right."""
    (spec,) = (spec for spec in list_kernels() if spec.id == row.spec)
    assert path.name.startswith(f"{spec.op}.")
    assert spec.space is not None
    config = spec.space.config(row.config)
    for name, value in config.items():
        assert value in spec.space.parameters[name]
    how = tuned.operator(spec.op)
    assert how is not None
    assert row.problem.bucket.keys() == set(how.alone)
    assert not how.layouts & set(row.problem.features)
    assert set(row.environment) == {"source", "isa", "processors"}
    assert row.measured["gain_low"] > 1.02
    assert row.measured["least"] > 0.98
    assert row.measured["processes"] >= 2
