"""Files of results: one readable JSON file per device and operator, safe to share and to lose.

A file is read only if this user owns it, it is a plain file that not everybody may write, and it
has a sane size; its content is parsed as JSON and checked, never executed. Writing merges under a
lock into what is there, through a temporary file in the same directory, ``fsync`` and ``rename``:
a reader, or a writer killed at any time, leaves a whole file behind. No lock is held while
anything is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attnforge import _settings
from attnforge.tuning.entry import Entry

__all__ = ["directory", "file_of", "merge", "read", "tables_directory", "write_text"]

MAX_BYTES = 4 << 20  # thousands of buckets
LOCK_TIMEOUT_S = 60.0
_warned: set[tuple[str, str]] = set()


def directory() -> Path:
    """The user's directory of results (not created by this call)."""
    return _settings.cache_dir() / "tune"


def tables_directory() -> Path:
    """Results that come with the package: read only."""
    return Path(__file__).parent / "tables"


def file_of(folder: Path, op: str, device: str) -> Path:
    """The file of one operator on one device."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{op}.{slug}.json"


def warn_once(path: Path, why: str) -> None:
    """One warning per file and reason in a process."""
    if (str(path), why) not in _warned:
        _warned.add((str(path), why))
        warnings.warn(f"attnforge: tuning results in {path} are ignored: {why}", RuntimeWarning, 3)


def _distrust(status: os.stat_result, kind: str) -> str | None:
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


def _distrust_folder(folder: Path) -> str | None:
    """Why the user's directory must not be used; None also if it is not there yet."""
    with contextlib.suppress(FileNotFoundError):
        # Who may write the parent may replace the directory. A link there is the user's own affair.
        return _distrust(folder.parent.stat(), "directory") or _distrust(
            folder.lstat(), "directory"
        )
    return None


def _load(path: Path, trusted: bool) -> dict[str, Any]:
    """The raw entries of a file by key; ValueError with the reason if it cannot be used."""
    descriptor = os.open(path, os.O_RDONLY | (0 if trusted else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not trusted and (why := _distrust(status, "file")) is not None:
            raise ValueError(why)
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it has {status.st_size} bytes; at most {MAX_BYTES} are read")
        text = file.read(MAX_BYTES + 1)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    entries = data.get("entries") if isinstance(data, dict) else None
    if not isinstance(entries, dict):
        raise ValueError("it has no object 'entries'")
    return entries


def read(path: Path, *, shipped: bool = False) -> list[Entry]:
    """Entries of a file that are well-formed and of this schema; [] if there is no usable file.

    Whatever is not used is said in one warning.
    """
    if not shipped and (why := _distrust_folder(path.parent)) is not None:
        warn_once(path.parent, why)
        return []
    try:
        raw = _load(path, shipped)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        link = " (the file is a symbolic link)" if path.is_symlink() and not shipped else ""
        warn_once(path, f"{error}{link}")
        return []
    found, bad = [], 0
    for item in raw.values():
        try:
            entry = Entry.from_json(item)
        except (ValueError, RecursionError):
            bad += 1
            continue
        if entry is not None:
            found.append(entry)
    if bad:
        warn_once(path, f"{bad} of {len(raw)} entries are malformed")
    return found


def merge(op: str, device: str, entries: Iterable[Entry]) -> Path:
    """Write entries into the user's file, beside all others that are there; returns its path.

    RuntimeError if the extra ``tune`` is missing or the directory must not be used.
    """
    folder = directory()
    path = file_of(folder, op, device)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    if (why := _distrust_folder(folder)) is not None:
        raise RuntimeError(
            f"attnforge.tune: results cannot be written to {folder}: {why}; remove it, or set "
            f"{_settings.CACHE_DIR} to a directory of yours"
        )
    with _locked(path):
        raw: dict[str, Any] = {}
        try:
            raw = _load(path, trusted=False)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # out of the way, but not lost
            warn_once(path, f"{error}; it is kept as {path.name}.unusable")
            os.replace(path, path.with_name(f"{path.name}.unusable"))
        raw.update((entry.key, entry.to_json()) for entry in entries)
        text = json.dumps({"op": op, "device": device, "entries": raw}, indent=1)
        write_text(path, text + "\n")
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        from filelock import FileLock
    except ImportError:
        raise RuntimeError(
            "attnforge.tune: keeping results needs the package filelock; install the extra: "
            "pip install 'attnforge[tune]'"
        ) from None
    with FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
        yield


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old content or the new, whatever happens."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
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
