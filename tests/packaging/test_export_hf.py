"""The exported kernel-builder project has the Hub's layout and works under a foreign name."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "export_hf.py"

# What kernel-builder writes beside the sources: a name that no other version has.
GENERATED = """
import torch
ops = torch.ops._attnforge_cuda_0123abc
def add_op_namespace_prefix(op_name):
    return f"_attnforge_cuda_0123abc::{op_name}"
"""

TWICE = """
import importlib, pkgutil, sys, torch
import another_name as hub
import attnforge
{everything}
q = torch.randn(1, 20, 1, 16, requires_grad=True)
out = hub.flash_attention(q, q, q, causal=True, backend="{backend}")
grad, = torch.autograd.grad(out.sum(), q)
want = attnforge.flash_attention(q, q, q, causal=True, backend="reference")
expected, = torch.autograd.grad(want.sum(), q)
torch.testing.assert_close(out, want)
torch.testing.assert_close(grad, expected)
assert out.grad_fn.__class__ is not want.grad_fn.__class__
assert hub.reductions.__name__ == "another_name.ops.reductions"
assert {{spec.backend for spec in hub.list_kernels()}} == {{"reference", "triton"}}
theirs, ours = torch.ops._attnforge_cuda_0123abc, torch.ops.attnforge
assert theirs.flash_fwd.default is not ours.flash_fwd.default
"""
EVERYTHING = """
for module in pkgutil.walk_packages(hub.__path__, "another_name."):
    importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "project"
    subprocess.run([sys.executable, str(TOOL), str(out), "--repo-id", "me/mine"], check=True)
    return out


def test_layout(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((project / "build.toml").read_text())
    assert set(build) == {"general", "torch-noarch"}
    assert build["torch-noarch"] == {"pyext": ["py", "pyi", "json"]}
    general = build["general"]
    assert (general["name"], general["edition"], general["version"]) == ("attnforge", 5, 1)
    assert (general["license"], general["backends"]) == ("Apache-2.0", ["cuda"])
    assert general["hub"] == {"repo-id": "me/mine"}
    for name in ("flake.nix", "CARD.md", "LICENSE", "tests/test_attnforge.py"):
        assert (project / name).is_file(), name
    package = project / "torch-ext" / "attnforge"
    assert (package / "__init__.py").is_file()
    assert (package / "triton_kernels" / "flash" / "fwd.py").is_file()
    assert not (package / "_ops.py").exists(), "the builder writes this one"


def test_imports_are_relative_and_nothing_is_foreign(project: Path) -> None:
    known = {*sys.stdlib_module_names, "torch", "typing_extensions", "triton", "filelock"}
    known.add("numpy")  # with Triton's interpreter
    found = []
    for path in (project / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] not in known]
    assert found == []


def test_works_beside_the_package_under_another_name(project: Path, tmp_path: Path) -> None:
    has_triton = importlib.util.find_spec("triton") is not None
    copy = tmp_path / "another_name"
    shutil.copytree(project / "torch-ext" / "attnforge", copy)
    (copy / "_ops.py").write_text(GENERATED)
    env = {k: v for k, v in os.environ.items() if not k.startswith("ATTNFORGE_")}
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'python'}", "TRITON_INTERPRET": "1"}
    code = TWICE.format(
        backend="triton" if has_triton else "reference",
        everything=EVERYTHING if has_triton else "",
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    done = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "not empty" in done.stderr
