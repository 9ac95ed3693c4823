"""What the native library needs from torch and the system, and what it shows of itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnforge import _native

pytestmark = pytest.mark.native

SYSTEM = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|ld-linux.*)\.so[.\d]*")
SHIM = re.compile(r"(aoti_torch_|torch_)\w+")
VERSIONED = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
OPTIONAL = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}


@pytest.fixture(scope="module")
def library() -> Path:
    path = _native.library_path()
    if not path.is_file():
        pytest.skip("libattnforge_cpu.so is not built")
    if shutil.which("readelf") is None:
        pytest.skip("readelf and nm (binutils) are not installed")
    return path


def output(*command: str | Path) -> list[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def test_needs_libtorch_cpu_alone(library: Path) -> None:
    lines = output("readelf", "-d", library)
    needed = {m[1] for line in lines if (m := re.search(r"NEEDED.*\[(.+)\]", line))}
    assert {name for name in needed if not SYSTEM.fullmatch(name)} == {"libtorch_cpu.so"}
    assert not [line for line in lines if "RPATH" in line or "RUNPATH" in line]


def test_torch_symbols_are_stable_shims(library: Path) -> None:
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library)]
    torch = [s for s in undefined if not VERSIONED.search(s) and s not in OPTIONAL]
    assert torch
    assert [s for s in torch if not SHIM.fullmatch(s)] == []


def test_exports_no_kernel(library: Path) -> None:
    """Other libraries of the process can neither call nor replace what is inside."""
    exported = [line.split()[-1] for line in output("nm", "-DC", "--defined-only", library)]
    assert [s for s in exported if "attnforge" in s] == []


def test_size_of_all_levels(library: Path) -> None:
    """It is most of the wheel, where it is stored with about a third of its size."""
    assert library.stat().st_size < 32 << 20


def test_abi_audit(library: Path) -> None:
    pytest.importorskip("torch_abi_audit", reason="torch-abi-audit needs Python 3.11")
    tool = Path(sys.executable).parent / "torch-abi-audit"
    report = subprocess.run(
        [str(tool), "--json", "--check", "torch", str(library)], capture_output=True, text=True
    )
    assert report.returncode == 0, report.stdout + report.stderr
    text = json.dumps(json.loads(report.stdout))
    assert re.search(r'"2\.10(\.0)?"', text), text


def test_host_module_agrees_with_the_library(library: Path) -> None:
    host = pytest.importorskip("attnforge._host")
    features = host.cpu_features()
    levels = _native.isa_levels()
    assert set(levels) <= set(host.build_info()["isa_levels"])
    if features:
        assert {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16"} <= set(features)
        assert ("avx2" in levels) == (features["avx2"] and features["fma"] and features["f16c"])
        wide = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
        assert ("avx512" in levels) == all(features[name] for name in wide)
        # The system may refuse tiles that the CPU has.
        assert "amx" not in levels or (features["amx_bf16"] and features["avx512_bf16"])
