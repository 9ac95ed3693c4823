"""The self-test at first use (``attnforge.backends._selftest``) of the Triton kernels.

Triton compiles on the user's machine, with the user's version and driver. A self-test costs
milliseconds beyond a compilation that would come anyway or soon. Off in the interpreter.
"""

from __future__ import annotations

import torch

from attnforge import _settings
from attnforge.backends import _selftest
from attnforge.registry.spec import Request

__all__ = ["TRITON", "SelfTest", "check"]


def _ready(request: Request) -> bool:
    return not _settings.triton_interpreted() and _selftest.on_gpu(request)


def _version() -> str:
    import triton

    return f"Triton {triton.__version__}"


TRITON = _selftest.Backend("triton", _ready, _version)


class SelfTest(_selftest.SelfTest):
    """The kernel ``triton.<kernel>`` agrees with the reference on the GPU of a request."""

    def __init__(self, kernel: str) -> None:
        super().__init__(TRITON, kernel)


def check(kernel: str, group: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason not to use ``triton.<kernel>``, which is also given as a warning."""
    return _selftest.check(TRITON, kernel, group, dtype, device)
