"""NVRTC by ctypes: source and headers in memory to a cubin. Needs neither a GPU nor a driver.

The library comes with the package ``nvidia-cuda-nvrtc`` (torch's CUDA builds bring it too) or with
a CUDA toolkit. Options: ``-default-device``, as snippets and our constexpr functions say of no
function where it runs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

__all__ = ["OPTIONS", "Failure", "compile", "unavailable", "version"]

OPTIONS = ("-std=c++20", "-default-device")
_OLDEST = 12  # C++20
_INSTALL = "install it: pip install 'attnforge[jit]'"


class Failure(RuntimeError):
    """NVRTC refuses a source; ``log`` is what it says."""

    def __init__(self, log: str) -> None:
        super().__init__(log)
        self.log = log


def _folders() -> Iterator[Path]:
    """Where the library may be, best first."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        yield from sorted(Path(place).glob("cu*/lib"), reverse=True)
        yield Path(place) / "cuda_nvrtc" / "lib"
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parents[1] / "lib64"
    yield Path("/usr/local/cuda/lib64")


@cache
def library_path() -> Path | None:
    """The library: of the CUDA version of torch if there is one, else the newest."""
    found = [path for folder in _folders() for path in folder.glob("libnvrtc.so.*")]
    found = [path for path in found if _major(path) >= _OLDEST]
    wanted = torch.version.cuda
    if wanted is not None:  # a driver for torch's version may not load what a newer one makes
        found = [path for path in found if _major(path) == int(wanted.partition(".")[0])]
    return max(found, key=_major, default=None)


def _major(path: Path) -> int:
    """13 for libnvrtc.so.13; 0 for longer names of the same file."""
    number = path.name.removeprefix("libnvrtc.so.")
    return int(number) if number.isdigit() else 0


def unavailable() -> str | None:
    """None, or why nothing can be compiled. Loads nothing."""
    if library_path() is not None:
        return None
    major = (torch.version.cuda or f"{_OLDEST} or newer").partition(".")[0]
    return f"NVRTC of CUDA {major} is not installed; {_INSTALL}"


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise RuntimeError(f"attnforge.jit: {unavailable()}")
    # The library looks for its builtins by name, where a loaded one is found.
    for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(path))


@cache
def version() -> str:
    """For example ``13.0``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return f"{major.value}.{minor.value}"


def _check(code: int, what: str) -> None:
    if code:
        describe = _library().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"attnforge.jit: {what}: {describe(code).decode()}")


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def compile(source: str, arch: str, headers: Mapping[str, str]) -> bytes:
    """The cubin of ``source`` for ``arch`` (``"sm_90"``); Failure with the log if it has errors."""
    library, program = _library(), ctypes.c_void_p()
    create = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"generated", len(headers),
        _strings(list(headers.values())), _strings(list(headers)),
    )  # fmt: skip
    _check(create, "nvrtcCreateProgram")
    options = (*OPTIONS, f"-arch={arch}")
    try:
        if library.nvrtcCompileProgram(program, len(options), _strings(options)):
            raise Failure(_read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace"))
        return _read(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
