"""Every shipped tile of every Triton kernel compiles for every class of GPU, within its budget.

Compilation says nothing about values (the interpreter does) and nothing about speed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from attnforge.triton_kernels.flash import config
from attnforge.triton_kernels.flash.config import SHARED_LIMIT

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


budgets = load(ROOT / "tools" / "triton_budgets.py")
TABLE = json.loads(budgets.TABLE.read_text())
TENSOR_COLUMNS = 512  # of tensor memory; more compiles to an empty kernel
# What multiplies 16-bit tiles in the forward: anything else would be many times slower.
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
KERNELS = ("fwd", "delta", "dkdv", "dq", "decode", "merge")
PRODUCTS = ("fwd", "dkdv", "dq", "rows", "keys", "delta_fwd", "delta_bwd")
# Forward, dq, dk and dv are one kernel; a denominator needs delta, a scalar gate over_time.
WALKS = ["walk", "walk-2", "walk-3", "walk-4"]
LINEAR = {
    "linear-scalar": ["delta", "over_time", "step", *WALKS],
    "linear-key": ["delta", "step", *WALKS],
    "delta-key": ["delta_bwd", "delta_fwd", "step"],
}


def kernels(variant: budgets.Variant) -> list[str]:  # type: ignore[name-defined]
    """What a variant launches."""
    if variant.mods == "cope":
        return ["delta", "fwd", "keys", "rows"]
    if variant.mods in budgets.PAGED:
        problem = budgets.PAGED[variant.mods]
        several = ["merge"] if problem.keys > 2048 else []
        return sorted(["fwd", *several, *["append", "bounds"] * problem.writes])
    if variant.mods in budgets.LINEAR:
        return LINEAR[variant.mods]
    if variant.dtype.itemsize == 1:
        return ["decode", "fwd", "merge"]
    return sorted([*KERNELS, *["dbias"] * (variant.mods == "biases")])


@pytest.mark.parametrize(
    ("arch", "variant"),
    [(arch, variant) for variant in budgets.VARIANTS for arch in variant.archs],
    ids=lambda x: str(x) if isinstance(x, int) else x.name,
)
def test_within_budget(arch: int, variant: budgets.Variant) -> None:  # type: ignore[name-defined]
    import triton

    found = budgets.measure(arch, variant)
    assert sorted(found) == kernels(variant)
    same_compiler = triton.__version__ == TABLE["triton"]
    wrong = []
    for kernel, (used, compiled) in found.items():
        name = budgets.row_name(arch, variant, kernel)
        budget = TABLE["kernels"].get(name)
        if budget is None:
            wrong.append(f"{name}: not in the table")
        for key in ("stack", "hot_spills") if same_compiler and budget else ():
            if used[key] > budget[key]:
                wrong.append(f"{name}: {key} {used[key]}, budget {budget[key]}")
        if used["shared"] > SHARED_LIMIT[f"sm_{arch}"]:
            wrong.append(f"{name}: {used['shared']} bytes of shared memory")
        if used["tensor_columns"] > TENSOR_COLUMNS:
            wrong.append(f"{name}: {used['tensor_columns']} columns of tensor memory")
        if kernel in (*PRODUCTS, *WALKS) and variant.dtype.itemsize < 4:
            # Tiles of cope and of fp8 may be too short for wgmma and tcgen05.
            small = {"cope", "descales", *budgets.PAGED.keys() - {"many-rows"}}
            large = kernel == "fwd" and variant.mods not in small
            product = TENSOR_CORE[arch] if large else "mma."
            if product not in compiled.asm["ptx"]:
                wrong.append(f"{name}: no {product}")
    assert not wrong, "\n".join([*wrong, "after a reason: python tools/triton_budgets.py --write"])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [90, 100])
def test_forward_by_descriptors(monkeypatch: pytest.MonkeyPatch, arch: int, head_dim: int) -> None:
    """TMA loads in place of others, without spills."""
    choose = config.choose
    monkeypatch.setattr(
        config, "choose", lambda kernel, shape: {**choose(kernel, shape), "USE_TMA": 1}
    )
    with budgets.compiling(arch) as found:
        budgets.forward(budgets.Variant(torch.bfloat16, head_dim, causal=True))
    ((_, kernel),) = found
    used = budgets.resources(kernel)
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert used["shared"] <= SHARED_LIMIT[f"sm_{arch}"]
    assert used["hot_spills"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("arch", budgets.ARCHS)
def test_latent_decode(arch: int, dtype: torch.dtype) -> None:
    """Head dims 576 and 512 fit everywhere; a forward of 512 values does too."""
    with budgets.compiling(arch) as found:
        budgets.latent(dtype)
    names = [name.rpartition(".")[2] for name, _ in found]
    assert names == ["decode", "merge", "fwd", "fwd"]  # the last of pages, in one split
    for name, kernel in found:
        used = budgets.resources(kernel)
        assert used["shared"] <= SHARED_LIMIT[f"sm_{arch}"], name
        assert used["tensor_columns"] <= TENSOR_COLUMNS, name
        assert used["hot_spills"] == 0, name


REDUCTIONS = {"column_sums", "span_mass", "row_entropy", "block_max", "topk_keys", "edges",
              "span_dq", "span_dk", "delta"}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("arch", budgets.ARCHS)
def test_reductions(arch: int, head_dim: int) -> None:
    with budgets.compiling(arch) as found:
        budgets.reductions(torch.bfloat16, head_dim)
    assert {name.rpartition(".")[2] for name, _ in found} == REDUCTIONS
    for name, kernel in found:
        assert kernel.metadata.shared <= SHARED_LIMIT[f"sm_{arch}"], name


@pytest.mark.parametrize(("head_dim", "q_block"), [(64, 64), (128, 1), (256, 64)])
@pytest.mark.parametrize("arch", budgets.ARCHS)
def test_block_sparse(arch: int, head_dim: int, q_block: int) -> None:
    """Lists of a query and its group (NSA), and of square blocks; tensor cores multiply."""
    with budgets.compiling(arch) as found:
        budgets.block_sparse(head_dim, q_block, 64)
    assert [name.rpartition(".")[2] for name, _ in found] == ["fwd", "delta", "dkdv", "dq"]
    for name, kernel in found:
        used = budgets.resources(kernel)
        assert used["shared"] <= SHARED_LIMIT[f"sm_{arch}"], name
        assert used["tensor_columns"] <= TENSOR_COLUMNS, name
        assert used["hot_spills"] == 0, name
        assert name.endswith("delta") or "mma" in kernel.asm["ptx"], name


@pytest.mark.parametrize("mods", LINEAR)
def test_linear_fits_blackwell(mods: str) -> None:
    variant = budgets.Variant(torch.bfloat16, 128, causal=True, mods=mods)
    found = budgets.measure(100, variant)
    assert sorted(found) == LINEAR[mods]
    for kernel, (used, compiled) in found.items():
        assert used["shared"] <= SHARED_LIMIT["sm_100"], kernel
        assert used["tensor_columns"] <= TENSOR_COLUMNS, kernel
        assert kernel not in (*PRODUCTS, *WALKS) or "mma." in compiled.asm["ptx"], kernel


@pytest.mark.parametrize(("head_dim", "top_n"), [(64, 64), (128, 16), (256, 16)])
@pytest.mark.parametrize("arch", [80, 90])
def test_nsa(arch: int, head_dim: int, top_n: int) -> None:
    with budgets.compiling(arch) as found:
        budgets.nsa(head_dim, top_n)
    assert [name.rpartition(".")[2] for name, _ in found] == ["importance", "choose"]
    for name, kernel in found:
        used = budgets.resources(kernel)
        assert used["shared"] <= SHARED_LIMIT[f"sm_{arch}"], name
        assert used["hot_spills"] == 0, name
        assert "mma" in kernel.asm["ptx"], name


def test_table_has_no_rows_of_the_past() -> None:
    known = {
        budgets.row_name(arch, variant, kernel)
        for variant in budgets.VARIANTS
        for arch in variant.archs
        for kernel in kernels(variant)
    }
    assert TABLE["kernels"].keys() == known
