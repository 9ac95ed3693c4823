"""The self-test at first use: right kernels pass it, wrong ones are routed around, by features.

What is wrong in a test is a reference launcher in the kernel's place: right but for one thing, and
without the interpreter's minutes.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch

from attnforge import _settings
from attnforge.backends import _selftest as shared
from attnforge.backends import (
    _selftest_block_sparse,
    _selftest_flash,
    _selftest_linear,
    _selftest_paged,
)
from attnforge.backends.triton import (
    _selftest,
    block_sparse,
    cope,
    delta,
    flash,
    linear,
    nsa,
    paged,
    reductions,
    retrieval,
    scan,
)
from attnforge.registry import Request, list_kernels
from attnforge.registry.select import Decision, decide

pytestmark = pytest.mark.skipif(
    not _settings.triton_interpreted(), reason="self-tests are tested where kernels run anywhere"
)
CPU = torch.device("cpu")
KERNELS = [spec for spec in list_kernels() if spec.backend == "triton"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.id)
def test_right_kernels_pass(spec: Any) -> None:
    (test,) = (need for need in spec.requires if isinstance(need, _selftest.SelfTest))
    assert _selftest.check(test.kernel, "", torch.bfloat16, CPU) is None


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["bwd", "decode", "merge"])
def test_right_kernels_pass_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    assert _selftest.check(f"flash.{kind}", "", dtype, CPU) is None


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("kind", "group"),
    [
        (kind, group)
        for kind in ("fwd", "bwd", "decode")
        for group in _selftest_flash.GROUPS
        if (kind, group) != ("decode", "packed sequences")
    ],
)
def test_right_kernels_pass_with_features(kind: str, group: str) -> None:
    assert _selftest.check(f"flash.{kind}", group, torch.float16, CPU) is None


@pytest.mark.parametrize("group", _selftest_block_sparse.GROUPS)
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_right_block_sparse_kernels_pass_with_features(kind: str, group: str) -> None:
    assert _selftest.check(f"block_sparse.{kind}", group, torch.float16, CPU) is None


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("kind", "group"),
    [
        *(("fwd", group) for group in list(_selftest_paged.GROUPS)[:7]),
        ("cascade", "packed rows and lengths per head"),
        ("cascade", "int4 pages"),
        *(("append", group) for group in list(_selftest_paged.GROUPS)[4:]),
    ],
)
def test_right_kernels_of_pages_pass(kind: str, group: str) -> None:
    assert _selftest.check(f"paged.{kind}", group, torch.float16, CPU) is None


@pytest.mark.parametrize("kind", ["indexed_fwd", "key_scores", "page_scores"])
def test_right_retrieval_kernels_pass_in_pages(kind: str) -> None:
    assert _selftest.check(f"retrieval.{kind}", "pages", torch.float16, CPU) is None


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        *(("linear.chunk_bwd", group) for group in list(_selftest_linear.GROUPS)[:4]),
        ("linear.chunk_fwd", "both directions"),
        ("delta.delta_chunk_bwd", "a gate per token"),
        ("delta.delta_chunk_bwd", "packed sequences"),
        ("scan.diag_scan_bwd", "packed sequences"),
    ],
)
def test_right_linear_kernels_pass_with_features(kernel: str, group: str) -> None:
    assert _selftest.check(kernel, group, torch.float16, CPU) is None


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for sm_90 are of this machine's GPU, whose problems run here."""
    check = shared.check
    monkeypatch.setattr(_selftest.TRITON, "ready", lambda request: request.arch == "sm_90")
    monkeypatch.setattr(shared, "_VERDICTS", {})
    monkeypatch.setattr(shared, "check", lambda *what: check(*what[:4], CPU, what[5]))


def choose(op: str, backend: str | None = None, features: tuple[str, ...] = ()) -> Decision:
    dims = (("head_dim", 64), ("v_head_dim", 64))
    request = Request(op, "cuda", "sm_90", torch.float16, dims, frozenset(features))
    return decide(request, backend)


def why(decision: Decision, kernel: str) -> str:
    return {spec.id: " ".join(reasons) for spec, reasons in decision.rejected}[kernel]


def right(kernel: str) -> Any:
    """The launcher of the reference for ``family.kind``."""
    family, kind = kernel.split(".")
    return getattr(importlib.import_module(f"attnforge.backends.reference.{family}"), kind)


def wrong(launch: Any, place: int, *args: Any, **options: Any) -> None:
    """A launcher one of whose results, the first of a tuple, is off by a factor."""
    launch(*args, **options)
    result = args[place]
    (result if isinstance(result, torch.Tensor) else result[0]).mul_(1.1)


def crash(*_: Any) -> None:
    raise RuntimeError("PassManager::run failed")


def silent(*_: Any) -> None:
    """A launcher that writes nothing, into memory that the tests poison."""


