"""The self-test at first use: right kernels pass it, wrong ones are routed around, by features."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnforge import _native_cuda
from attnforge._params import FLOAT8
from attnforge.backends import _selftest as shared
from attnforge.backends import _selftest_block_sparse, _selftest_linear, _selftest_paged
from attnforge.backends._selftest_delta import GROUPS as DELTA_GROUPS
from attnforge.backends.cuda import flash
from attnforge.backends.cuda._selftest import CUDA
from attnforge.registry import Request, list_kernels
from attnforge.registry.select import Decision, decide

CPU = torch.device("cpu")
OPS = {"fwd": "flash_fwd", "bwd": "flash_bwd", "decode": "flash_decode", "merge": "merge_states"}
SOFTCAP = "softcap, ALiBi and used keys"


def test_every_kernel_has_one() -> None:
    kernels = [spec for spec in list_kernels() if spec.backend == "cuda"]
    assert {spec.op for spec in kernels} >= set(OPS.values())
    for spec in kernels:
        (test,) = (need for need in spec.requires if isinstance(need, shared.SelfTest))
        assert isinstance(spec.launch, str)
        module, _, name = spec.launch.partition(":")
        assert (test.backend, test.launcher) == (CUDA, name), spec.id
        assert module.endswith(f".{test.kernel.partition('.')[0]}")


# Denominators and the non-causal form are not CUDA's.
LINEAR_GROUPS = [
    name for name in _selftest_linear.GROUPS if name not in ("a denominator", "both directions")
]


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("kind", "group", "dtype"),
    [
        *((kind, "", torch.float16) for kind in OPS),
        ("fwd", "", torch.float32),
        ("bwd", SOFTCAP, torch.bfloat16),
        ("decode", SOFTCAP, torch.float32),
        ("fwd", "packed sequences", torch.bfloat16),
        ("bwd", "packed sequences", torch.float16),
    ],
)
def test_right_kernels_pass(kind: str, group: str, dtype: torch.dtype) -> None:
    assert shared.check(CUDA, f"flash.{kind}", group, dtype, CPU) is None


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("group", ["", SOFTCAP, "packed sequences"])
def test_the_right_backward_for_sm90a_passes(group: str) -> None:
    assert shared.check(CUDA, "flash.bwd", group, torch.bfloat16, CPU, "bwd_sm90") is None


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("kind", "group", "dtype", "launcher"),
    [
        ("latent_decode", "", torch.bfloat16, "decode_sm90"),
        ("latent_decode", SOFTCAP, torch.float16, "decode_sm90"),
        ("fwd", "", FLOAT8, "fwd_fp8_sm90"),
        ("fwd", "packed sequences", FLOAT8, "fwd_fp8_sm90"),
        ("fwd", SOFTCAP, FLOAT8, "fwd_fp8_sm90"),
    ],
)
def test_right_kernels_for_sm90a_pass(
    kind: str, group: str, dtype: torch.dtype, launcher: str
) -> None:
    assert shared.check(CUDA, f"flash.{kind}", group, dtype, CPU, launcher) is None


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("kind", "group"),
    [
        *(("fwd", group) for group in ["", *list(_selftest_paged.GROUPS)[:7]]),
        ("cascade", ""),
        ("cascade", "packed rows and lengths per head"),
        ("cascade", "int4 pages"),
        *(("append", group) for group in ["", *list(_selftest_paged.GROUPS)[4:]]),
    ],
)
def test_right_kernels_of_pages_pass(kind: str, group: str) -> None:
    assert shared.check(CUDA, f"paged.{kind}", group, torch.float16, CPU) is None


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("group", ["", *LINEAR_GROUPS])
@pytest.mark.parametrize("kind", ["chunk_fwd", "chunk_bwd", "step"])
def test_right_kernels_of_linear_attention_pass(kind: str, group: str) -> None:
    assert shared.check(CUDA, f"linear.{kind}", group, torch.bfloat16, CPU) is None


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        *((f"delta.delta_chunk_{way}", x) for way in ("fwd", "bwd") for x in ("", *DELTA_GROUPS)),
        *(("delta.delta_step", x) for x in ("", "a gate per token", "a gate per key channel")),
        ("scan.diag_scan_fwd", ""),
        ("scan.diag_scan_bwd", ""),
    ],
)
def test_right_kernels_of_delta_rules_and_scans_pass(kernel: str, group: str) -> None:
    assert shared.check(CUDA, kernel, group, torch.float16, CPU) is None


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("kind", "group"),
    [
        *(
            (kind, x)
            for kind in ("indexed_fwd", "key_scores", "page_scores")
            for x in ("", "pages")
        ),
        *((kind, "") for kind in ("indexed_bwd", "select_columns", "lsh_encode", "lsh_retrieve")),
    ],
)
def test_right_retrieval_kernels_pass(kind: str, group: str) -> None:
    assert shared.check(CUDA, f"retrieval.{kind}", group, torch.float16, CPU) is None


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("kind", ["lsh_insert", "lsh_truncate"])
def test_right_kernels_of_tables_pass(kind: str) -> None:
    assert shared.check(CUDA, f"retrieval.{kind}", "", torch.int16, CPU) is None


@pytest.mark.parametrize("group", ["", *_selftest_block_sparse.GROUPS])
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_right_block_sparse_kernels_pass(kind: str, group: str) -> None:
    assert shared.check(CUDA, f"block_sparse.{kind}", group, torch.float16, CPU) is None


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for sm_80 are of this machine's GPU, whose problems run here."""
    check = shared.check
    monkeypatch.setattr(_native_cuda, "_state", [None])
    monkeypatch.setattr(_native_cuda, "build", lambda: {"kernels": ""})
    monkeypatch.setattr(CUDA, "ready", lambda request: request.arch == "sm_80")
    monkeypatch.setattr(CUDA, "version", lambda: "CUDA 99.1 and a driver for CUDA 99.2")
    monkeypatch.setattr(shared, "_VERDICTS", {})
    monkeypatch.setattr(shared, "check", lambda *what: check(*what[:4], CPU, what[5]))


