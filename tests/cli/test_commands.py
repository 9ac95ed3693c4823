"""The command line: what doctor, list and explain print, as users and scripts read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import attnforge


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "attnforge", *args],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **env},
    )


def test_list_json_has_one_object_per_kernel() -> None:
    done = run("list", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["id"] for row in rows} == {spec.id for spec in attnforge.list_kernels()}
    assert all(row["id"] and row["op"] and row["backend"] for row in rows)


def test_list_for_people_names_every_kernel() -> None:
    done = run("list")
    assert done.returncode == 0, done.stderr
    assert all(spec.id in done.stdout for spec in attnforge.list_kernels())


def test_doctor_tells_the_isa_in_force() -> None:
    done = run("doctor", "--json", ATTNFORGE_CPU_ISA="baseline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["native"]["isa_in_force"] == "baseline"


def test_doctor_reports_a_bad_setting_and_exits_1() -> None:
    done = run("doctor", ATTNFORGE_CPU_ISA="avx9000")
    assert done.returncode == 1
    assert "avx9000" in done.stdout + done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda:sm_90"])
def test_explain_without_tensors(device: str) -> None:
    shapes = ("--q", "1,4096,32,128", "--k", "1,4096,8,128", "--v", "1,4096,8,128")
    done = run(
        "explain", "flash_attention", *shapes, "--dtype", "bf16", "--device", device, "--causal"
    )
    assert done.returncode == 0, done.stderr
    want = "cpu.flash.fwd" if device == "cpu" else "reference.flash.fwd"
    assert want in done.stdout


def test_an_unknown_function_is_one_clear_line() -> None:
    done = run("explain", "flash_attentoin", "--q", "1,8,2,8")
    assert done.returncode != 0
    assert "flash_attentoin" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys, importlib.util as u; sys.modules['typer'] = None; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'typer' else find(n, *a)\n"
        "from attnforge.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "attnforge[cli]" in done.stderr
    assert "Traceback" not in done.stderr
