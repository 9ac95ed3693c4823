"""The native CPU library: found beside the package, loaded at first use.

Loading it registers the private operators ``torch.ops.attnforge_native.*``. A package without
it is complete but slow: the reference serves, and ``unavailable()`` says why.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch

from attnforge import _settings

__all__ = [
    "TILE_LEVELS",
    "build_info",
    "isa",
    "isa_levels",
    "library_path",
    "operator",
    "source_digest",
    "unavailable",
]

_LIBRARY = "libattnforge_cpu.so"
_LEVELS = ("auto", "baseline", "avx2", "avx512", "amx", "avx512_soft", "amx_soft")
TILE_LEVELS = ("amx", "amx_soft")  # bf16 on matrix tiles, with P in bf16 too
_lock = threading.Lock()
_loaded = False
_reason: str | None = None


def library_path() -> Path:
    """Where the library is, or would be."""
    return Path(__file__).parent / "lib" / _LIBRARY


def unavailable() -> str | None:
    """None once the library is loaded, else why it is not.

    Raises ValueError if ``ATTNFORGE_CPU_ISA`` asks for a level that is unknown or cannot run
    here: a forced level is never replaced in silence.
    """
    if not _loaded:
        with _lock:
            _load()
    return _reason


def _load() -> None:
    global _loaded, _reason
    if _loaded:
        return
    path = library_path()
    if not path.is_file():
        _reason = (
            f"{_LIBRARY} is not built{_why_not_built()}; install a C++20 compiler and reinstall "
            f"attnforge (looked in {path.parent})"
        )
    else:
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call, unused-ignore]
        except OSError as error:
            _reason = f"{_LIBRARY} does not load: {error}"
        else:
            _select_isa(_settings.cpu_isa())
    _loaded = True


def build_info(name: str) -> str:
    """What the build recorded beside the package under ``name``; empty if nothing."""
    try:
        info = json.loads((Path(__file__).parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(info.get(name, ""))


def source_digest(kernel: str) -> str:
    """A digest of ``csrc/cpu/<kernel>.cpp``, the headers it may include and the compiler flags."""
    return build_info(f"source {kernel}") or "unknown"


def _why_not_built() -> str:
    reason = build_info("reason")
    return f": {reason}" if reason else ""


def _select_isa(level: str) -> None:
    if level not in _LEVELS:
        raise ValueError(
            f"attnforge: {_settings.CPU_ISA} is {level!r}; want one of {', '.join(_LEVELS)}"
        )
    try:
        torch.ops.attnforge_native.cpu_isa(level)
    except RuntimeError as error:
        runs = torch.ops.attnforge_native.cpu_isa_levels()
        raise ValueError(
            f"attnforge: {_settings.CPU_ISA} is {level!r}, which cannot run here; "
            f"levels that can: {runs}; unset it to take the best"
        ) from error


def operator(name: str) -> Any:
    """The overload ``attnforge_native::name``; the library must be loaded."""
    return getattr(torch.ops.attnforge_native, name).default


def isa(level: str = "") -> str:
    """The ISA level in force, after choosing ``level`` ("" asks only, "auto" takes the best).

    RuntimeError without the native library, or on a level that cannot run here.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"attnforge: {reason}")
    chosen: str = torch.ops.attnforge_native.cpu_isa(level)
    return chosen


def isa_levels() -> tuple[str, ...]:
    """ISA levels that are built in and run on this machine, or () without the library."""
    if unavailable() is not None:
        return ()
    levels: str = torch.ops.attnforge_native.cpu_isa_levels()
    return tuple(level for level in levels.split(",") if level)
