"""Which calls the Triton kernels serve, and with which tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import attnforge
from attnforge import _settings
from attnforge._params import FlashParams
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
    for width in (16, 64, 128, 256, 512)
    for heavy in (False, True)
]


@pytest.mark.parametrize("kernel", config.SPACE)
def test_shipped_tiles_fit_and_are_known_to_a_tuner(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.undo()
    for shape in SHAPES:
        if shape.width > 256 and kernel not in ("fwd", "decode"):
            continue
        tile = config.choose(kernel, shape)
        assert config.fits(kernel, tile, shape), (shape, tile)
        assert tile.keys() == config.SPACE[kernel].keys()
        for name, value in tile.items():
            assert value in config.SPACE[kernel][name], (shape, name)
        assert kernel != "decode" or 2048 % tile["BLOCK_N"] == 0


def test_a_tuner_may_choose_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # The space of each launcher: defaults are the table's, configs reach the kernels by content.
    monkeypatch.undo()
    for kind, names in {"fwd": 5, "bwd": 8, "decode": 4}.items():
        spec = next(s for s in list_kernels(OPS[kind]) if s.backend == "triton")
        asked = request(kind)
        default = spec.space.default(asked)
        assert len(default) == names
        assert spec.space.reasons(default, asked) == ()
        big = spec.space.config({n: max(v) for n, v in spec.space.parameters.items()})
        wide = replace(request(kind, d=256), dtype=torch.float32)
        assert "is too large for, or unknown to, sm_90" in spec.space.reasons(big, wide)[0]
    heavy = replace(request("fwd"), features=frozenset({"bias"}))
    spec = next(s for s in list_kernels("flash_fwd") if s.backend == "triton")
    assert spec.space.default(heavy) != spec.space.default(request("fwd"))


def test_descriptors_are_for_those_who_have_them() -> None:
    spec = next(s for s in list_kernels("flash_fwd") if s.backend == "triton")
    boxed = spec.space.config({**spec.space.default(request("fwd")), "USE_TMA": 1})
    assert spec.space.reasons(boxed, request("fwd")) == ()
    ampere = replace(request("fwd"), arch="sm_80")
    assert "unknown to, sm_80" in spec.space.reasons(boxed, ampere)[0]


def test_configs_change_the_tiles_and_not_the_answer() -> None:
    inputs = FlashCase(seqlen_q=40, seqlen_k=70, causal=True, lse_grad=False).make()
    q, k, v = inputs.q, inputs.k, inputs.v
    p = FlashParams(None, None, None, None, None, 40, 70, 0.25, -1, 0, 0.0)
    want = inputs.truth(rounded=True)
    spec = next(s for s in list_kernels("flash_fwd") if s.backend == "triton")
    for rows, keys in ((16, 64), (64, 32)):
        tile = {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": 1, "USE_TMA": 0}
        out, lse = torch.full(q.shape, math.nan), torch.full((2, 2, 40), math.nan)
        launch = spec.resolve(spec.space.config(tile))
        launch(q, k, v, p, out, lse, q.new_empty(0))
        compare({"out": out, "lse": lse}, want, str(tile)).check()
