"""The headers that run-time kernels are compiled from: of the installed package or a checkout."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

__all__ = ["digest", "headers"]

_PACKAGE = Path(__file__).parents[2]

# NVRTC has no standard library. This is what kernels use of it.
_CSTDINT = """#pragma once
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
"""


def _roots() -> tuple[Path, ...]:
    """Folders that includes are relative to. setup.py copies both into ``include``."""
    installed = _PACKAGE / "include"
    if installed.is_dir():
        return (installed,)
    csrc = _PACKAGE.parents[1] / "csrc"
    return (csrc, csrc / "include")


@cache
def headers() -> dict[str, str]:
    """Name in an ``#include`` -> text."""
    found = {"cstdint": _CSTDINT}
    for root in _roots():
        for folder in ("cuda", "attnforge"):
            for path in sorted((root / folder).rglob("*.h")):
                found[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
    if "cuda/jit/kernels.h" not in found:
        raise RuntimeError(
            f"attnforge.jit: the headers of the kernels are not in {_PACKAGE / 'include'}; "
            "reinstall attnforge"
        )
    return found


@cache
def digest() -> str:
    """Of all headers: part of the key of every cubin."""
    return hashlib.sha256(repr(sorted(headers().items())).encode()).hexdigest()
