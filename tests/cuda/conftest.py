"""CUDA C++ kernels without a GPU: the same sources under the host emulator, on CPU tensors.

The emulated twin of the library is built by the first test that needs it (``build/emulated``) and
registered as the backends ``emulated`` (the sm_80 class) and ``emulated90`` (sm_90a): the
launchers, specs and requirements of ``cuda`` but for the device. The emulator reports races, reads
of memory that nobody wrote and the like as errors of the call. ``ATTNFORGE_CUDA=on`` builds of the
real library are looked at by ``test_compiled.py``.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnforge
from attnforge.backends.cuda import block_sparse, delta, flash, linear, paged, retrieval, scan
from attnforge.registry.predicates import Arch, Available, Device
from attnforge.registry.spec import KernelSpec, unregister
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import Report, compare

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated"
LIBRARY = BUILD / "emulated" / "libattnforge_emulated.so"
_FAMILIES = (flash, paged, block_sparse, linear, delta, scan, retrieval)
_SPECS = tuple(spec for family in _FAMILIES for spec in family.SPECS)


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build_twin() -> Path:
    """The emulated library, compiled if a source is newer."""
    (LIBRARY.parent / "launches").mkdir(parents=True, exist_ok=True)  # see tools/cuda_budgets.py
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers want it at the same time
        _build()
    return LIBRARY


def _build() -> None:
    command = [_tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"]
    options = {
        "ATTNFORGE_CUDA": "off",
        "ATTNFORGE_EMULATE": "ON",
        "ATTNFORGE_HOST_MODULE": "OFF",
        "ATTNFORGE_OUTPUT_DIR": str(BUILD / "package"),
        "CMAKE_MAKE_PROGRAM": _tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
    }
    command += [f"-D{name}={value}" for name, value in options.items()]
    ninja = [_tool("ninja"), "-C", str(BUILD), "attnforge_emulated"]
    for step in (command, ninja):
        result = subprocess.run(step, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def emulated_operator(name: str) -> Any:
    return getattr(torch.ops.attnforge_emulated, f"cuda_{name}").default


def emulated(spec: KernelSpec) -> KernelSpec:
    """A spec of ``cuda`` as one of ``emulated`` or, for sm_90a, ``emulated90``."""
    elsewhere = (Device, Arch, Available)
    needs = tuple(need for need in spec.requires if not isinstance(need, elsewhere))
    backend = "emulated90" if spec.id.endswith("sm90") else "emulated"
    name = spec.id.replace("cuda.", f"{backend}.")
    return replace(spec, id=name, backend=backend, score=-1.0, requires=(Device("cpu"), *needs))


@pytest.fixture(scope="session")
def twin() -> Iterator[None]:
    """Kernels of the backends ``emulated`` and ``emulated90``."""
    torch.ops.load_library(str(build_twin()))
    patch = pytest.MonkeyPatch()
    patch.setattr(flash, "_operator", emulated_operator)
    specs = [attnforge.register(emulated(spec)) for spec in _SPECS]
    yield
    for spec in specs:
        unregister(spec.id)
    patch.undo()


def _check(case: FlashCase, grad: bool = True, backend: str = "emulated", **more: object) -> Report:
    """Run a case, with gradients or forward alone, and hold it to the bounds of 16-bit P."""
    inputs = case.make()
    got = inputs.run(backend) if grad else inputs.forward(backend, **more)
    return compare(got, inputs.truth(grad, rounded=True), inputs.context).check()


@pytest.fixture
def check() -> Callable[..., Report]:
    """``check(case, grad=True, backend="emulated", **keywords of the call)``."""
    return _check