@pytest.mark.parametrize(("launch", "text"), [
    (partial(wrong, right("flash.fwd"), 4), "off by 0."), (silent, "off by inf"),
    (crash, "RuntimeError: PassManager::run failed"),
])  # fmt: skip
@pytest.mark.usefixtures("on_gpu")
def test_a_failing_kernel_is_routed_around(
    monkeypatch: pytest.MonkeyPatch, launch: Any, text: str
) -> None:
    monkeypatch.setattr(flash, "fwd", launch)
    with pytest.warns(RuntimeWarning, match=r"triton\.flash\.fwd is not used: its self-test in f"):
        decision = choose("flash_fwd")
    assert decision.chosen is not None
    assert decision.chosen.backend != "triton"
    assert text in why(decision, "triton.flash.fwd")
    again = choose("flash_fwd", "triton")  # one test per process: no warning
    assert again.chosen is None
    assert "self-test" in str(again.error)


# kernel -> (operator, argument of its launcher that is a result)
PLACES = {
    "flash.bwd": ("flash_bwd", 4),
    "flash.decode": ("flash_decode", 5),
    "flash.merge": ("merge_states", 2),
    "reductions.column_sums": ("reductions_column_sums", 5),
    "reductions.span_mass": ("reductions_span_mass", 5),
    "reductions.span_bwd": ("reductions_span_bwd", 6),
    "reductions.block_max": ("reductions_block_max", 5),
    "reductions.row_entropy": ("reductions_row_entropy", 4),
    "reductions.topk_keys": ("reductions_topk_keys", 5),
    "reductions.edges": ("reductions_edges", 6),
    "reductions.head_gradient": ("reductions_head_gradient", 2),
    "cope.fwd": ("cope_fwd", 5),
    "cope.bwd": ("cope_bwd", 5),
    "block_sparse.fwd": ("block_sparse_fwd", 5),
    "block_sparse.bwd": ("block_sparse_bwd", 5),
    "nsa.importance": ("nsa_importance", 5),
    "paged.fwd": ("paged_fwd", 3),
    "paged.cascade": ("cascade_fwd", 5),
    "paged.append": ("paged_append", 2),
    "linear.chunk_fwd": ("linear_chunk_fwd", 4),
    "linear.chunk_bwd": ("linear_chunk_bwd", 5),
    "linear.step": ("linear_step", 7),
    "delta.delta_chunk_fwd": ("delta_chunk_fwd", 4),
    "delta.delta_chunk_bwd": ("delta_chunk_bwd", 6),
    "delta.delta_step": ("delta_step", 6),
    "retrieval.indexed_fwd": ("indexed_fwd", 4),
    "retrieval.indexed_bwd": ("indexed_bwd", 4),
    "retrieval.key_scores": ("key_scores", 6),
    "retrieval.page_scores": ("page_scores", 8),
    "retrieval.lsh_retrieve": ("lsh_retrieve", 14),
    "scan.diag_scan_fwd": ("diag_scan_fwd", 4),
    "scan.diag_scan_bwd": ("diag_scan_bwd", 6),
}
MODULES = {
    "block_sparse": block_sparse,
    "cope": cope,
    "delta": delta,
    "flash": flash,
    "linear": linear,
    "nsa": nsa,
    "paged": paged,
    "reductions": reductions,
    "retrieval": retrieval,
    "scan": scan,
}


@pytest.mark.parametrize("kernel", PLACES)
@pytest.mark.usefixtures("on_gpu")
def test_every_kernel_is_watched(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    family, kind = kernel.split(".")
    module = MODULES[family]
    op, place = PLACES[kernel]
    monkeypatch.setattr(module, kind, partial(wrong, right(kernel), place))
    with pytest.warns(RuntimeWarning, match=rf"triton\.{kernel} is not used"):
        decision = choose(op)
    assert decision.chosen is not None
    assert decision.chosen.backend != "triton"
    spec = f"triton.{kernel}" if family not in ("delta", "scan") else f"triton.linear.{kind}"
    assert "off by" in why(decision, spec)


@pytest.mark.usefixtures("on_gpu")
def test_a_failing_feature_takes_its_own_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softcap is forgotten: calls with it or what is tested beside it go to the reference."""
    forward = right("flash.fwd")

    def forgets(q: Any, k: Any, v: Any, p: Any, *rest: Any) -> None:
        forward(q, k, v, p._replace(softcap=0.0), *rest)

    monkeypatch.setattr(flash, "fwd", forgets)
    monkeypatch.setattr(flash, "bwd", right("flash.bwd"))
    plain = choose("flash_fwd", features=("window_left", "sinks", "sigmoid"))
    assert plain.chosen is not None
    assert plain.chosen.id == "triton.flash.fwd"
    with pytest.warns(RuntimeWarning, match="is not used for calls with softcap, ALiBi and used k"):
        capped = choose("flash_fwd", features=("softcap",))
    assert capped.chosen is not None
    assert capped.chosen.backend != "triton"
    assert "of softcap, ALiBi and used keys in float16" in why(capped, "triton.flash.fwd")
    backward = choose("flash_bwd", features=("softcap",))
    assert backward.chosen is not None
    assert backward.chosen.id == "triton.flash.bwd"
