"""What is installed, what works, and why the rest does not: the facts behind ``doctor``."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Callable
from typing import Any

import torch

from attnforge import _native, _settings
from attnforge._version import __version__
from attnforge.registry import list_kernels
from attnforge.registry.predicates import Available
from attnforge.tuning.lookup import shipped

__all__ = ["examine"]


def _attempt(probe: Callable[[], Any]) -> tuple[Any, str | None]:
    """(value, None), or (None, the error): a doctor survives what is broken."""
    try:
        return probe(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _native_report() -> dict[str, Any]:
    reason, error = _attempt(_native.unavailable)
    path = _native.library_path()
    report: dict[str, Any] = {
        "path": str(path),
        "present": path.is_file(),
        "loaded": reason is None and error is None,
        "reason": error or reason,
        "isa_requested": _settings.cpu_isa(),
        "isa_in_force": None,
        "isa_levels": [],
    }
    if report["loaded"]:
        report["isa_in_force"] = _native.isa()
        report["isa_levels"] = list(_native.isa_levels())
    return report


def _host_report() -> dict[str, Any]:
    """What the compiled host module knows of this CPU and of the build."""
    if importlib.util.find_spec("attnforge._host") is None:
        return {"present": False}
    host, error = _attempt(lambda: importlib.import_module("attnforge._host"))
    if host is None:
        return {"present": True, "reason": error}
    report: dict[str, Any] = {"present": True}
    for name in ("build_info", "cpu_features"):
        value, error = _attempt(getattr(host, name, lambda: None))
        report[name] = value if error is None else error
    return report


def _triton_report() -> dict[str, Any]:
    found = importlib.util.find_spec("triton") is not None
    return {"present": found, "reason": None if found else "triton is not installed"}


def _backend_report() -> dict[str, Any]:
    """Per backend: its kernels, and why it cannot be used here if its parts are missing."""
    report: dict[str, Any] = {}
    for spec in list_kernels():
        entry = report.setdefault(spec.backend, {"kernels": [], "available": True, "reason": None})
        entry["kernels"].append(spec.id)
        for need in spec.requires:
            if isinstance(need, Available):
                reason, error = _attempt(need.probe)
                if reason or error:
                    entry["available"], entry["reason"] = False, error or reason
    return report


def _tuning_report() -> list[dict[str, Any]]:
    """Results of tuning that come with the package for this machine, and which are not used."""
    return [
        {"kernel": row.spec, "config": dict(row.config), "not_used": why or None}
        for row, why in shipped()
    ]


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain data; ``problems`` is empty on a healthy install."""
    native = _native_report()
    kernels, kernel_error = _attempt(_backend_report)
    tuning, tuning_error = _attempt(_tuning_report) if native["loaded"] else ([], None)
    cuda = torch.cuda.is_available()
    problems = [text for text in (native["reason"], kernel_error, tuning_error) if text]
    return {
        "attnforge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
            if cuda
            else [],
        },
        "settings": {
            _settings.BACKEND: _settings.backend(),
            _settings.CPU_ISA: _settings.cpu_isa(),
            _settings.CACHE_DIR: str(_settings.cache_dir()),
            _settings.DEBUG: _settings.debug(),
        },
        "native": native,
        "host": _host_report(),
        "triton": _triton_report(),
        "backends": kernels or {},
        "tuning": tuning or [],
        "problems": problems,
    }
