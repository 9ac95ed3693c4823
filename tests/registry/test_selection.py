"""The registry: order of choice, forced choices, explanations, and a kernel added in two edits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.registry import override, unregister
from attnforge.registry.predicates import Device, Dtypes, Features

REFERENCE = "reference.flash.fwd"


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 5, 4, 8).to(dtype),
        torch.randn(2, 6, 2, 8).to(dtype),
        torch.randn(2, 6, 2, 8).to(dtype),
    )


def chosen(*args: Any, **options: Any) -> str:
    return attnforge.explain(attnforge.flash_attention, *args, **options).chosen.id


def toy(q: Tensor, k: Tensor, v: Tensor, p: Any, out: Tensor, lse: Tensor, out_lo: Tensor) -> None:
    """Edit one of two: a kernel. It answers 7 to everything."""
    out.fill_(7.0)
    lse.zero_()


@pytest.fixture
def toy_spec() -> Iterator[attnforge.KernelSpec]:
    """Edit two of two: its KernelSpec."""
    spec = attnforge.register(
        attnforge.KernelSpec(
            id="toy.flash.fwd",
            op="flash_fwd",
            backend="toy",
            launch=toy,
            requires=(Device("cpu"), Dtypes(torch.float32), Features("window_right")),
            score=500.0,
            deterministic=False,
        )
    )
    yield spec
    unregister("toy.flash.fwd")


def test_argument_beats_context_beats_environment_beats_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = inputs()
    by_score = chosen(q, k, v)
    assert by_score.startswith("cpu.")
    monkeypatch.setenv("ATTNFORGE_BACKEND", "reference")
    assert chosen(q, k, v) == REFERENCE
    with attnforge.backend("cpu"):
        assert chosen(q, k, v) == by_score
        assert chosen(q, k, v, backend="reference") == REFERENCE
    assert chosen(q, k, v) == REFERENCE
    monkeypatch.delenv("ATTNFORGE_BACKEND")
    assert chosen(q, k, v) == by_score


def test_the_choice_changes_what_runs() -> None:
    q, k, v = inputs(torch.float64)
    with pytest.raises(ValueError, match="float64"):
        attnforge.flash_attention(q, k, v, backend="cpu")
    assert chosen(q, k, v) == REFERENCE  # the only one that serves float64


def test_one_operator_may_be_forced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    monkeypatch.setenv("ATTNFORGE_BACKEND", "flash_fwd=reference,*=cpu")
    assert chosen(q, k, v) == REFERENCE
    decode = attnforge.explain(attnforge.flash_decode, q, k, v)
    assert decode.chosen.id.startswith("cpu.")


@pytest.mark.parametrize("choice", ["nonsense", "cpu,x", "flash_fwd=", "flash_wd=cpu"])
def test_an_unknown_choice_is_an_error_and_no_fallback(choice: str) -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"attnforge"):
        attnforge.flash_attention(q, k, v, backend=choice)


def test_a_forced_kernel_that_cannot_serve_says_why() -> None:
    q, k, v = inputs(torch.float64)
    with pytest.raises(ValueError, match=r"cpu\.flash\.fwd") as caught:
        attnforge.flash_attention(q, k, v, backend="cpu")
    text = str(caught.value)
    assert "float64" in text
    assert "reference" in text  # who would serve


def test_contexts_nest_and_restore() -> None:
    outer, inner = attnforge.backend("reference"), attnforge.backend("cpu")
    with outer:
        with inner:
            assert override.current == "cpu"
        assert override.current == "reference"
        with attnforge.backend(None):
            assert override.current is None
        with pytest.raises(RuntimeError), inner:
            raise RuntimeError
        assert override.current == "reference"
    assert override.current is None


@pytest.mark.plain_memory  # the toy is not deterministic, which the poison's mode would reject
def test_toy_kernel_in_two_edits_serves_the_next_call(toy_spec: attnforge.KernelSpec) -> None:
    q, k, v = inputs()
    assert chosen(q, k, v) == toy_spec.id
    assert bool((attnforge.flash_attention(q, k, v) == 7).all())
    assert toy_spec in attnforge.list_kernels("flash_fwd")
    # Its requirements hold it back: it declares no softcap.
    assert not bool((attnforge.flash_attention(q, k, v, softcap=1.0) == 7).any())
    with pytest.raises(ValueError, match="softcap"):
        attnforge.flash_attention(q, k, v, softcap=1.0, backend="toy")


def test_registering_and_removing_reach_memoised_choices() -> None:
    q, k, v = inputs()
    before = attnforge.flash_attention(q, k, v)
    spec = attnforge.KernelSpec(
        id="late.flash.fwd", op="flash_fwd", backend="late", launch=toy, score=900.0
    )
    attnforge.register(spec)
    try:
        assert bool((attnforge.flash_attention(q, k, v) == 7).all())
        with pytest.raises(ValueError, match="late"):
            attnforge.register(spec)
    finally:
        unregister("late.flash.fwd")
    torch.testing.assert_close(attnforge.flash_attention(q, k, v), before, rtol=0, atol=0)


@pytest.mark.plain_memory
def test_deterministic_mode_rejects_a_kernel_that_is_not(toy_spec: attnforge.KernelSpec) -> None:
    q, k, v = inputs()
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(q, k, v) != toy_spec.id
        with pytest.raises(ValueError, match="determinis"):
            attnforge.flash_attention(q, k, v, backend="toy")
    finally:
        torch.use_deterministic_algorithms(False)


def test_explain_names_every_rejected_kernel_with_reasons() -> None:
    q, k, v = inputs(torch.float64)
    report = attnforge.explain(attnforge.flash_attention, q, k, v)
    rejected = report.to_dict()["decisions"][0]["rejected"]
    assert any("float64" in reason for reason in rejected["cpu.flash.fwd"])
    assert "cpu.flash.fwd" in str(report)


def test_explain_speaks_of_devices_that_are_not_here() -> None:
    shapes = ((1, 4096, 32, 128), (1, 4096, 8, 128), (1, 4096, 8, 128))
    report = attnforge.explain(
        attnforge.flash_attention, *shapes, dtype="bf16", device="cuda:sm_90", causal=True
    )
    assert report.chosen.id == "triton.flash.fwd"
    assert "cpu.flash.fwd" in str(report)


def test_every_listed_kernel_states_what_it_serves() -> None:
    kernels = attnforge.list_kernels()
    ids = [spec.id for spec in kernels]
    assert len(set(ids)) == len(ids)
    for backend in ("reference", "cpu", "triton"):
        served = {spec.op for spec in kernels if spec.backend == backend}
        assert {"flash_fwd", "flash_bwd", "flash_decode", "merge_states"} <= served
    assert all(spec.requires for spec in kernels)


def test_selection_from_many_threads_at_once() -> None:
    q, k, v = inputs()
    want = attnforge.flash_attention(q, k, v)
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(50):
            results.append(attnforge.flash_attention(q, k, v))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 400
    assert all(torch.equal(result, want) for result in results)
