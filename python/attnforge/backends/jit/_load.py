"""Compiled programs on a GPU, by CuPy: loaded once per device of this process, then launched."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import Any

import torch

from attnforge.backends.jit import _cubins, _nvrtc
from attnforge.backends.jit._source import Program

__all__ = ["Kernel", "load", "unavailable"]


def unavailable() -> str | None:
    """None, or what is not installed. Imports and loads nothing."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; install the extra: pip install 'attnforge[jit]'"
    return _nvrtc.unavailable()


class Kernel:
    """A kernel of a loaded cubin. shape: how it is launched."""

    def __init__(self, function: Any, shape: _cubins.Shape) -> None:
        self.shape = shape
        self._function = function

    def launch(self, blocks: int, call: ctypes.Structure, stream: int) -> None:
        """Start so many blocks on the current device; ``call`` is copied."""
        import cupy
        import numpy

        argument = numpy.frombuffer(bytes(call), dtype=numpy.uint8)  # passed by value
        with cupy.cuda.ExternalStream(stream):
            self._function(
                (blocks,), (self.shape.threads,), (argument,), shared_mem=self.shape.shared
            )


def load(program: Program, device: torch.device) -> Kernel:
    """The kernel of a program for a device, compiled and loaded if it is not yet."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _loaded(program, index)


@cache
def _loaded(program: Program, index: int) -> Kernel:
    import cupy

    major, minor = torch.cuda.get_device_capability(index)
    path, shape = _cubins.cubin(program, f"sm_{major}{minor}")
    with cupy.cuda.Device(index):
        function = cupy.RawModule(path=str(path)).get_function(shape.name)
        if shape.shared > 48 * 1024:  # beyond it a kernel has to opt in
            function.max_dynamic_shared_size_bytes = shape.shared
    return Kernel(function, shape)
