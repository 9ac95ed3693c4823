"""Every shipped tile of every Triton kernel compiles for every class of GPU, within its budget.

Compilation says nothing about values (the interpreter does) and nothing about speed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

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
        several = ["merge"] if problem.keys > 2048 or problem.plan else []
        return sorted(["fwd", *several, *["append", "bounds"] * problem.writes])
    if variant.mods in budgets.LINEAR:
        return LINEAR[variant.mods]
    if variant.dtype.itemsize == 1:
        return ["decode", "fwd", "merge"]
    return sorted([*KERNELS, *["dbias"] * (variant.mods == "biases")])


def points(axis: Iterable[Any], often: set[tuple[int, Any]], always: int = 90) -> list[Any]:
    """(architecture, value), for all four or a variant's own: ``often`` and ``always`` in every
    run, the others exhaustive."""
    return [
        pytest.param(
            arch,
            value,
            id=f"{arch}-{getattr(value, 'name', value)}",
            marks=() if arch == always or (arch, value) in often else pytest.mark.exhaustive,
        )
        for value in axis
        for arch in getattr(value, "archs", budgets.ARCHS)
    ]


# Every variant for sm_80 or sm_90 in turn, the smallest shared memory (86), and what is short of
# tensor memory (100).
OFTEN = {((80, 90)[n % 2], variant) for n, variant in enumerate(budgets.VARIANTS)}
OFTEN |= {
    (arch, budgets.Variant(dtype, head_dim))
    for arch, dtype, head_dim in (
        (86, torch.bfloat16, 256), (86, torch.float32, 128), (90, torch.bfloat16, 128),
        (100, torch.bfloat16, 64), (100, torch.bfloat16, 128), (100, torch.bfloat16, 256),
        (100, torch.float32, 64),
    )
}  # fmt: skip


@pytest.mark.parametrize(("arch", "variant"), points(budgets.VARIANTS, OFTEN, always=0))
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


@pytest.mark.parametrize(
    ("arch", "dtype"),
    points((torch.bfloat16, torch.float32), {(80, torch.float32), (100, torch.bfloat16)}),
)
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


@pytest.mark.parametrize(("arch", "head_dim"), points((64, 256), {(80, 256), (100, 64)}))
def test_reductions(arch: int, head_dim: int) -> None:
    with budgets.compiling(arch) as found:
        budgets.reductions(torch.bfloat16, head_dim)
    assert {name.rpartition(".")[2] for name, _ in found} == REDUCTIONS
    for name, kernel in found:
        assert kernel.metadata.shared <= SHARED_LIMIT[f"sm_{arch}"], name


@pytest.mark.parametrize(
    ("arch", "sizes"),
    points(((64, 64), (128, 1), (256, 64)), {(80, (128, 1)), (86, (256, 64)), (100, (64, 64))}),
)
def test_block_sparse(arch: int, sizes: tuple[int, int]) -> None:
    """Lists of a query and its group (NSA), and of square blocks; tensor cores multiply."""
    head_dim, q_block = sizes
    with budgets.compiling(arch) as found:
        budgets.block_sparse(head_dim, q_block, 64)
    assert [name.rpartition(".")[2] for name, _ in found] == ["fwd", "delta", "dkdv", "dq"]
    for name, kernel in found:
        used = budgets.resources(kernel)
        assert used["shared"] <= SHARED_LIMIT[f"sm_{arch}"], name
        assert used["tensor_columns"] <= TENSOR_COLUMNS, name
        assert used["hot_spills"] == 0, name
        assert name.endswith("delta") or "mma" in kernel.asm["ptx"], name


INDEXED = ["indexed_fwd", "merge", "indexed_fwd", "delta", "dq", "entries", "keys"]


@pytest.mark.parametrize(("head_dim", "per_query_head"), [(64, False), (128, True)])
@pytest.mark.parametrize("arch", [80, 90])
def test_indexed(arch: int, head_dim: int, per_query_head: bool) -> None:
    """Listed keys in pages and in one piece, with biases; tensor cores multiply."""
    with budgets.compiling(arch) as found:
        budgets.indexed(head_dim, 12, per_query_head)
    assert [name.rpartition(".")[2] for name, _ in found] == INDEXED
    for name, kernel in found:
        used = budgets.resources(kernel)
        assert used["shared"] <= SHARED_LIMIT[f"sm_{arch}"], name
        assert used["hot_spills"] == 0, name
        plain = name.endswith(("delta", "merge", "keys"))
        assert plain or "mma" in kernel.asm["ptx"], name


CHOICES = ["key_scores", "shares", "page_scores", *["select_columns"] * 3, "lsh_encode",
           "place_ids", "kept_sizes", "place_ids", "count_hits", "collect", "weigh"]  # fmt: skip


@pytest.mark.parametrize(("arch", "head_dim"), [(80, 64), (90, 256)])
def test_choices_of_keys(arch: int, head_dim: int) -> None:
    with budgets.compiling(arch) as found:
        budgets.choices(head_dim)
    assert [name.rpartition(".")[2] for name, _ in found] == CHOICES
    for name, kernel in found:
        used = budgets.resources(kernel)
        assert used["shared"] <= SHARED_LIMIT[f"sm_{arch}"], name
        assert used["stack"] == 0, name
        assert "key_scores" not in name or "mma" in kernel.asm["ptx"], name


@pytest.mark.thinned(2)
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
