"""Which torch a new machine gets, and that stages are counted honestly."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"attnforge_tools_{name}", ROOT / "tools" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bootstrap = load("bootstrap")
stages = load("stages")
PIN = bootstrap.torch_pin()


@pytest.mark.parametrize(
    ("choice", "gpu", "configured", "expected"),
    [
        ("auto", False, "2.13.0+cpu", ["torch==2.13.0+cpu"]),
        ("auto", False, "2.13.0", ["--no-deps", "--index-url", bootstrap.CPU_INDEX, PIN]),
        ("auto", False, None, ["--no-deps", "--index-url", bootstrap.CPU_INDEX, PIN]),
        ("auto", True, None, [PIN]),
        ("cpu", True, "2.13.0+cpu", ["torch==2.13.0+cpu"]),
        ("cpu", True, "2.13.0", ["--no-deps", "--index-url", bootstrap.CPU_INDEX, PIN]),
        ("default", False, None, [PIN]),
    ],
)
def test_source_of_torch(
    choice: str, gpu: bool, configured: str | None, expected: list[str]
) -> None:
    assert bootstrap.torch_install_arguments(choice, gpu, configured) == expected


def test_version_in_pip_report() -> None:
    report = {"install": [{"metadata": {"name": "torch", "version": "2.13.0+cpu"}}]}
    assert bootstrap.resolved_version(json.dumps(report)) == "2.13.0+cpu"
    assert bootstrap.resolved_version(json.dumps({"install": []})) is None
    assert bootstrap.resolved_version("ERROR: no matching distribution") is None


def test_finds_the_torch_of_an_environment() -> None:
    import torch

    expected = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert bootstrap.installed_torch(Path(sys.executable)) == expected


def test_system_torch_is_never_replaced(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    with pytest.raises(SystemExit, match="TORCH=system"):
        bootstrap.install_torch(bare / "bin" / "python", "system")


def test_system_torch_is_seen_through(tmp_path: Path) -> None:
    python = bootstrap.create_environment(tmp_path / "venv", True)
    assert bootstrap.installed_torch(python) == bootstrap.installed_torch(Path(sys.executable))


def test_stamp_follows_group_and_choice() -> None:
    stamps = {bootstrap.stamp_of(g, c) for g in ("demo", "test") for c in ("auto", "system")}
    assert len(stamps) == 4


def counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, exhaustive: bool = False
) -> object:
    """Counts of a pytest stage over one file outside the repository's own configuration."""
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "REPORTS", tmp_path)
    (tmp_path / "test_it.py").write_text(body)
    args = ("-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path))
    return stages.run(stages.Stage("toy", paths=("test_it.py",), pytest_args=args), exhaustive)


def test_stage_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "@pytest.mark.skip(reason='toy')\ndef test_c(): pass\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError\n"
        "def test_d(broken): pass\n"
    )
    count = counted(tmp_path, monkeypatch, body)
    assert (count.passed, count.failed, count.skipped) == (1, 2, 1)  # type: ignore[attr-defined]


def test_exhaustive_tests_run_where_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "import pytest\ndef test_a(): pass\n@pytest.mark.exhaustive\ndef test_b(): assert False\n"
    )
    few = counted(tmp_path, monkeypatch, body)
    assert (few.passed, few.failed) == (1, 0)  # type: ignore[attr-defined]
    every = counted(tmp_path, monkeypatch, body, exhaustive=True)
    assert (every.passed, every.failed) == (1, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body", ["import os\ndef test_a(): os._exit(0)\n", "raise RuntimeError\n", "x = 1\n"]
)
def test_a_crash_or_an_empty_run_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    count = counted(tmp_path, monkeypatch, body)
    assert count.failed >= 1  # type: ignore[attr-defined]
