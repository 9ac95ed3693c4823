"""Writes the operators as a project of Hugging Face's kernel-builder, for `kernels.get_kernel`.

    python tools/export_hf.py OUT [--repo-id attnforge/attnforge]

The exported kernel is the Python package with its Triton kernels and the reference, nothing
compiled ahead of time (`torch-noarch`). A kernel of the Hub is imported from any path, under any
name, several versions in one process: so imports become relative, and operators go into the
namespace that the builder's generated `_ops.py` gives, which displaces our module of that name.
What belongs to native libraries, the command line and other frameworks stays behind.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "attnforge"
NAME = "attnforge"
KEPT = (
    *("__init__.py", "_files.py", "_ops.py", "_params.py", "_settings.py", "_version.py", "jit.py"),
    *("ops", "reference", "registry", "tuning", "paged_cache"),
    *("backends/__init__.py", "backends/_gpu.py", "backends/_*_lists.py"),
    *("backends/_selftest*.py", "backends/reference", "backends/triton"),
)
OURS, THEIRS = "_library", "_ops"  # `_ops` is the name of the module that the builder generates

BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
upstream = "https://github.com/attnforge/attnforge"
backends = ["cuda"]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "pyi", "json"]
"""

FLAKE = """\
{
  description = "attnforge: attention in Triton for the kernels hub";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """\
---
library_name: kernels
license: apache-2.0
---

# attnforge {release}

Attention for PyTorch behind registered operators with autograd: the Triton kernels and the
reference of [attnforge](https://github.com/attnforge/attnforge). CPU and CUDA C++ kernels come with
the package itself.

```python
from kernels import get_kernel

attnforge = get_kernel("{repo_id}", version={version})
out = attnforge.flash_attention(q, k, v, causal=True)  # [B, S, H, D]
print(attnforge.explain(attnforge.flash_attention, q, k, v, causal=True))
```
"""

TEST = """\
import torch
from kernels import get_kernel


def test_flash_attention() -> None:
    attnforge = get_kernel("{repo_id}", version={version})
    q, k, v = torch.randn(3, 1, 128, 4, 64, device="cuda", dtype=torch.bfloat16)
    heads_first = (x.double().transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    got = attnforge.flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(got.double().transpose(1, 2), want, atol=2e-2, rtol=2e-2)
"""


def sources() -> Iterator[tuple[Path, Path]]:
    """(file, its place in the exported package) of everything that is kept."""
    for pattern in KEPT:
        for found in sorted(PACKAGE.glob(pattern)):
            for path in sorted(found.rglob("*")) if found.is_dir() else [found]:
                if path.suffix in (".py", ".json") and "__pycache__" not in path.parts:
                    yield path, path.relative_to(PACKAGE)
    for path in sorted((ROOT / "triton_kernels").rglob("*.py")):
        yield path, Path("triton_kernels") / path.relative_to(ROOT / "triton_kernels")


def relative(source: str, place: Path) -> str:
    """A module's text with imports of attnforge made relative; its docstrings stay."""
    dots = "." * len(place.parts)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(a.name.split(".")[0] == NAME for a in node.names):
            raise SystemExit(
                f"export_hf: {place}:{node.lineno}: `import {NAME}` has no relative form"
            )
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        top, _, rest = node.module.partition(".")
        if top != NAME:
            continue
        first = node.lineno - 1
        if rest == THEIRS:
            rest = OURS
        lines[first] = lines[first].replace(f"from {node.module} ", f"from {dots}{rest} ", 1)
        if not rest:
            span = slice(first, node.end_lineno)
            joined = "".join(lines[span])
            lines[span] = [re.sub(rf"\b{THEIRS}\b", f"{OURS} as {THEIRS}", joined)] + [""] * (
                (node.end_lineno or node.lineno) - node.lineno
            )
    text = "".join(lines)
    return re.sub(
        rf'import_module\((f?)"{NAME}\.([^"]*)"\)',
        rf'import_module(\1"{dots}\2", __package__)',
        text,
    )


def exported(source: str, place: Path) -> tuple[str, Path]:
    """What becomes of one module, and where."""
    text = relative(source, place)
    if place != Path(f"{THEIRS}.py"):
        return text, place
    line = f'NAMESPACE = "{NAME}"\n'
    if line not in text:
        raise SystemExit(f"export_hf: {place} has no line {line!r}")
    text = text.replace(line, 'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n')
    text = text.replace(
        "import torch\n", "import torch\n\nfrom ._ops import add_op_namespace_prefix\n", 1
    )
    return text, Path(f"{OURS}.py")


def export(out: Path, repo_id: str) -> None:
    """Write the project into `out`, which must be new or empty."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"export_hf: {out} is not empty")
    package = out / "torch-ext" / NAME
    for path, place in sources():
        target = package / place
        if path.suffix == ".py":
            text, place = exported(path.read_text(encoding="utf-8"), place)
            target = package / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    namespace: dict[str, str] = {}
    exec((PACKAGE / "_version.py").read_text(), namespace)
    release = namespace["__version__"]
    # The Hub counts versions of the API alone: our major version, from 1.
    names = {"name": NAME, "version": max(1, int(release.split(".")[0])), "repo_id": repo_id}
    (out / "build.toml").write_text(BUILD.format(**names))
    (out / "flake.nix").write_text(FLAKE)
    (out / "CARD.md").write_text(CARD.format(release=release, **names))
    (out / "tests").mkdir()
    (out / "tests" / "__init__.py").touch()
    (out / "tests" / f"test_{NAME}.py").write_text(TEST.format(**names))
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export attnforge as a kernel of the Hub.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--repo-id", default=f"{NAME}/{NAME}", help="where kernel-builder uploads to"
    )
    options = parser.parse_args(argv)
    export(options.out, options.repo_id)
    files = sum(path.is_file() for path in options.out.rglob("*"))
    print(f"export_hf: {files} files in {options.out}; next: kernel-builder build-and-copy there")


if __name__ == "__main__":
    main()
