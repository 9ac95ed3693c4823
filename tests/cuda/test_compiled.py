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
from attnforge.backends.cuda import flash, paged

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
def measured() -> dict[str, dict[str, int]]:
    pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with Triton's wheel")
    return cuda_budgets.measure()


@needs_library
def test_loads_and_registers_without_a_gpu() -> None:
    assert _native_cuda.unavailable() is None
    for name in ("flash_fwd", "flash_bwd", "flash_decode", "merge_states", "paged_fwd",
                 "paged_append"):  # fmt: skip
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
    assert dims == {*flash.HEAD_DIMS, *paged.HEAD_DIMS, paged.LATENT}
    kinds = {spec.id.split(".")[2] for spec in flash.SPECS} - {"merge"}
    owners = {"dk": "bwd", "dv": "bwd", "dkdv": "bwd", "dq": "bwd"}
    found = {name.split(".")[0].removesuffix("_codes") for name in ids}
    paged_kinds = {"paged_prefill", "paged_decode", "paged_latent"}
    assert {owners.get(name, name) for name in found} == kinds | paged_kinds
    assert {row.split("/")[1] for row in table} == set(ids)


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


def test_explain_shows_the_kernels_for_a_gpu() -> None:
    shape = (1, 4096, 32, 128)
    text = str(
        attnforge.explain(attnforge.flash_attention, shape, shape, shape, dtype="bf16",
                          device="cuda:sm_90")
    )  # fmt: skip
    assert "cuda.flash.fwd.sm80" in text
    old = str(
        attnforge.explain(attnforge.flash_attention, shape, shape, shape, dtype="bf16",
                          device="cuda:sm_75")
    )  # fmt: skip
    assert "sm_80 or newer" in old
