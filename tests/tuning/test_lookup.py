"""Results at a call: exact before shipped before near before default, and only where they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnforge
from attnforge import tuning
from attnforge.registry import KernelSpec, Request, tuned
from attnforge.registry.select import Decision, decide, launcher
from attnforge.tuning import lookup, store
from attnforge.tuning.device import device_name, environment
from attnforge.tuning.entry import Entry, Problem

Add = Callable[..., KernelSpec]


def put(spec: KernelSpec, request: Request, mode: str, **changes: Any) -> Entry:
    """A result in the user's cache."""
    entry = made(spec, request, mode, **changes)
    device = device_name(request)
    assert device is not None
    store.merge(request.op, device, [entry])
    tuned.refresh()
    return entry


def made(spec: KernelSpec, request: Request, mode: str, **changes: Any) -> Entry:
    measured = {"date": "2026-01-31", "gain": 1.12}
    entry = Entry(spec.id, Problem.of(request), environment(spec), {"mode": mode}, {}, measured)
    return replace(entry, **changes)


def mode(request: Request) -> str:
    config = decide(request, None).config
    assert config is not None
    return str(config["mode"])


def test_bucket() -> None:
    assert tuned.bucket({"batch": 2, "rows": 1000, "heads": 3}) == {"rows": 1024, "pairs": 8}
    assert tuned.bucket({"rows": 1024, "batch": 1, "heads": 1}) == {"rows": 1024, "pairs": 1}
    assert tuned.bucket({"rows": 1025, "batch": 0, "heads": 1}) == {"rows": 2048, "pairs": 1}
    assert tuned.bucket({"rows": 0}) == {"rows": 1, "pairs": 1}


def test_default_with_its_reason_where_nothing_is_known(toy: Any, add: Add) -> None:
    add("good")
    decision = decide(toy.request(), None)
    assert decision.config == attnforge.Config({"mode": "plain"})
    assert decision.config_source == "default: it is plain"
    assert decision.source == "score"


def test_a_result_serves_its_bucket(toy: Any, add: Add) -> None:
    spec = add("good")
    put(spec, toy.request(100), "good")
    for rows in (65, 100, 128):
        assert mode(toy.request(rows)) == "good"
    said = decide(toy.request(100), None).config_source
    assert said == "tuned: user cache, bucket rows=128 pairs=8, 2026-01-31, x1.12 over default"
    other = replace(toy.request(), dtype=torch.bfloat16)
    assert mode(other) == "plain"
    assert mode(replace(toy.request(), dims=(("head_dim", 16),))) == "plain"
    assert mode(replace(toy.request(), features=frozenset({"window"}))) == "plain"
    assert mode(replace(toy.request(), sizes=())) == "plain"  # nobody said how large


def test_order(toy: Any, add: Add, ship: Any) -> None:
    """User cache, its nearest bucket, shipped table, default."""
    spec = add("near", "shipped", "mine")
    assert mode(toy.request(100)) == "plain"
    ship(spec, toy.request(), {"mode": "shipped"})
    assert mode(toy.request(100)) == "shipped"
    said = decide(toy.request(100), None).config_source
    assert said == "tuned: shipped table, bucket heads=4, 2026-01-31, x1.12 over default"
    put(spec, toy.request(250), "near")
    assert mode(toy.request(100)) == "near"
    put(spec, toy.request(100), "mine")
    assert mode(toy.request(100)) == "mine"
    assert mode(toy.request(10_000)) == "shipped"


def test_nearest_bucket(toy: Any, add: Add) -> None:
    spec = add("small", "large")
    put(spec, toy.request(128), "small")
    put(spec, toy.request(4096), "large")
    found = {rows: mode(toy.request(rows)) for rows in (16, 32, 256, 512, 1024, 8192, 16384, 32768)}
    assert found == {
        16: "plain",  # 8 times away
        32: "small", 256: "small", 512: "small",
        1024: "large", 8192: "large", 16384: "large",
        32768: "plain",
    }  # fmt: skip
    assert "nearest bucket rows=128" in decide(toy.request(256), None).config_source


