"""The compiled CUDA library, without a GPU: it loads, registers, and stays inside its budgets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnforge
from attnforge import _native_cuda
from attnforge.backends.cuda import block_sparse, flash, linear, paged

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import cuda_budgets

needs_library = pytest.mark.skipif(
    not cuda_budgets.LIBRARY.is_file(), reason="libattnforge_cuda.so is not built (no nvcc)"
)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = json.loads(cuda_budgets.TABLE.read_text())["kernels"]
    return rows


@pytest.fixture(scope="module")
def sass() -> dict[str, str]:
    pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with Triton's wheel")
    return cuda_budgets.code()


@pytest.fixture(scope="module")
def measured(sass: dict[str, str]) -> dict[str, dict[str, int]]:
    return cuda_budgets.measure(sass=sass)


@needs_library
def test_loads_and_registers_without_a_gpu() -> None:
    assert _native_cuda.unavailable() is None
    for name in ("flash_fwd", "flash_bwd", "flash_decode", "merge_states", "paged_fwd",
                 "paged_append", "linear_chunk_fwd", "linear_chunk_bwd", "linear_step",
                 "delta_chunk_fwd", "delta_chunk_bwd", "delta_step", "diag_scan_fwd",
                 "diag_scan_bwd", "block_sparse_fwd", "block_sparse_bwd",
                 "indexed_fwd", "indexed_bwd", "key_scores", "page_scores", "select_columns",
                 "lsh_encode", "lsh_insert", "lsh_truncate", "lsh_retrieve"):  # fmt: skip
        operator = _native_cuda.operator(name)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU")


@needs_library
def test_needs_libtorch_cpu_alone() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    command = ["readelf", "-d", str(cuda_budgets.LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", text))
    system = re.compile(
        r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux.*)\.so[.\d]*"
    )
    assert {name for name in needed if not system.fullmatch(name)} == {"libtorch_cpu.so"}


@needs_library
def test_kernel_ids_are_those_of_the_specs(table: dict[str, dict[str, int]]) -> None:
    ids = _native_cuda.build()["kernels"].split()
    assert len(ids) == len(set(ids)) > 100
    dims = {tuple(map(int, m)) for name in ids for m in re.findall(r"\.d(\d+)x(\d+)", name)}
    walks = {(dim, linear.COLUMNS) for dim in linear.DIMS}
    pages = {*paged.HEAD_DIMS, paged.LATENT}
    assert dims == {*flash.HEAD_DIMS, *pages, *walks, *block_sparse.HEAD_DIMS}
    lists = {"decode_sm90.bf16": flash.DECODE_DIMS, "fwd_sm90.fp8": flash.FP8_DIMS}
    for prefix, pairs in lists.items():
        listed = [name.split(".d")[1].split(".")[0] for name in ids if name.startswith(prefix)]
        assert listed in ([], [f"{d}x{dv}" for d, dv in pairs])
    kinds = {spec.id.split(".")[2] for spec in flash.SPECS} - {"merge"}
    owners = dict.fromkeys(("dk", "dv", "dkdv", "dq"), "bwd") | {"latent": "decode"}
    kernels = {name.split(".")[0] for name in ids}
    found = {name.removesuffix("_codes").removesuffix("_sm90") for name in kernels}
    paged_kinds = {"paged_prefill", "paged_decode", "paged_latent"}
    listed = {name for name in found if name.startswith("listed_")}
    short = {name.removeprefix("listed_").removesuffix("_few") for name in listed}
    assert {owners.get(name, name) for name in short} == {"fwd", "bwd"}
    found -= listed
    walk_kinds = {
        *(f"linear_{gate}" for gate in cuda_budgets.WALK_GATES),
        *(f"linear_wide_{gate}" for gate in ("whole", "columns")),
        *(f"linear_delta_{gate}{way}" for gate in ("whole", "read") for way in ("", "_reverse")),
    }
    indexed = {f"indexed_{kind}" for kind in ("fwd", "dq", "dk", "dv", "dkdv")}
    known = kinds | paged_kinds | walk_kinds | indexed | {"key_scores"}
    assert {owners.get(name, name) for name in found} == known
    for arch in ("sm_80", "sm_90a"):
        mine = {name for name in ids if ("sm90" in name) == (arch == "sm_90a")}
        rows = {row.split("/")[1] for row in table if row.startswith(f"{arch}/")}
        assert mine == rows or (arch == "sm_90a" and not mine)  # which a build may leave out


@needs_library
def test_budgets(table: dict[str, dict[str, int]], measured: dict[str, dict[str, int]]) -> None:
    # a library may be built for fewer architectures than the table has
    assert measured
    wrong = [
        f"{name}: {key} is {row[key]}, {table[name][key]} is in the table"
        for name, row in measured.items()
        for key in row
        if name in table and row[key] > table[name][key]
    ]
    assert wrong == []
    assert set(measured) <= set(table)


def test_launches_are_held_to_the_table() -> None:
    """What `tools/cuda_budgets.py --launches` says of a run of the emulator's tests."""
    table = {"sm_80/a": {"shared": 64}, "sm_80/b": {"shared": 32}, "sm_90a/c": {"registers": 1}}
    assert cuda_budgets.check_launches(table, {"sm_80/a": 64, "sm_80/b": 48, "sm_80/d": 8}) == [
        "sm_90a/c: no test has launched it",
        "sm_80/b: 48 bytes of shared memory, 32 are in the table",
        "sm_80/d: 8 bytes of shared memory, none are in the table",
    ]