def choose(op: str, backend: str | None = "cuda", features: tuple[str, ...] = ()) -> Decision:
    dims = (("head_dim", 64), ("v_head_dim", 64))
    return decide(Request(op, "cuda", "sm_80", torch.float16, dims, frozenset(features)), backend)


def why(decision: Decision, op: str) -> str:
    return next(
        " ".join(r)
        for spec, r in decision.rejected
        if spec.op == op and spec.id.startswith("cuda.") and spec.id.endswith(".sm80")
    )


def silent(*_: Any) -> None:
    """A launcher that writes nothing, into memory that the tests poison."""


def crash(*_: Any) -> None:
    raise RuntimeError("the driver has no code for this GPU")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize(("launch", "text"), [(silent, "off by inf"), (crash, "has no code")])
def test_a_failing_kernel_is_routed_around(
    monkeypatch: pytest.MonkeyPatch, kind: str, launch: Any, text: str
) -> None:
    monkeypatch.setattr(flash, kind, launch)
    with pytest.warns(RuntimeWarning, match=rf"cuda\.flash\.{kind} is not used: its self-test in "):
        decision = choose(OPS[kind])
    assert decision.chosen is None
    assert "failed with CUDA 99.1 and a driver for CUDA 99.2" in why(decision, OPS[kind])
    assert text in why(decision, OPS[kind])
    other = choose(OPS[kind], None)  # one test per process: no warning
    assert other.chosen is not None
    assert other.chosen.backend != "cuda"


@pytest.mark.usefixtures("on_gpu", "twin")
def test_a_failing_feature_takes_its_own_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softcap is forgotten: calls with it or what is tested beside it go elsewhere."""
    right = flash.decode

    def forgets(q: Any, k: Any, v: Any, p: Any, *rest: Any) -> None:
        right(q, k, v, p._replace(softcap=0.0), *rest)

    monkeypatch.setattr(flash, "decode", forgets)
    plain = choose("flash_decode", features=("window_left", "sinks"))
    assert plain.chosen is not None
    assert plain.chosen.id == "cuda.flash.decode.sm80"
    with pytest.warns(RuntimeWarning, match=f"is not used for calls with {SOFTCAP}"):
        capped = choose("flash_decode", features=("alibi",))
    assert capped.chosen is None
    assert f"of {SOFTCAP} in float16" in why(capped, "flash_decode")


def test_nothing_runs_where_there_is_no_such_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Described GPUs, and a library that is missing: no self-test, and no reason of its own."""
    monkeypatch.setattr(shared, "check", lambda *what: pytest.fail("a self-test ran"))
    request = Request("flash_fwd", "cuda", "sm_80", torch.float16, (("head_dim", 64),))
    test = next(n for n in flash.SPECS[0].requires if isinstance(n, shared.SelfTest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert test(request) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert test(request) is None  # another GPU is described
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(_native_cuda, "_state", ["it is not built"])
    assert test(request) is None
    monkeypatch.setattr(_native_cuda, "_state", [None])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert test(request) is None
    ran = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(shared, "_VERDICTS", {})
    monkeypatch.setattr(shared, "check", lambda *what: ran.append(what[1]))
    assert test(request) is None
    assert ran == ["flash.fwd"]
