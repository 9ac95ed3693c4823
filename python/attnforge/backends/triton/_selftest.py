"""A small problem per kernel, group of features and dtype at first use on a GPU.

Results are held against the reference. Triton compiles on the user's machine, with the user's
version and driver, and there have been versions that compiled attention wrongly. A kernel that
fails here warns once and is routed around, which ``explain`` shows with the reason; where only a
group of features fails, only calls that use it are. Costs milliseconds beyond a compilation that
would come anyway or soon, so verdicts last for a process and no longer: a file of them could
outlive a driver. Off where there is no GPU, in the interpreter, and while a CUDA graph is captured.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import FLOAT8
from attnforge.registry.predicates import Available, dtype_name
from attnforge.registry.spec import Request

__all__ = ["SelfTest", "check"]

# Largest error relative to a result's largest number. Wrong code is off by the numbers themselves.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2, FLOAT8: 6e-2}

_VERDICTS: dict[tuple[str, str, torch.dtype, str], str | None] = {}


class SelfTest(Available):
    """The kernel ``triton.<kernel>`` agrees with the reference on the GPU of a request.

    ``attnforge.backends.triton._selftest_<family>`` has its problems: GROUPS names the features
    that are tested together, and "" stands for what every call has.
    """

    def __init__(self, kernel: str) -> None:
        super().__init__("self-test", lambda: None)
        self.kernel = kernel

    def __call__(self, request: Request, /) -> str | None:
        if request.dtype not in _TOLERANCE or not _on_gpu(request):
            return None
        for group in ("", *_groups(self.kernel, request.features)):
            key = (self.kernel, group, request.dtype, request.arch)
            if key not in _VERDICTS:
                _VERDICTS[key] = check(self.kernel, group, request.dtype, torch.device("cuda"))
            if _VERDICTS[key] is not None:
                return _VERDICTS[key]
        return None


def _groups(kernel: str, features: frozenset[str]) -> list[str]:
    """The groups that features of a request belong to."""
    groups = _problems(kernel).GROUPS
    return [name for name, members in groups.items() if not features.isdisjoint(members)]


def _problems(kernel: str) -> Any:
    family = kernel.partition(".")[0]
    return importlib.import_module(f"attnforge.backends.triton._selftest_{family}")


def _on_gpu(request: Request) -> bool:
    """Whether the request is for the current GPU, and not for one that is only described."""
    if request.device != "cuda" or _settings.triton_interpreted() or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    return request.arch == f"sm_{major}{minor}" and not torch.cuda.is_current_stream_capturing()


def check(kernel: str, group: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason not to use ``triton.<kernel>``, which is also given as a warning."""
    family, _, kind = kernel.partition(".")
    launchers = importlib.import_module(f"attnforge.backends.triton.{family}")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            run = getattr(launchers, kind)
            error = _worst(*_problems(kernel).problem(kind, group, run, dtype, device))
        reason = f"off by {error:.3g} from the reference" if error > _TOLERANCE[dtype] else ""
    except Exception as failure:  # a compiler that crashes is as good a reason
        reason = f"{type(failure).__name__}: {failure}"
    if not reason:
        return None
    import triton

    what = f" of {group}" if group else ""
    text = f"its self-test{what} in {dtype_name(dtype)} failed with Triton {triton.__version__}"
    calls = f" for calls with {group}" if group else ""
    warnings.warn(
        f"attnforge: triton.{kernel} is not used{calls}: {text}: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return f"{text}: {reason}"


def _worst(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference of two lists, each relative to the largest number that is wanted.

    Equal infinities do not differ; NaN is infinitely wrong.
    """
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if b.numel():
            x, y = a.double(), b.double()
            size = float(y.abs().nan_to_num(0.0, 0.0).max()) or 1.0
            gap = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(float("inf"))
            worst = max(worst, float(gap.max()) / size)
    return worst
