"""A small problem per kernel, group of features and dtype at first use on a GPU.

Results are held against the reference. What runs was compiled on the user's machine or for it, with
a version and a driver that no test has seen, and there have been compilers that got attention
wrong. A kernel that fails here warns once and is routed around, which ``explain`` shows with the
reason; where only a group of features fails, only calls that use it are. Verdicts last for a
process and no longer: a file of them could outlive a driver. Off where there is no GPU and while a
CUDA graph is captured.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FLOAT8
from attnforge.registry.predicates import Available, dtype_name
from attnforge.registry.spec import Request

__all__ = ["Backend", "SelfTest", "check", "on_gpu"]

# Largest error relative to a result's largest number. Wrong code is off by the numbers themselves.
# Tables of codes (int16) are right or wrong.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2, FLOAT8: 6e-2,
              torch.int16: 0.0}  # fmt: skip

_VERDICTS: dict[tuple[str, str, str, torch.dtype, str], str | None] = {}


@dataclass
class Backend:
    """What a self-test must know of a backend.

    name: of its package in ``attnforge.backends``, whose module of a family has the launchers.
    ready: whether its kernels run for a request here and now; usually ``on_gpu`` and more.
    version: what compiles or compiled them, for the report.
    """

    name: str
    ready: Callable[[Request], bool]
    version: Callable[[], str]


class SelfTest(Available):
    """The kernel ``<backend>.<kernel>`` agrees with the reference on the GPU of a request.

    ``_selftest_<family>`` of the backend, or of ``attnforge.backends`` if it has none, has the
    problems: GROUPS names the features that are tested together, and "" stands for what every call
    has; ``problem(kind, group, run, dtype, device)`` gives results of ``run`` and those wanted.

    kernel: ``"<family>.<kind>"``.
    launcher: its name in the backend's module of the family, if that is not the kind.
    """

    def __init__(self, backend: Backend, kernel: str, launcher: str = "") -> None:
        super().__init__("self-test", lambda: None)
        self.backend, self.kernel = backend, kernel
        self.launcher = launcher or kernel.partition(".")[2]

    def __call__(self, request: Request, /) -> str | None:
        if request.dtype not in _TOLERANCE or not self.backend.ready(request):
            return None
        name = f"{self.backend.name}.{self.kernel.partition('.')[0]}.{self.launcher}"
        for group in ("", *self._groups(request.features)):
            key = (name, self.kernel, group, request.dtype, request.arch)
            if key not in _VERDICTS:
                _VERDICTS[key] = check(
                    self.backend, self.kernel, group, request.dtype, torch.device("cuda"),
                    self.launcher,
                )  # fmt: skip
            if _VERDICTS[key] is not None:
                return _VERDICTS[key]
        return None

    def _groups(self, features: frozenset[str]) -> list[str]:
        """The groups that features of a request belong to."""
        groups = _problems(self.backend, self.kernel).GROUPS
        return [name for name, members in groups.items() if not features.isdisjoint(members)]


def _problems(backend: Backend, kernel: str) -> Any:
    name = f"_selftest_{kernel.partition('.')[0]}"
    own = f"{__package__}.{backend.name}.{name}"
    found = importlib.util.find_spec(own) is not None
    return importlib.import_module(own if found else f"{__package__}.{name}")


def on_gpu(request: Request) -> bool:
    """Whether the request is for the current GPU, and not for one that is only described."""
    if request.device != "cuda" or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    return request.arch == f"sm_{major}{minor}" and not torch.cuda.is_current_stream_capturing()


def check(
    backend: Backend,
    kernel: str,
    group: str,
    dtype: torch.dtype,
    device: torch.device,
    launcher: str = "",
) -> str | None:
    """None, or the reason not to use a kernel for a group, which is also given as a warning."""
    family, _, kind = kernel.partition(".")
    launchers = importlib.import_module(f"{__package__}.{backend.name}.{family}")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            run = getattr(launchers, launcher or kind)
            problem = _problems(backend, kernel).problem
            error = _worst(*problem(kind, group, run, dtype, device))
        reason = f"off by {error:.3g} from the reference" if error > _TOLERANCE[dtype] else ""
    except Exception as failure:  # a compiler or a launch that fails is as good a reason
        reason = f"{type(failure).__name__}: {failure}"
    if not reason:
        return None
    what = f" of {group}" if group else ""
    text = f"its self-test{what} in {dtype_name(dtype)} failed with {backend.version()}"
    calls = f" for calls with {group}" if group else ""
    name = f"{backend.name}.{family}.{launcher or kind}"
    warnings.warn(
        f"attnforge: {name} is not used{calls}: {text}: {reason}", RuntimeWarning, stacklevel=2
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
