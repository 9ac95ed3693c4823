"""Files that are shared between processes and kept between runs: trust, locks, replacement.

A directory is used only if it is this user's own and not everybody's to write, the same for a
file. Writing goes through a temporary file in the same directory, ``fsync`` and ``rename``: a
reader, or a writer killed at any time, leaves a whole file behind.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["distrust", "distrust_folder", "locked", "make_folder", "replace"]

LOCK_TIMEOUT_S = 60.0


def distrust(status: os.stat_result, kind: str) -> str | None:
    """Why a file or directory must not be used, or None."""
    right = stat.S_ISDIR if kind == "directory" else stat.S_ISREG
    if stat.S_ISLNK(status.st_mode):
        return f"the {kind} is a symbolic link"
    if not right(status.st_mode):
        return f"it is not a {kind}"
    if status.st_uid != os.getuid():
        return f"the {kind} belongs to user {status.st_uid}, not to {os.getuid()}"
    if status.st_mode & stat.S_IWOTH:
        return f"everybody may write the {kind} (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def distrust_folder(folder: Path) -> str | None:
    """Why the user's directory must not be used; None also if it is not there yet."""
    with contextlib.suppress(FileNotFoundError):
        # Who may write the parent may replace the directory. A link there is the user's own affair.
        return distrust(folder.parent.stat(), "directory") or distrust(folder.lstat(), "directory")
    return None


def make_folder(folder: Path) -> str | None:
    """Make the user's directory if it is not there; why it must not be used, or None."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    return distrust_folder(folder)


@contextlib.contextmanager
def locked(path: Path, where: str, extra: str, timeout: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock of a file; RuntimeError that names the extra if filelock is missing."""
    try:
        from filelock import FileLock
    except ImportError:
        raise RuntimeError(
            f"{where}: keeping results needs the package filelock; install the extra: "
            f"pip install 'attnforge[{extra}]'"
        ) from None
    with FileLock(path.with_suffix(".lock"), timeout=timeout):
        yield


def replace(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, whatever happens."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
