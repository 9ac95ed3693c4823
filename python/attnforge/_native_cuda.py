"""The native CUDA library: found beside the package, loaded at first use, with or without a GPU.

Loading it registers ``torch.ops.attnforge_native.cuda_*`` for CUDA tensors. Wheels without it are
complete: Triton serves, and ``unavailable()`` says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnforge import _native

__all__ = ["build", "library_path", "operator", "unavailable"]

_LIBRARY = "libattnforge_cuda.so"
_state: list[str | None] = []  # the answer of ``unavailable``, once it is known


def library_path() -> Path:
    """Where the library is, or would be."""
    return Path(__file__).parent / "lib" / _LIBRARY


def unavailable() -> str | None:
    """None once the library is loaded and the driver can run it, else why not."""
    if not _state:
        _state.append(_load())
    return _state[0]


def _load() -> str | None:
    path = library_path()
    if not path.is_file():
        why = _native.build_info("cuda") or "this is a build without native parts"
        return f"{_LIBRARY} is not built ({why}); install CUDA's nvcc and reinstall attnforge"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call, unused-ignore]
    except OSError as error:
        return f"{_LIBRARY} does not load: {error}"
    needed, driver = (int(build()[name]) // 1000 for name in ("runtime", "driver"))
    if 0 < driver < needed:
        return f"{_LIBRARY} needs a driver for CUDA {needed}; this one is for CUDA {driver}"
    return None


def build() -> dict[str, str]:
    """Versions of the runtime and the driver (0 without one), and ``kernels``, ids by spaces.

    The library must be loaded.
    """
    return parse_build(torch.ops.attnforge_native.cuda_build())


def parse_build(text: str) -> dict[str, str]:
    """``cuda_build()`` by name."""
    pairs = [line.split(" ", 1) for line in text.splitlines()]
    found = {name: value for name, value in pairs if name != "kernel"}
    return {**found, "kernels": " ".join(value for name, value in pairs if name == "kernel")}


def operator(name: str) -> Any:
    """The overload ``attnforge_native::cuda_<name>``; the library must be loaded."""
    return getattr(torch.ops.attnforge_native, f"cuda_{name}").default
