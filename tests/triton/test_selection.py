"""Which calls the Triton kernels serve, and what a failing self-test does to that."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import attnforge
from attnforge import _settings
from attnforge._params import FlashParams
from attnforge.backends.triton import _selftest, flash
from attnforge.registry import Request, list_kernels
from attnforge.registry.select import decide
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare
from attnforge.triton_kernels.flash import config

pytestmark = pytest.mark.skipif(
    not _settings.triton_interpreted(), reason="selection is tested with kernels that run anywhere"
)
KINDS = ("fwd", "bwd", "decode", "merge")
OPS = {"fwd": "flash_fwd", "bwd": "flash_bwd", "decode": "flash_decode", "merge": "merge_states"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def request(
    kind: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, d: int = 64
) -> Request:
    return Request(OPS[kind], device, "sm_90", dtype, (("head_dim", d), ("v_head_dim", d)))


@pytest.mark.parametrize("kind", KINDS)
def test_described_gpu_is_served(kind: str) -> None:
    decision = decide(request(kind), "triton")
    assert decision.chosen is not None
    assert decision.chosen.id == f"triton.flash.{kind}"


def test_cpu_only_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(s for s in list_kernels("flash_fwd") if s.backend == "triton")
    assert spec.reasons(request("fwd", "cpu")) == ()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert spec.reasons(request("fwd", "cpu")) == ("needs tensors on cuda; they are on cpu",)


@pytest.mark.parametrize(("d", "dtype", "text"), [
    (60, torch.bfloat16, "head_dim 60 is not served"),
    (264, torch.bfloat16, "head_dim 264 is not served"),
    (64, torch.float64, "dtype float64 is not served"),
])  # fmt: skip
def test_what_is_not_served_has_a_reason(d: int, dtype: torch.dtype, text: str) -> None:
    spec = next(s for s in list_kernels("flash_bwd") if s.backend == "triton")
    assert any(text in reason for reason in spec.reasons(request("bwd", dtype=dtype, d=d)))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_self_test_passes(kind: str, dtype: torch.dtype) -> None:
    assert _selftest.check(kind, dtype, torch.device("cpu")) is None


launch_fwd = flash.fwd


def wrong(*args: Any) -> None:
    """A forward whose output is off by a factor."""
    launch_fwd(*args)
    args[4].mul_(1.1)


def crash(*args: Any) -> None:
    raise RuntimeError("PassManager::run failed")


def silent(*args: Any) -> None:
    """A forward that writes nothing, into memory that the tests poison."""


@pytest.mark.parametrize(("launch", "text"), [
    (wrong, "off by 0."), (silent, "off by inf"), (crash, "RuntimeError: PassManager::run failed"),
])  # fmt: skip
def test_failing_self_test_routes_around_the_kernel(
    monkeypatch: pytest.MonkeyPatch, launch: Any, text: str
) -> None:
    monkeypatch.setattr(_selftest, "_on_gpu", lambda request: request.arch == "sm_90")
    monkeypatch.setattr(_selftest, "_VERDICTS", {})
    on_cpu = partial(_selftest.check, device=torch.device("cpu"))
    monkeypatch.setattr(_selftest, "check", lambda kind, dtype, device: on_cpu(kind, dtype))
    monkeypatch.setattr(flash, "fwd", launch)
    with pytest.warns(
        RuntimeWarning, match="triton.flash.fwd is not used: its self-test in float16"
    ):
        decision = decide(request("fwd", dtype=torch.float16), None)
    assert decision.chosen is not None
    assert decision.chosen.backend == "reference"
    reasons = {spec.id: " ".join(why) for spec, why in decision.rejected}
    assert text in reasons["triton.flash.fwd"]
    again = decide(
        request("fwd", dtype=torch.float16), "triton"
    )  # one test per process: no warning
    assert again.chosen is None
    assert "self-test" in str(again.error)


def test_whole_call_by_name() -> None:
    inputs = FlashCase(seqlen_q=5, seqlen_k=9, dtype=torch.float16).make()
    with attnforge.backend("triton"):
        got = inputs.run()
    compare(got, inputs.truth(rounded=True), inputs.context).check()


ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
SHAPES = [
    config.Shape(arch, size, width, heavy)
    for arch in ARCHS
    for size in (2, 4)
    for width in (16, 64, 128, 256)
    for heavy in (False, True)
]


@pytest.mark.parametrize("kernel", config.SPACE)
def test_shipped_tiles_fit_and_are_known_to_a_tuner(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.undo()
    for shape in SHAPES:
        tile = config.choose(kernel, shape)
        assert config.fits(kernel, tile, shape), (shape, tile)
        assert tile.keys() == config.SPACE[kernel].keys()
        for name, value in tile.items():
            assert value in config.SPACE[kernel][name], (shape, name)
        assert kernel != "decode" or 2048 % tile["BLOCK_N"] == 0


def test_a_tuner_may_choose_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # The space of each launcher: defaults are the table's, configs reach the kernels by content.
    monkeypatch.undo()
    for kind, names in {"fwd": 4, "bwd": 8, "decode": 4}.items():
        spec = next(s for s in list_kernels(OPS[kind]) if s.backend == "triton")
        asked = request(kind)
        default = spec.space.default(asked)
        assert len(default) == names
        assert spec.space.reasons(default, asked) == ()
        big = spec.space.config({n: max(v) for n, v in spec.space.parameters.items()})
        wide = replace(request(kind, d=256), dtype=torch.float32)
        assert "does not fit the shared memory of sm_90" in spec.space.reasons(big, wide)[0]
    heavy = replace(request("fwd"), features=frozenset({"bias"}))
    spec = next(s for s in list_kernels("flash_fwd") if s.backend == "triton")
    assert spec.space.default(heavy) != spec.space.default(request("fwd"))


def test_configs_change_the_tiles_and_not_the_answer() -> None:
    inputs = FlashCase(seqlen_q=40, seqlen_k=70, causal=True, lse_grad=False).make()
    q, k, v = inputs.q, inputs.k, inputs.v
    p = FlashParams(None, None, None, None, None, 40, 70, 0.25, -1, 0, 0.0)
    want = inputs.truth(rounded=True)
    spec = next(s for s in list_kernels("flash_fwd") if s.backend == "triton")
    for rows, keys in ((16, 64), (64, 32)):
        tile = {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": 1}
        out, lse = torch.full(q.shape, math.nan), torch.full((2, 2, 40), math.nan)
        launch = spec.resolve(spec.space.config(tile))
        launch(q, k, v, p, out, lse, q.new_empty(0))
        compare({"out": out, "lse": lse}, want, str(tile)).check()