def test_environment_must_be_the_same(toy: Any, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source, versions and the kernel's own keys."""
    state = {"digest": "one", "threads": 2}
    space = toy.space("good", source=lambda: str(state["digest"]),
                      environment=lambda: {"threads": state["threads"]})  # fmt: skip
    spec = add(space=space)
    put(spec, toy.request(), "good")
    assert mode(toy.request()) == "good"
    for name, other in (("digest", "two"), ("threads", 4)):
        before, state[name] = state[name], other
        assert mode(toy.request()) == "plain", name
        state[name] = before
    assert mode(toy.request()) == "good"

    monkeypatch.setattr(torch, "__version__", "9.9")
    assert mode(toy.request()) == "plain"
    other = made(spec, toy.request(), "good")
    then = {**other.environment, "torch": "2.10"}
    assert lookup.foreign(replace(other, environment=then), environment(spec)) == {
        "torch": "2.10, now 9.9"
    }


def test_source_of_the_launcher_counts_without_a_digest_of_its_own(toy: Any, add: Add) -> None:
    digest = environment(add("good"))["source"]
    assert isinstance(digest, str)
    assert len(digest) == 16
    by_name = replace(toy.spec("good"), launch="attnforge.backends.reference.flash:fwd")
    assert environment(by_name)["source"] not in (digest, "unknown")


@pytest.mark.parametrize(
    "config", [{"mode": "gone"}, {"mode": True}, {"tile": 3}, {}, {"mode": "good", "more": 1}]
)
def test_a_config_the_kernel_does_not_know_is_not_used(toy: Any, add: Add, config: Any) -> None:
    put(add("good"), toy.request(), "good", config=config)
    assert mode(toy.request()) == "plain"


def test_a_config_that_a_constraint_excludes_is_not_used(toy: Any, add: Add) -> None:
    put(add("good"), toy.request(), "good")
    space = toy.space("good", constraints=[lambda config, request: "not any more"])
    attnforge.register(replace(toy.spec("good"), space=space), replace=True)
    assert mode(toy.request()) == "plain"


def launch(toy: Any, rows: int, backend: str | None = None) -> str:
    """The mode that a call of this size runs with, through the hot path."""
    x = torch.ones(1, 8)
    describe = lambda op, metadata: replace(toy.request(), sizes=())  # noqa: E731
    launcher("toy_scan", ("meta",), describe, backend, 2, 3, rows)(x, x.clone())
    mode: str = toy.ran[-1]
    return mode


def test_calls_look_at_sizes_only_once_there_are_results(toy: Any, add: Add) -> None:
    spec = add("good")
    assert launch(toy, 100) == "plain"
    assert "toy_scan" not in tuned.active
    put(spec, toy.request(100), "good")
    assert launch(toy, 100) == "good"
    assert "toy_scan" in tuned.active
    assert launch(toy, 100_000) == "plain"
    assert launch(toy, 128) == "good"


def test_a_call_that_shows_no_sizes_gets_the_default(toy: Any, add: Add) -> None:
    put(add("good"), toy.request(100), "good")
    assert launch(toy, 100) == "good"
    x = torch.ones(1, 8)
    describe = lambda op, metadata: replace(toy.request(), sizes=())  # noqa: E731
    launcher("toy_scan", ("meta",), describe, None)(x, x.clone())
    assert toy.ran[-1] == "plain"


def test_a_kernel_that_cannot_run_is_not_asked_for_its_environment(toy: Any, add: Add) -> None:
    """Its library may be what is missing, and what would have to tell."""
    here = [True]

    def isa() -> dict[str, str]:
        if not here[0]:
            raise RuntimeError("no library")
        return {"isa": "wide"}

    space = toy.space("good", environment=isa)
    spec = add(space=space, requires=(lambda request: None if here[0] else "no library",))
    other = add("slow", id="other.scan", score=-5.0)
    put(spec, toy.request(100), "good")
    assert decide(toy.request(100), None).chosen is spec
    here[0] = False
    tuned.refresh()
    assert decide(toy.request(100), None).chosen is other


def test_the_call_that_finds_the_first_results_is_traced_once(
    toy: Any, add: Add, tmp_path: Path
) -> None:
    put(add("good"), toy.request(100), "good")
    with attnforge.trace_shapes(tmp_path / "trace"):
        assert launch(toy, 100) == "good"
    ((_, count),) = tuning.read_trace(tmp_path / "trace")
    assert count == 1


def test_an_untuned_call_reads_no_sizes_and_no_file(
    toy: Any, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an untuned call pays: no look at sizes, one key, one look-up."""
    add("good")

    def read(*sizes: int) -> tuple[int, ...]:
        raise AssertionError("sizes were read")

    tuned.sized("toy_scan", tuned.Sized(("batch", "heads", "rows"), read, "", ""))
    assert launch(toy, 100) == "plain"
    monkeypatch.setattr(store, "read", lambda *args, **kw: pytest.fail("a file was read"))
    monkeypatch.setattr(tuned, "activate", lambda *args: pytest.fail("selection ran again"))
    assert launch(toy, 200) == "plain"


def test_number_of_threads_is_part_of_a_tuned_choice(toy: Any, add: Add) -> None:
    space = toy.space("good", environment=lambda: {"threads": torch.get_num_threads()})
    put(add(space=space), toy.request(100), "good")
    before = torch.get_num_threads()
    assert launch(toy, 100) == "good"
    torch.set_num_threads(before + 1)
    assert launch(toy, 100) == "plain"
    torch.set_num_threads(before)
    assert launch(toy, 100) == "good"


def two(toy: Any, add: Add) -> tuple[KernelSpec, KernelSpec]:
    return add("a", id="toy.scan", score=10.0), add("b", id="rival.scan", score=5.0)


def decision(toy: Any, backend: str | None = None) -> Decision:
    return decide(toy.request(), backend)


def test_a_measured_kernel_beats_the_score_and_nothing_else(
    toy: Any, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """argument > context manager > ATTNFORGE_BACKEND > tuned table > score."""
    first, rival = two(toy, add)
    assert decision(toy).chosen is first
    put(rival, toy.request(), "b", over={first.id: str(environment(first)["source"])})
    found = decision(toy)
    assert found.chosen is rival
    assert (found.source, found.config and found.config["mode"]) == ("tuned table", "b")
    assert dict(found.rejected)[first] == ("rival.scan was measured to be faster at these sizes",)
    assert launch(toy, 100) == "b"
    monkeypatch.setenv("ATTNFORGE_BACKEND", "toy_scan=toy")
    assert (decision(toy).chosen, decision(toy).source) == (first, "ATTNFORGE_BACKEND")
    with attnforge.backend("toy"):
        assert launch(toy, 100, "toy") == "plain"
    assert decision(toy, "rival").source == "argument"
    assert decision(toy, "rival").config == attnforge.Config({"mode": "b"})  # still its own


def test_a_victory_over_other_source_does_not_count(toy: Any, add: Add) -> None:
    first, rival = two(toy, add)
    put(rival, toy.request(), "b", over={first.id: "another digest"})
    assert decision(toy).chosen is first
    put(rival, toy.request(), "b", over={"toy.gone": "x"})
    assert decision(toy).chosen is first


def test_a_preferred_kernel_that_cannot_serve_is_not_taken(toy: Any, add: Add) -> None:
    first, rival = two(toy, add)
    put(rival, toy.request(), "b", over={first.id: str(environment(first)["source"])})
    attnforge.register(
        replace(rival, requires=(lambda request: "not today",)), replace=True
    )  # fmt: skip
    assert decision(toy).chosen is first


def test_tuning_finds_the_faster_kernel(toy: Any, add: Add) -> None:
    two(toy, add)
    toy.costs = {"a": 1e-3, "b": 0.5e-3}
    report = attnforge.tune("toy")
    assert [(o.spec, o.preferred) for o in report.outcomes[:2]] == [
        ("toy.scan", False), ("rival.scan", True)]  # fmt: skip
    assert decision(toy).source == "tuned table"


def test_explain_shows_config_and_origin(cache: Path) -> None:
    """Through the public function, with a toy kernel of a real operator."""
    space = attnforge.SearchSpace({"tile": [16, 32]}, {"tile": 16}, "16 fits anything")
    spec = attnforge.register(
        attnforge.KernelSpec("toy.flash.fwd", "flash_fwd", "toy", lambda *a, config: None,
                             score=900.0, space=space)
    )  # fmt: skip
    try:
        shapes = ((1, 100, 4, 8),) * 3
        report = attnforge.explain(attnforge.flash_attention, *shapes)
        assert "    config: tile=16 (default: 16 fits anything)\n" in str(report)
        request = report.decisions[0].request
        assert dict(request.sizes) == {
            "batch": 1, "seqlen_q": 100, "seqlen_k": 100, "heads": 4, "window": 0}  # fmt: skip
        put(spec, request, "", config={"tile": 32})
        report = attnforge.explain(attnforge.flash_attention, *shapes)
        assert (
            "    config: tile=32 (tuned: user cache, bucket seqlen_q=128 seqlen_k=128 window=1 "
            "pairs=4, 2026-01-31, x1.12 over default)\n" in str(report)
        )
        first = report.to_dict()["decisions"][0]
        assert (first["config"], first["sizes"]["seqlen_q"]) == ({"tile": 32}, 100)
        assert first["config_source"].startswith("tuned: user cache")
        absent = attnforge.explain(attnforge.flash_attention, *shapes, device="cuda:sm_90")
        assert absent.decisions[0].config == attnforge.Config({"tile": 16})
    finally:
        attnforge.registry.unregister("toy.flash.fwd")
