"""Object files of the in-place build, one set per ISA level."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"


@pytest.fixture(scope="session")
def objects() -> dict[str, list[Path]]:
    """ISA level -> its object files. Skips without an in-place build or without binutils."""
    if shutil.which("objdump") is None or shutil.which("nm") is None:
        pytest.skip("objdump and nm (binutils) are not installed")
    found = {
        folder.name.removeprefix("attnforge_cpu_").removesuffix(".dir"): sorted(folder.rglob("*.o"))
        for folder in sorted((BUILD / "CMakeFiles").glob("attnforge_cpu_*.dir"))
    }
    found = {level: paths for level, paths in found.items() if paths}
    if not found:
        pytest.skip("no object files: run `make native`")
    return found