@pytest.fixture(scope="module")
def hopper(sass: dict[str, str]) -> dict[str, str]:
    found = {name: text for name, text in sass.items() if name.startswith("sm_90a/")}
    if not found:
        assert "sm90" not in _native_cuda.build()["kernels"]
        pytest.skip("the library was built without 90a")
    assert len(found) == sum("sm90" in name for name in _native_cuda.build()["kernels"].split())
    return found


@needs_library
def test_sm90a_kernels_use_what_that_gpu_has(
    hopper: dict[str, str], table: dict[str, dict[str, int]]
) -> None:
    for name, text in hopper.items():
        used = set(re.findall(r"\b(HGMMA|QGMMA|UTMALDG|SYNCS|USETMAXREG|HMMA|LDGSTS)\b", text))
        product = "QGMMA" if ".fp8." in name else "HGMMA"
        rows = {"LDGSTS"} if re.search(r"/(decode|latent)_sm90\.", name) else set()  # of Q
        assert used == {product, "UTMALDG", "SYNCS", "USETMAXREG"} | rows, name
        assert table[name]["hot_spills"] == 0, name
        assert not re.findall(r"\b(?:LDL|STL)\b", text), name


def registers_of(name: str) -> tuple[int, int]:
    """What setmaxnreg leaves a thread of the producer and of the consumers."""
    kind = name.split("/")[1]
    if kind.startswith("fwd_sm90.fp8"):
        return 40, 232  # the producer's other warps transpose V
    if kind.startswith("decode_sm90") and not kind.endswith(("256x256.features", "512.features")):
        return 24, 232  # two blocks on a multiprocessor
    if kind.startswith("fwd_sm90") and kind.endswith(".d64x64"):
        return 32, 160  # three groups
    return 24, 240


@needs_library
def test_roles_stay_inside_their_registers(hopper: dict[str, str]) -> None:
    # code of the producer lies between the two setmaxnreg, that of the consumers behind them
    for name, text in hopper.items():
        _, producer, consumers = re.split(r"\bUSETMAXREG\b", text)
        assert "UTMALDG" in producer, name
        assert "UTMALDG" not in consumers, name
        assert "GMMA" not in producer, name
        assert "GMMA" in consumers, name
        for part, most in zip((producer, consumers), registers_of(name), strict=True):
            assert max(map(int, re.findall(r"\bR(\d+)\b", part))) < most, name


def test_explain_shows_the_kernels_for_a_gpu() -> None:
    shape = (1, 4096, 32, 128)
    text = str(
        attnforge.explain(attnforge.flash_attention, shape, shape, shape, dtype="bf16",
                          device="cuda:sm_90")
    )  # fmt: skip
    assert "cuda.flash.fwd.sm80" in text
    assert "cuda.flash.fwd.sm90" in text
    old = str(
        attnforge.explain(attnforge.flash_attention, shape, shape, shape, dtype="bf16",
                          device="cuda:sm_75")
    )  # fmt: skip
    assert "sm_80 or newer" in old
    assert "needs arch sm_90; the device is sm_75" in old
