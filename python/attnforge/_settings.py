"""Environment variables: the only module of attnforge that reads them.

| variable | values | meaning |
| --- | --- | --- |
| ``ATTNFORGE_BACKEND`` | ``cpu`` or ``flash_fwd=reference,*=cpu`` | choice of kernels |
| ``ATTNFORGE_CPU_ISA`` | ``auto baseline avx2 avx512 amx`` ... | level of CPU kernels |
| ``ATTNFORGE_CACHE_DIR`` | a directory | where tuning results and jit cubins are kept |
| ``ATTNFORGE_DEBUG`` | ``0`` or ``1`` | start with ``attnforge.debug(checks=True)`` |
| ``TRITON_INTERPRET`` | ``0`` or ``1`` | Triton's own: run its kernels in numpy, on the CPU too |
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "BACKEND",
    "CACHE_DIR",
    "CPU_ISA",
    "DEBUG",
    "backend",
    "cache_dir",
    "cpu_isa",
    "debug",
    "stay_offline",
    "triton_interpreted",
]

BACKEND = "ATTNFORGE_BACKEND"
CPU_ISA = "ATTNFORGE_CPU_ISA"
CACHE_DIR = "ATTNFORGE_CACHE_DIR"
DEBUG = "ATTNFORGE_DEBUG"


def backend() -> str | None:
    """The kernel choice of the environment, or None. Read on every call: it may change."""
    return os.environ.get(BACKEND) or None


def cpu_isa() -> str:
    """The instruction set level asked for; ``auto`` takes the widest that runs here."""
    return os.environ.get(CPU_ISA) or "auto"


def cache_dir() -> Path:
    """Where attnforge keeps files between runs (not created by this call)."""
    chosen = os.environ.get(CACHE_DIR)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attnforge"


def debug() -> bool:
    """Whether full checks are on from the start."""
    return os.environ.get(DEBUG, "0").lower() not in ("", "0", "false", "off", "no")


def triton_interpreted() -> bool:
    """Whether Triton interprets its kernels; it looks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def stay_offline() -> None:
    """Keep Hugging Face libraries off the network, unless the user has said otherwise.

    Only for files that are on this machine; takes effect if those libraries are not imported yet.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
