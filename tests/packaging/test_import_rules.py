"""Arrows run down only: which part of the package may import which.

Read from the syntax trees, so lazy imports inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "attnforge"
FAMILIES = (
    *("cope", "flash", "reductions", "paged", "block_sparse", "nsa", "linear", "retrieval"),
)

# Floor -> what it may import of attnforge besides itself. A backend is a floor of its own.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "_params": set(),
    "_settings": set(),
    "_files": set(),
    "_ops": set(),
    "jit": set(),  # what mods are; what compiles them is a backend
    "_native": {"_settings"},
    "_native_cuda": {"_native"},
    "reference": {"_params"},
    "registry": {"_settings"},
    "tuning": {"_files", "_settings", "_version", "registry"},
    "ops": {"_ops", "_params", "jit", "registry"},
    "paged_cache": {"ops", "registry"},  # and attnforge._host, by name: it may be missing
    "backends": {"registry"},
    "backends.*": {
        *("_native", "_native_cuda", "_params", "_settings", "reference", "registry"),
        *("triton_kernels", "_files", "jit"),
        # Shared by all.
        *("backends._block_lists", "backends._gpu", "backends._key_lists", "backends._selftest"),
    },
    "triton_kernels": set(),
    "__init__": {"_version", "backends", "jit", "ops", "paged_cache", "registry", "tuning"},
    "__main__": {"cli"},
}
# Outside the operators: the public API. `_native` tells testing and cli what is built.
PUBLIC = {"__init__", "ops", "paged_cache", "reference", "registry", "tuning"}
BUILD_FACTS = {"_host", "_native", "_settings", "_version"}
ALLOWED |= {
    "diagnose": PUBLIC | BUILD_FACTS,
    # tune_flash calls launchers; policies are measured alone and in a language model
    "testing": PUBLIC | BUILD_FACTS | {"_params", "integrations", "policies"},
    # explain knows the policies by name
    "cli": PUBLIC | BUILD_FACTS | {"diagnose", "integrations", "policies", "testing"},
    # learned gates and policies for a model; JAX calls the native library without torch
    "integrations": PUBLIC | {"nn", "policies", "_native"},
    "nn": PUBLIC,
    "policies": PUBLIC | {"nn"},
    "viz": PUBLIC,
    "distributed": PUBLIC,
    "compat": PUBLIC,
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts if parts[-1] != "__init__" or len(parts) == 1 else parts[:-1]), path


def floor(module: str) -> str:
    """`module` is relative to attnforge; attnforge itself is `__init__`."""
    parts = module.split(".")
    if parts[0] == "backends" and len(parts) > 1:
        return ".".join(parts[:2])
    return parts[0]


def exists(module: str) -> bool:
    path = PACKAGE.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of everything imported; `from a import b` is a.b if a module."""
    package = ["attnforge", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                inside = full.removeprefix("attnforge.")
                yield (
                    node.lineno,
                    full if full.startswith("attnforge.") and exists(inside) else base,
                )


def violations(module: str, path: Path) -> list[str]:
    here = floor(module)
    rule = "backends.*" if here.startswith("backends.") else here
    if rule not in ALLOWED:
        return [f"{module}: no rule for this part of the package; add it to ALLOWED with a reason"]
    found = []
    for line, name in imports(path):
        if name.split(".")[0] != "attnforge":
            continue
        there = floor(name.removeprefix("attnforge").lstrip(".") or "__init__")
        if there != here and there not in ALLOWED[rule]:
            found.append(f"{path.relative_to(ROOT)}:{line}: {here} must not import {name}")
    return found


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value))
def test_arrows_run_down(module: str, path: Path) -> None:
    assert violations(module, path) == []


def test_rules_catch_an_arrow_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker itself: every form of a forbidden import is seen."""
    source = tmp_path / "ops" / "flash.py"
    source.parent.mkdir()
    (tmp_path / "backends" / "cpu").mkdir(parents=True)
    (tmp_path / "backends" / "cpu" / "__init__.py").touch()
    (tmp_path / "backends" / "__init__.py").touch()
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for line in (
        "import attnforge.backends.cpu",
        "from attnforge import backends",
        "from attnforge.backends import cpu",
        "from ..backends import cpu",
        "def f():\n    from attnforge.backends.cpu.flash import launch",
    ):
        source.write_text(line)
        assert violations("ops.flash", source), line


CORE = ("_", "backends.cpu", "backends.reference", "ops", "reference", "registry", "tuning")
OPTIONAL = {"filelock"}  # the extra ``tune``: imported when results are written


@pytest.mark.parametrize(
    ("module", "path"),
    [m for m in modules() if m[0].startswith(CORE)],
    ids=lambda value: str(value),
)
def test_core_needs_torch_only(module: str, path: Path) -> None:
    # torch itself needs typing_extensions: it is there wherever torch is.
    known = sys.stdlib_module_names | {"attnforge", "torch", "typing_extensions"} | OPTIONAL
    foreign = [f"{line}: {name}" for line, name in imports(path) if name.split(".")[0] not in known]
    assert foreign == []


@pytest.mark.parametrize("floor", ["registry", "tuning"])
def test_floor_knows_no_family(floor: str) -> None:
    """No family name in code: identifiers, and strings other than docstrings."""
    found = []
    for path in sorted((PACKAGE / floor).rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = "" if id(node) in docstrings else node.value
            elif isinstance(node, ast.Name):
                text = node.id
            elif isinstance(node, ast.Attribute):
                text = node.attr
            found += [
                f"{path.name}:{node.lineno}: {text}" for f in FAMILIES if f in text.split("_")
            ]
    assert found == []


def test_kernels_include_no_torch_and_isa_files_no_library() -> None:
    """Kernels are torch-free; files compiled per ISA level use no inline function of a library."""
    plain = {"cstdint", "cstddef", "immintrin.h", "arm_neon.h"}
    found = []
    for path in sorted((ROOT / "csrc" / "cpu").rglob("*")):
        if path.suffix not in (".h", ".cpp"):
            continue
        per_isa = path.parent != ROOT / "csrc" / "cpu"
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.split()
            if not words or words[0] != "#include":
                continue
            name = words[1].strip('<>"')
            torch = name.startswith(("torch/", "ATen/", "c10/"))
            if torch or (per_isa and words[1].startswith("<") and name not in plain):
                found.append(f"{path.relative_to(ROOT)}:{number}: {name}")
    assert found == []
