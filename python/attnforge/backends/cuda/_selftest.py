"""The self-test at first use (``attnforge.backends._selftest``) of the CUDA C++ kernels.

They are compiled where the library is built, and for newer GPUs by the driver from PTX. A self-test
costs milliseconds.
"""

from __future__ import annotations

from attnforge import _native_cuda
from attnforge.backends import _selftest
from attnforge.registry.spec import Request

__all__ = ["CUDA", "SelfTest"]


def _ready(request: Request) -> bool:
    return _selftest.on_gpu(request) and _native_cuda.unavailable() is None


def _version() -> str:
    build = _native_cuda.build()
    runtime, driver = (_dotted(int(build[name])) for name in ("runtime", "driver"))
    return f"CUDA {runtime} and a driver for CUDA {driver}"


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


CUDA = _selftest.Backend("cuda", _ready, _version)


class SelfTest(_selftest.SelfTest):
    """The kernel ``cuda.<kernel>`` agrees with the reference on the GPU of a request."""

    def __init__(self, kernel: str, launcher: str = "") -> None:
        super().__init__(CUDA, kernel, launcher)
