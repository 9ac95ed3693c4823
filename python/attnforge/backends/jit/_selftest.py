"""The self-test at first use (``attnforge.backends._selftest``) of kernels compiled at run time."""

from __future__ import annotations

from attnforge.backends import _selftest
from attnforge.backends.jit import _load, _nvrtc
from attnforge.registry.spec import Request

__all__ = ["SelfTest"]


def _ready(request: Request) -> bool:
    return _selftest.on_gpu(request) and _load.unavailable() is None


JIT = _selftest.Backend("jit", _ready, lambda: f"NVRTC {_nvrtc.version()}")


class SelfTest(_selftest.SelfTest):
    """The kernel ``jit.<kernel>`` agrees with the reference on the GPU of a request."""

    def __init__(self, kernel: str) -> None:
        super().__init__(JIT, kernel)
