"""explain: every function, every kind of argument, text and data."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import attnforge

QKV = ((2, 64, 8, 128), (2, 96, 2, 128), (2, 96, 2, 64))
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], list[str]]] = {
    "attention": (attnforge.flash_attention, QKV, {}, ["flash_fwd", "flash_bwd"]),
    "decode": (attnforge.flash_decode, QKV, {"cache_seqlens": (2,)}, ["flash_decode"]),
    "varlen": (attnforge.flash_attention_varlen, tuple(s[1:] for s in QKV),
               {"cu_seqlens_q": (3,), "cu_seqlens_k": (3,)}, ["flash_fwd", "flash_bwd"]),
    "merge": (attnforge.merge_states, ([(2, 64, 8, 128)] * 3, [(2, 8, 64)] * 3), {},
              ["merge_states"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:sm_90"])
def test_shapes_for_any_device(name: str, device: str) -> None:
    fn, args, options, ops = CALLS[name]
    report = attnforge.explain(fn, *args, dtype="bf16", device=device, **options)
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [d["op"] for d in data["decisions"]] == ops
    for decision in data["decisions"]:
        assert decision["device"] == device.partition(":")[0]
        assert decision["chosen"] is not None
        assert decision["dtype"] == "bfloat16"
        for spec in attnforge.list_kernels(decision["op"]):  # chosen, or rejected with a reason
            assert spec.id == decision["chosen"] or decision["rejected"][spec.id]
            assert spec.id in str(report)
    if device == "cuda:sm_90":
        assert {d["arch"] for d in data["decisions"]} == {"sm_90"}


def test_explain_tells_what_the_call_does(backend: str) -> None:
    # the explained kernel is the one that runs: a forced backend, real tensors, any feature
    q = torch.randn(1, 5, 4, 8)
    used = torch.tensor([3], dtype=torch.int32)
    options = {"causal": True, "seqused_k": used, "softcap": 3.0, "window_size": (2, 0),
               "alibi_slopes": torch.ones(4), "sinks": torch.ones(4)}  # fmt: skip
    report = attnforge.explain(attnforge.flash_attention, q, q, q, backend=backend, **options)
    assert report.chosen is not None
    assert report.chosen.backend == backend
    assert report.source == "argument"
    features = report.to_dict()["decisions"][0]["features"]
    assert features == sorted(
        ["alibi", "seqused_k", "sinks", "softcap", "window_left", "window_right"]
    )
    with attnforge.backend(backend):
        inside = attnforge.explain(attnforge.flash_attention, q, q, q, **options)
    assert inside.source == "context manager"
    assert inside.chosen == report.chosen


def test_a_call_that_nothing_serves() -> None:
    report = attnforge.explain(
        attnforge.flash_attention, *QKV, device="cuda:sm_90", backend="cpu", dtype="fp16"
    )
    assert report.chosen is None
    assert "needs tensors on cpu; they are on cuda" in str(report)
    error = report.decisions[0].error
    assert error is not None
    assert "reference.flash.fwd can: drop the choice" in error


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"dtype": "fp12"}, ValueError, "dtype 'fp12' is not known; want one of fp64"),
        ({"device": "tpu:v4"}, ValueError, "device 'tpu:v4' is not known"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"backend": "cpu,cpu"}, ValueError, "is no kernel choice"),
    ],
)
def test_errors(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        attnforge.explain(attnforge.flash_attention, *QKV, **changes)


def test_foreign_function() -> None:
    with pytest.raises(
        TypeError, match=r"fn must be a public function of attnforge; .*flash_decode"
    ):
        attnforge.explain(torch.matmul, *QKV)


def test_explain_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnforge.registry.spec import KernelSpec

    monkeypatch.setattr(KernelSpec, "resolve", lambda self: pytest.fail("resolved a launcher"))
    huge = (1 << 20, 1 << 20, 64, 128)
    assert attnforge.explain(attnforge.flash_attention, huge, huge, huge).chosen is not None


@pytest.mark.plain_memory
def test_list_is_ordered_and_described() -> None:
    kernels = attnforge.list_kernels()
    assert list(kernels) == sorted(kernels, key=lambda s: (s.op, -s.score, s.id))
    for spec in kernels:
        described = spec.describe()
        assert json.loads(json.dumps(described)) == described
        backend, family, kind = spec.id.split(".")[:3]
        assert spec.backend == backend
        assert family in (
            *("block_sparse", "cope", "flash", "linear", "nsa", "paged", "reductions"),
            "retrieval",
        )
        assert kind in spec.op
        assert callable(spec.resolve())
