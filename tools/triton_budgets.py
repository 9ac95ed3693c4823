"""Compiles every shipped Triton config ahead of time and holds it to a table of resources.

    python tools/triton_budgets.py           # compare with triton_kernels/budgets.json
    python tools/triton_budgets.py --write   # write the table anew

No GPU is needed: the launchers run on CPU tensors under a driver that names an architecture and
compiles instead of launching, so what is compiled is what a launcher would start. A row holds the
registers of a thread, its stack in bytes (spills) and the shared memory of a block.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "triton_kernels" / "budgets.json"
ARCHS = (80, 90, 100)
SLACK = 16  # bytes of stack that a compiler of another build may add; registers are no limit


class _NoDevice:
    """A Triton driver of an architecture, without a device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> tuple[str, int]:
        return ("none", self.target.arch)  # kernels are cached by device

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Launches inside compile for ``sm_<arch>`` and append (kernel name, compiled kernel)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from attnforge.backends.triton import flash

    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.__name__, kernel))
        return kernel

    active = driver._active
    driver.set_active(_NoDevice(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(flash, "device_arch", lambda device: ("cuda", f"sm_{arch}")),
        ):
            yield found
    finally:
        driver._active = active


def resources(kernel: Any) -> dict[str, int]:
    """Registers and stack bytes of a thread, shared bytes of a block, from the compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert words is not None, text
    return {
        "registers": int(words[1]),
        "stack": int(words[2]),
        "shared": int(kernel.metadata.shared),
    }
