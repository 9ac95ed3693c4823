"""The gate before an upload: tags, size, contents. test_distributions has a built wheel."""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TAG = "cp311-cp311-manylinux_2_35_x86_64"
BUILT = "built by nvcc 13.0.1 for 80 90 90a 100"


def toy(folder: Path, *, tag: str = TAG, libraries: tuple[str, ...], cuda: str = BUILT) -> Path:
    path = folder / f"attnforge-0.0-{tag}.whl"
    info = {"isa_levels": ["baseline", "avx512_soft", "avx2", "avx512"], "cuda": cuda}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("attnforge-0.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr("attnforge/_build_info.json", json.dumps(info))
        for name in libraries:
            archive.writestr(name, bytes(10_000))
    return path


CPU, CUDA = "attnforge/lib/libattnforge_cpu.so", "attnforge/lib/libattnforge_cuda.so"


def test_a_whole_wheel_passes(
    wheel_tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy(tmp_path, libraries=(CPU, CUDA))
    assert wheel_tool.main(["--release", "--check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "libattnforge_cuda.so" in shown
    assert "for 80 90 90a 100" in shown


@pytest.mark.parametrize(
    ("changes", "release", "words"),
    [
        ({"tag": "cp311-cp311-linux_x86_64"}, False, "not manylinux"),
        ({"libraries": (CUDA,)}, False, "no libattnforge_cpu.so"),
        ({"libraries": (CPU, "attnforge.libs/libgomp-a1.so.1")}, False, "libgomp"),
        ({"libraries": (CPU,), "cuda": "left out: no nvcc"}, True, "no libattnforge_cuda.so"),
        ({"cuda": "built by nvcc 13.0.1 for 80 90a"}, True, "lack 100, 90"),
    ],
)
def test_refused(
    wheel_tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    release: bool,
    words: str,
) -> None:
    path = toy(tmp_path, **{"libraries": (CPU, CUDA), **changes})  # type: ignore[arg-type]
    assert wheel_tool.main([*(["--release"] if release else []), "--check", str(path)]) == 1
    assert words in capsys.readouterr().err


def test_a_development_wheel_may_lack_cuda(wheel_tool: ModuleType, tmp_path: Path) -> None:
    path = toy(tmp_path, libraries=(CPU,), cuda="left out: no nvcc")
    assert wheel_tool.main(["--check", str(path)]) == 0


def test_size_and_levels_are_limited(wheel_tool: ModuleType, tmp_path: Path) -> None:
    report = wheel_tool.inspect(toy(tmp_path, libraries=(CPU, CUDA)))
    assert wheel_tool.complaints(report, release=True) == []
    fat = dataclasses.replace(report, bytes=60_000_001)
    assert wheel_tool.complaints(fat, release=False) == ["60.0 MB, more than 60"]
    thin = dataclasses.replace(report, levels=("baseline",))
    assert wheel_tool.complaints(thin, release=True) == ["CPU kernels lack avx2, avx512"]


def test_default_architectures_are_read_from_the_build(wheel_tool: ModuleType) -> None:
    assert {"80", "90", "90a", "100"} <= set(wheel_tool.default_archs())


@pytest.mark.parametrize(
    ("python", "words"),
    [(sys.executable, "the Python which builds"), ("/no/python9", "No such file or directory")],
)
def test_interpreters_are_looked_at_before_a_build(
    wheel_tool: ModuleType, tmp_path: Path, python: str, words: str
) -> None:
    with pytest.raises(SystemExit, match=words):
        wheel_tool.build(tmp_path, [python])
    assert list(tmp_path.iterdir()) == []
