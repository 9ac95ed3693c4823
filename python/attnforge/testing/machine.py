"""The environment block that stands beside every measured number."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from attnforge import _native
from attnforge._version import __version__
from attnforge.tuning.device import cpu_model

__all__ = ["commit", "cpu_isa", "cpu_model", "environment", "huge_pages"]

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cpu_isa() -> str:
    """ISA level of attnforge's kernels in force, or that there is no native library."""
    return "no native library" if _native.unavailable() is not None else _native.isa()


def huge_pages() -> str:
    """The transparent-huge-page policy: `always`, `madvise`, `never` or `unknown`."""
    try:
        words = _HUGE_PAGES.read_text().split()
    except OSError:
        return "unknown"
    return next((w.strip("[]") for w in words if w.startswith("[")), "unknown")


def _git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *args],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """Short commit of the source tree that runs, `+` appended if files differ; else `unknown`.

    An installed package is not part of a repository, though a repository may lie around it: only a
    tree that tracks this very file counts.
    """
    if not _git("ls-files", "--", Path(__file__).name):
        return "unknown"
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _gpu() -> dict[str, str | int]:
    """What stands for the GPU beside the rest: name, capability, driver, CUDA and Triton."""
    major, minor = torch.cuda.get_device_capability()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        driver = done.stdout.split("\n", 1)[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "device": torch.cuda.get_device_name(),
        "arch": f"sm_{major}{minor}",
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "triton": triton,
        "host": cpu_model(),
    }


def environment(restricted: str = "", device: str = "cpu") -> dict[str, str | int]:
    """Device, levels in force, threads, versions, commit and UTC date.

    Args:
        restricted: ISA level to which both sides were limited from outside; empty is none.
        device: "cpu", or "cuda" for the current GPU.
    """
    return {
        **(_gpu() if device == "cuda" else {"device": cpu_model()}),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "restricted": restricted or "no",
        "huge_pages": huge_pages(),
        "attnforge": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def main(device: str) -> None:
    """Print the environment block as JSON; exit 1 with a sentence where the device is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("attnforge: no CUDA device is there, or torch is a build without CUDA")
    print(json.dumps(environment(device=device), indent=2))


if __name__ == "__main__":
    main("cuda" if "cuda" in sys.argv else "cpu")
