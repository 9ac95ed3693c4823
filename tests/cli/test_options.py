"""Options and exit codes of the command line, in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner, Result

import attnforge
from attnforge import _native
from attnforge.cli.app import build
from attnforge.policies import POLICIES

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run() -> Run:
    app, runner = build(), CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"})
    return lambda *args: runner.invoke(app, list(args))


def test_version(run: Run) -> None:
    done = run("--version")
    assert done.exit_code == 0
    assert done.output == f"attnforge {attnforge.__version__}\n"


def test_help_names_the_commands(run: Run) -> None:
    text = run("--help").output
    for command in ("doctor", "list", "explain", "bench", "quality"):
        assert command in text


EXPLAIN: dict[str, list[str]] = {
    "attention": ["flash_attention", "--q", "2,64,8,128", "--k", "2,96,2,128", "--causal"],
    "features": ["flash_attention", "--q", "2,64,8,128", "--window", "5,0", "--softcap", "3",
                 "--alibi", "--sinks", "--seqused"],
    "varlen": ["flash_attention_varlen", "--q", "64,8,128", "--batch", "4", "--seqused"],
    "decode": ["flash_decode", "--q", "2,1,8,128", "--k", "2,900,2,128", "--seqused"],
    "merge": ["merge_states", "--q", "2,64,8,128", "--parts", "3"],
    "merge_packed": ["merge_states", "--q", "64,8,128", "--dtype", "bf16"],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAIN)
def test_explain_json(run: Run, name: str) -> None:
    done = run("explain", *EXPLAIN[name], "--json")
    assert done.exit_code == 0, done.output
    data: dict[str, Any] = json.loads(done.output)
    assert data["function"] == EXPLAIN[name][0]
    assert all(d["chosen"] for d in data["decisions"])
    if name == "features":
        assert data["decisions"][0]["features"] == [
            "alibi", "seqused_k", "sinks", "softcap", "window_left", "window_right"]  # fmt: skip


def test_explain_of_policies(run: Run) -> None:
    shapes = ("--q", "1,1,32,128", "--dtype", "bf16", "--k")
    for name in POLICIES:
        done = run("explain", name, *shapes, "1,98304,8,128", "--json")
        assert done.exit_code == 0, done.output
        data = json.loads(done.output)
        assert data["function"] == f"{POLICIES[name].__name__}.attend"
        assert data["note"].startswith(("sparse: 98304 keys, dense up to ", "dense: 98304 keys"))
    short = run("explain", "quest", *shapes, "1,900,8,128", "--budget", "800")
    assert "dense: 900 keys, sparse above" in short.output
    assert "crossover measured on" in short.output
    for bad, text in (
        (["--k", "1,900,128"], "is no batch,rows,heads,head_dim"),
        (["--causal"], "has none of"),
        (["--budget", "0"], "budget is 0"),
    ):
        done = run("explain", "quest", "--q", "1,1,32,128", *bad)
        assert done.exit_code == 2, bad
        assert text in " ".join(done.output.split()), done.output


def test_explain_exit_codes(run: Run) -> None:
    refused = run("explain", "flash_attention", "--q", "1,8,2,8", "--backend", "cpu",
                  "--device", "cuda:sm_90")  # fmt: skip
    assert refused.exit_code == 1
    assert "needs tensors on cpu" in refused.output
    for bad, text in (
        (["--q", "1,8,x"], "is no shape"),
        (["--q", "1,8,3,8", "--k", "1,8,2,8"], "multiple of KV heads"),
        (["--q", "1,8,2,8", "--dtype", "fp3"], "'fp3' is not known"),
        (["--q", "1,8,2,8", "--window", "a,b"], "want left,right"),
        (["--q", "1,8,2,8", "--device", "abacus:3x"], "is not known"),
        (["--q", "1,8,2,8", "--backend", "nobody"], "it has no kernel for flash_fwd"),
    ):
        done = run("explain", "flash_attention", *bad)
        assert done.exit_code in (1, 2), bad
        assert text in done.output + (done.stderr if done.stderr_bytes else ""), bad


def test_doctor(run: Run) -> None:
    done = run("doctor", "--json")
    report = json.loads(done.output)
    assert done.exit_code == (1 if report["problems"] else 0)
    assert report["attnforge"] == attnforge.__version__
    assert set(report["backends"]) >= {"cpu", "reference"}
    if _native.unavailable() is None:
        assert report["native"]["isa_levels"] == list(_native.isa_levels())
        assert report["native"]["isa_in_force"] in report["native"]["isa_levels"]
        assert "healthy" in run("doctor").output


def test_doctor_without_the_library(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_loaded", False)
    monkeypatch.setattr(_native, "_reason", None)
    monkeypatch.setattr(_native, "library_path", lambda: Path("/nowhere/lib.so"))
    done = run("doctor")
    assert done.exit_code == 1
    assert "is not built" in done.output
    assert "1 problem(s)" in done.output


def test_list_plain(run: Run) -> None:
    text = run("list").output
    for spec in attnforge.list_kernels():
        assert spec.id in text
