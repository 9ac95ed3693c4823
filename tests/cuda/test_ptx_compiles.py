"""ptxas accepts every instruction of `csrc/cuda/ptx/`, on each architecture that has it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
HEADERS = sorted((ROOT / "csrc" / "cuda" / "ptx").glob("*.h"))
ARCHITECTURES = {
    "ptx_sm80.cu": ("80", "89", "90a", "100f"),
    "ptx_sm89.cu": ("89", "90a", "100f"),
    "ptx_sm90a.cu": ("90a",),
}
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: no PTX was compiled")
@pytest.mark.parametrize(
    ("source", "architecture"), [(s, a) for s, many in ARCHITECTURES.items() for a in many]
)
def test_compiles(source: str, architecture: str, tmp_path: Path) -> None:
    assert NVCC is not None
    command = [NVCC, "-std=c++20", f"-arch=sm_{architecture}", "-cubin", f"-I{ROOT / 'csrc'}"]
    output = tmp_path / "out.cubin"
    done = subprocess.run(
        [*command, "-Werror", "all-warnings", "-o", str(output), str(HERE / source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.stat().st_size > 0


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.stem)
def test_every_function_is_compiled(header: Path) -> None:
    functions = set(
        re.findall(r"^AF_DEVICE [\w:<> ]+?[ *](\w+)\(", header.read_text(), re.MULTILINE)
    )
    used = "".join((HERE / source).read_text() for source in ARCHITECTURES)
    assert {name for name in functions if not re.search(rf"ptx::{name}\b", used)} == set()


def test_launchers_allocate_nothing_and_wait_for_nothing() -> None:
    """All that is asked of the CUDA runtime; each of it may stand in a captured graph."""
    sources = [*(ROOT / "csrc" / "cuda").rglob("*"), *(ROOT / "csrc" / "bindings").glob("*cuda*")]
    text = "".join(p.read_text() for p in sources if p.suffix in {".h", ".cu", ".cpp"})
    assert set(re.findall(r"\b(cu(?:da)?[A-Z]\w*)\(", text)) == {
        *("cudaDeviceGetAttribute", "cudaDriverGetVersion", "cudaFuncSetAttribute"),
        *("cudaGetDevice", "cudaGetDriverEntryPointByVersion", "cudaGetErrorString"),
        *("cudaGetLastError", "cudaRuntimeGetVersion"),
    }


def test_assembly_stands_in_one_place() -> None:
    """Inline PTX is in `csrc/cuda/ptx/` and nowhere else below `csrc/cuda/`."""
    cuda = ROOT / "csrc" / "cuda"
    found = [
        path.relative_to(cuda)
        for path in sorted(cuda.rglob("*"))
        if path.suffix in {".h", ".cuh", ".cu", ".cpp"}
        and path.parent != cuda / "ptx"
        and re.search(r"\basm\b", path.read_text())
    ]
    assert found == []
