"""Cubins of programs, kept between runs under a key of everything that makes them.

Key: the generated source (the user's text is in it), the content of all our headers, options,
architecture and the version of NVRTC. A file is written in one step and under its own lock, so
that processes that start together compile once; one that is no cubin is made again.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from attnforge import _files, _settings
from attnforge.backends.jit import _headers, _nvrtc
from attnforge.backends.jit._source import Program
from attnforge.jit import CompileError

__all__ = ["Shape", "cubin", "directory", "shape_of"]

_KERNEL = re.compile(rb"_ZN9attnforge4cuda3jit6kernelINS1_4CaseELi(\d+)ELi(\d+)ELi(\d+)E\w+")
_ERROR = re.compile(
    r"^(score|mask)_mod\((\d+)\): (?:catastrophic )?error(?: #[\w-]+)?: (.*)$", re.M
)


class Shape(NamedTuple):
    """How a kernel is launched; it stands in the kernel's name."""

    name: str
    rows: int  # of a tile, or of a block of a merge
    threads: int
    shared: int  # bytes


def shape_of(image: bytes) -> Shape | None:
    """Of the one kernel of a compiled program; None if there is none."""
    found = _KERNEL.search(image)
    return None if found is None else Shape(found[0].decode(), *(int(n) for n in found.groups()))


def directory() -> Path:
    """Where cubins are (not created by this call)."""
    return _settings.cache_dir() / "jit"


def _key(source: str, arch: str) -> str:
    parts = (source, _headers.digest(), _nvrtc.OPTIONS, arch, _nvrtc.version())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def cubin(program: Program, arch: str) -> tuple[Path, Shape]:
    """The file of a program's cubin for ``arch``, compiled if it is not there, and its kernel.

    CompileError if a snippet of the user does not compile; RuntimeError if the cache directory
    must not be used.
    """
    source = program.source()
    path = directory() / f"{_key(source, arch)}.cubin"
    why = _files.make_folder(path.parent)
    if why is not None:
        raise RuntimeError(
            f"attnforge.jit: compiled kernels cannot be kept in {path.parent}: {why}; remove it, "
            f"or set {_settings.CACHE_DIR} to a directory of yours"
        )
    shape = _kept(path)
    if shape is None:
        with _files.locked(path, "attnforge.jit", "jit", timeout=-1):
            shape = _kept(path)  # another process may have made it meanwhile
            if shape is None:
                _files.replace(path, _compile(program, source, arch))
                shape = _kept(path)
    if shape is None:
        raise RuntimeError(f"attnforge.jit: {path} holds no kernel after it was compiled")
    return path, shape


def _kept(path: Path) -> Shape | None:
    """The kernel of a file that is there, is this user's own and is an ELF image."""
    try:
        if _files.distrust(path.lstat(), "file") is not None:
            return None
        image = path.read_bytes()
    except FileNotFoundError:
        return None
    return shape_of(image) if image.startswith(b"\x7fELF") else None


def _compile(program: Program, source: str, arch: str) -> bytes:
    try:
        return _nvrtc.compile(source, arch, _headers.headers())
    except _nvrtc.Failure as failure:
        raise _explained(program, failure.log) from None


def _explained(program: Program, log: str) -> Exception:
    """The first error in a snippet with its line; the whole log where there is none."""
    found = _ERROR.search(log)
    if found is None:
        return CompileError(f"attnforge.jit: a kernel does not compile:\n{log}", log)
    kind, line, text = found[1], int(found[2]), found[3]
    source = next(mod.source for mod in program.mods if mod.kind == kind).splitlines()
    shown = f"\n{line:>5} | {source[line - 1]}" if line <= len(source) else ""
    return CompileError(f"attnforge.jit: {kind}_mod, line {line}: {text}{shown}", log)
