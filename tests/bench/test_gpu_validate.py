"""bench/gpu_validate.sh with stand-ins for python and the sanitizer: stages, resuming, limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_validate.sh"
STAGES = ["build", "suite", "sanitizer", "bench"]


def run(tmp_path: Path, *words: str, fail: str = "") -> subprocess.CompletedProcess[str]:
    """The script with a python that writes down its arguments and fails on those with ``fail``."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, body in {
        "python3": f'''echo "$@" >> "{tmp_path}/calls"\n'''
        f"""case "$*" in *{fail or "never-said"}*) exit 3;; esac""",
        "compute-sanitizer": 'while [ "$1" != python3 ]; do shift; done; exec "$@"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python3"}
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def passed(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "out").glob("*.ok")}


def test_runs_every_stage_once(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert passed(tmp_path) == set(STAGES)
    first = calls(tmp_path)
    assert any("build_ext" in line for line in first)
    assert any("tests/triton" in line for line in first)
    assert sum("gpu_smoke" in line for line in first) == 2  # memcheck, racecheck
    assert any(f"--json {tmp_path}/out/flash.json" in line for line in first)
    again = run(tmp_path)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert len(calls(tmp_path)) == len(first) + 1  # the environment block alone


def test_a_failed_stage_is_counted_and_tried_again(tmp_path: Path) -> None:
    done = run(tmp_path, fail="gpu_smoke")
    assert done.returncode == 1
    assert "sanitizer FAILED" in done.stdout
    assert passed(tmp_path) == {"build", "suite", "bench"}  # the others ran all the same
    before = len(calls(tmp_path))
    assert run(tmp_path).returncode == 0
    new = calls(tmp_path)[before:]
    assert passed(tmp_path) == set(STAGES)
    assert not any("build_ext" in line for line in new)


def test_named_stages_run_again(tmp_path: Path) -> None:
    assert run(tmp_path).returncode == 0
    before = len(calls(tmp_path))
    assert run(tmp_path, "build").returncode == 0
    assert ["build_ext" in line for line in calls(tmp_path)[before:]] == [False, True]
    assert run(tmp_path, "paint").returncode == 64


def test_usage(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 64
    assert "OUTDIR" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 65
    assert "no CUDA device" in done.stderr
