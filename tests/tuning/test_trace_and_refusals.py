"""Recording of calls, tuning from a record, and where tuning refuses to run."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import attnforge
from attnforge.tuning import read_trace


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(length: int, **options: Any) -> None:
    x = torch.randn(1, length, 2, 8)
    attnforge.flash_attention(x, x, x, **options)


def test_calls_are_counted_once_per_problem(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "shapes.jsonl"
    with attnforge.trace_shapes(path):
        call(5)
        for _ in range(3):
            call(7, causal=True)
    call(9)
    first, second = rows(path)
    assert first == {
        "op": "flash_fwd", "device": "cpu", "arch": "", "dtype": "float32",
        "dims": {"head_dim": 8, "v_head_dim": 8, "group": 1}, "features": ["window_right"],
        "sizes": {"batch": 1, "seqlen_q": 7, "seqlen_k": 7, "heads": 2, "window": 0}, "count": 3,
    }  # fmt: skip
    assert (second["sizes"]["seqlen_q"], second["count"]) == (5, 1)


def test_every_operator_and_thread_is_seen(tmp_path: Path) -> None:
    def work() -> None:
        q = torch.randn(1, 5, 2, 8, requires_grad=True)
        for _ in range(20):
            out, lse = attnforge.flash_attention(q, q, q, return_lse=True, window_size=(3, 0))
            out.sum().backward()
            attnforge.flash_decode(q[:, :1].detach(), q.detach(), q.detach())
            attnforge.merge_states([out.detach()] * 2, [lse.detach()] * 2)

    path = tmp_path / "shapes.jsonl"
    with attnforge.trace_shapes(path):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = {row["op"]: row["count"] for row in rows(path)}
    assert counts == dict.fromkeys(("flash_fwd", "flash_bwd", "flash_decode", "merge_states"), 80)
    windows = {row["op"]: row["sizes"].get("window") for row in rows(path)}
    assert windows == {"flash_fwd": 4, "flash_bwd": 4, "flash_decode": 0, "merge_states": None}


def test_compiled_calls_are_seen_and_do_not_change(tmp_path: Path) -> None:
    x = torch.randn(1, 6, 2, 8)
    compiled = torch.compile(
        lambda q: attnforge.flash_attention(q, q, q), fullgraph=True, backend="aot_eager"
    )
    before = compiled(x)
    with attnforge.trace_shapes(tmp_path / "shapes.jsonl"):
        assert torch.equal(compiled(x), before)
    (row,) = rows(tmp_path / "shapes.jsonl")
    assert (row["op"], row["count"]) == ("flash_fwd", 1)


def test_a_trace_survives_an_error_and_does_not_nest(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"

    def fail() -> None:
        with attnforge.trace_shapes(path):
            call(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(rows(path)) == 1
    with attnforge.trace_shapes(path), pytest.raises(RuntimeError, match="another trace is open"):
        attnforge.trace_shapes(tmp_path / "other").__enter__()
    with attnforge.trace_shapes(path):  # and is closed again
        pass
    assert rows(path) == []


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    k = torch.randn(2, 9, 2, 8, dtype=torch.bfloat16)
    with attnforge.trace_shapes(path):
        attnforge.flash_attention(k[:, :4].repeat(1, 1, 2, 1), k, k, softcap=3.0)
    ((request, count),) = read_trace(path)
    asked = attnforge.explain(
        attnforge.flash_attention, (2, 4, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), dtype="bf16",
        softcap=3.0,
    ).decisions[0].request  # fmt: skip
    assert count == 1
    assert (request.op, request.dtype, request.dims) == (asked.op, asked.dtype, asked.dims)
    assert (request.features, request.sizes) == (asked.features, asked.sizes)


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"op": 1}', "x"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "shapes.jsonl"
    with attnforge.trace_shapes(path):
        call(5)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*shapes\.jsonl is no record"):
        attnforge.tune("flash", trace=path)


def test_tuning_from_a_trace_takes_the_frequent_first(toy: Any, tmp_path: Path) -> None:
    attnforge.register(toy.spec("good"))
    toy.costs = {"good": 0.5e-3}
    lines = []
    for size, count in ((64, 1), (4096, 9)):
        row = {"op": "toy_scan", "device": "cpu", "arch": "", "dtype": "float32",
               "dims": {"head_dim": 8}, "features": [], "count": count,
               "sizes": {"batch": 1, "heads": 2, "rows": size}}  # fmt: skip
        lines.append(json.dumps(row))
    path = tmp_path / "shapes.jsonl"
    path.write_text("\n".join(lines))
    seen: list[str] = []
    report = attnforge.tune("toy", trace=path, progress=lambda what, done, total: seen.append(what))
    assert seen == ["toy_scan rows=4096 pairs=2", "toy_scan rows=64 pairs=2", "done"]
    assert [o.status for o in report.outcomes] == ["tuned", "tuned"]


def test_refused_during_graph_capture(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attnforge.register(toy.spec("good"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot measure while a CUDA graph is captured"):
        attnforge.tune("toy")
    assert toy.ran == []


def test_refused_under_compile(toy: Any) -> None:
    attnforge.register(toy.spec("good"))

    def step(x: torch.Tensor) -> torch.Tensor:
        attnforge.tune("toy")
        return x + 1

    for whole in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="eager", fullgraph=whole)
        with pytest.raises(RuntimeError, match="cannot measure under torch"):
            compiled(torch.ones(2))
    assert toy.ran == []


def test_refused_on_fake_tensors(toy: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    attnforge.register(toy.spec("good"))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="on fake tensors"):
        attnforge.tune("toy")
    assert toy.ran == []


@pytest.mark.parametrize(
    ("what", "options", "text"),
    [
        ("nothing", {}, "nothing tunable is called 'nothing'"),
        (attnforge.flash_attention, {}, "flash_attention without shapes"),
        (attnforge.flash_attention, {"shapes": [((1, 4, 2, 8),) * 3], "device": "cuda:sm_90"},
         "is not in this machine"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_said(
    what: Any, options: Any, text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=text):
        attnforge.tune(what, **options)
