"""What a result of tuning holds for: the device, and the environment of a kernel."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

from attnforge.registry.space import Scalar
from attnforge.registry.spec import KernelSpec, Request

__all__ = [
    "cpu_model",
    "device_name",
    "environment",
    "processors",
    "shipped_environment",
    "source_digest",
]

VERSIONS = ("attnforge", "torch")
"""Keys of the environment that a shipped table does not hold."""


def _cpu_field(name: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if re.match(rf"{name}\s*:", line):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


@cache  # of the machine
def cpu_model() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def device_name(request: Request) -> str | None:
    """The device that ``request`` names, or None if it is not in this machine.

    CPUs of one marketing name differ: family and model stand beside it.
    """
    if request.device == "cpu":
        family, model = _cpu_field("cpu family"), _cpu_field("model")
        return f"{cpu_model()} (family {family} model {model})" if family else cpu_model()
    if request.device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if request.arch in ("", f"sm_{major}{minor}"):
            count = torch.cuda.get_device_properties().multi_processor_count
            return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {count} SMs)"
    return None


def source_digest(spec: KernelSpec) -> str:
    """Which source the kernel was made from: its own digest, else that of the launcher's file."""
    if spec.space is not None and spec.space.source is not None:
        return spec.space.source()
    launch = spec.launch
    if isinstance(launch, str):
        found = importlib.util.find_spec(launch.partition(":")[0])
        path = found.origin if found is not None else None
    else:
        path = inspect.getsourcefile(launch)
    return _file_digest(path) if path is not None else "unknown"


@cache  # a module that is loaded does not change with its file
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def environment(spec: KernelSpec) -> dict[str, Scalar]:
    """What must be equal for a result of ``spec`` to be used: versions, source, its own keys."""
    from attnforge._version import __version__

    own = dict(spec.space.environment()) if spec.space is not None else {}
    return {
        "attnforge": __version__,
        "torch": torch.__version__,
        "source": source_digest(spec),
        **own,
    }


def processors() -> int:
    """Of the machine, whatever of them this process may use."""
    return os.cpu_count() or 1


def shipped_environment(spec: KernelSpec) -> dict[str, Scalar]:
    """``environment`` of results that come with the package.

    The number of threads in use must not change an answer, so where it counts, the machine's
    processors stand in its place. Versions do not count: the table stands beside the source it was
    measured with.
    """
    found = {k: v for k, v in environment(spec).items() if k not in VERSIONS}
    if found.pop("threads", None) is not None:
        found["processors"] = processors()
    return found
