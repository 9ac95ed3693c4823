"""Files of results: one readable JSON file per device and operator, safe to share and to lose.

A file is read only if this user owns it, it is a plain file that not everybody may write, and it
has a sane size; its content is parsed as JSON and checked, never executed. Writing merges under a
lock into what is there, through a temporary file in the same directory, ``fsync`` and ``rename``:
a reader, or a writer killed at any time, leaves a whole file behind. No lock is held while
anything is measured.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnforge import _files, _settings
from attnforge.tuning.entry import Entry

__all__ = ["directory", "file_of", "merge", "read", "tables_directory", "write_text"]

MAX_BYTES = 4 << 20  # thousands of buckets
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


def _load(path: Path, trusted: bool) -> dict[str, Any]:
    """The raw entries of a file by key; ValueError with the reason if it cannot be used."""
    descriptor = os.open(path, os.O_RDONLY | (0 if trusted else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not trusted and (why := _files.distrust(status, "file")) is not None:
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
    if not shipped and (why := _files.distrust_folder(path.parent)) is not None:
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
    if (why := _files.make_folder(folder)) is not None:
        raise RuntimeError(
            f"attnforge.tune: results cannot be written to {folder}: {why}; remove it, or set "
            f"{_settings.CACHE_DIR} to a directory of yours"
        )
    with _files.locked(path, "attnforge.tune", "tune"):
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


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old content or the new, whatever happens."""
    _files.replace(path, text.encode())
