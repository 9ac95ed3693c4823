"""The host emulator of `csrc/cuda/`: one test per EMULATOR_TEST of `csrc/emulate/tests/`.

Each runs in a process of its own, plain and under AddressSanitizer.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "emulate" / "tests").glob("test_*.cpp"))


def registered(macro: str) -> list[str]:
    pattern = re.compile(rf"^{macro}\((\w+)\)", re.MULTILINE)
    return [name for source in SOURCES for name in pattern.findall(source.read_text())]


NAMES = registered("EMULATOR_TEST")
CRASHES = registered("EMULATOR_CRASH")
BUILDS = {"plain": (), "address": ("-DATTNFORGE_EMULATE_ADDRESS=ON",)}


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


@pytest.fixture(scope="session", params=BUILDS)
def program(request: pytest.FixtureRequest) -> Path:
    """`emulator_tests`, built where `build/emulate_<variant>/` is out of date."""
    build = ROOT / "build" / f"emulate_{request.param}"
    build.mkdir(parents=True, exist_ok=True)
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers want it at the same time
        configure = [tool("cmake"), "-S", str(ROOT / "csrc" / "emulate"), "-B", str(build)]
        make = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
        for command in (
            [*configure, "-G", "Ninja", make, *BUILDS[request.param]],
            [tool("ninja"), "-C", str(build), "emulator_tests"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return build / "emulator_tests"


@pytest.mark.parametrize("name", NAMES)
def test_emulator(program: Path, name: str) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"ok    {name}\n"


@pytest.mark.parametrize("seed", [1000, 2000, 3000, 4000])
def test_other_schedules(program: Path, seed: int) -> None:
    """Values and reports hold whatever the schedule: all tests, in one process."""
    done = subprocess.run(
        [program, "--seed", str(seed)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == len(NAMES)


@pytest.mark.parametrize("name", CRASHES)
def test_address_sanitizer_sees_global_memory(program: Path, name: str) -> None:
    if program.parent.name != "emulate_address":
        return  # without it such an access goes unnoticed, and may do anything
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "test_memory.cpp" in done.stderr


def test_names_are_unique() -> None:
    assert len(NAMES) == len(set(NAMES)) > 50


def test_kernels_cannot_declare_shared_arrays(tmp_path: Path) -> None:
    """`__shared__` would hide an array from the emulator's checks: it does not compile."""
    source = tmp_path / "hidden.cu"
    source.write_text(
        '#include "cuda/launch.h"\n__global__ void hidden() { __shared__ float x[4]; x[0] = 1; }\n'
    )
    command = ["c++", "-x", "c++", "-std=c++20", "-DATTNFORGE_EMULATE=1", "-fsyntax-only"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'emulate' / 'include'}"]
    done = subprocess.run([*command, *include, str(source)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "__shared__" in done.stderr
