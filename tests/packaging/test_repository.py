"""House rules that a script can check: sizes, environment variables, paths, requirement files."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WALL = 800  # lines: a file past it holds more than one idea
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".hpp"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}  # of module os
SKIPPED_DIRECTORIES = {".git", "build", "dist", "__pycache__"}


def files() -> list[Path]:
    """Files that git tracks or would; in an unpacked sdist, all of them."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        found = list(ROOT.rglob("*"))
    return sorted(
        path
        for path in found
        if path.is_file() and not SKIPPED_DIRECTORIES & set(path.relative_to(ROOT).parts)
    )


def test_no_source_file_passes_the_wall() -> None:
    lengths = {p: len(p.read_bytes().splitlines()) for p in files() if p.suffix in SOURCES}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > WALL} == {}


def reads_environment(path: Path) -> list[int]:
    """Lines that read it. `{**os.environ, ...}`, the environment of a child, reads no setting."""
    lines = []
    tree = ast.parse(path.read_text())
    passed_on = {
        id(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is None
    }
    for node in ast.walk(tree):
        if id(node) in passed_on:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr in ENVIRONMENT:
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for alias in node.names if alias.name in ENVIRONMENT]
    return lines


def test_environment_is_read_in_settings_only() -> None:
    package = ROOT / "python" / "attnforge"
    readers = {
        str(path.relative_to(package)): lines
        for path in sorted(package.rglob("*.py"))
        if path != package / "_settings.py" and (lines := reads_environment(path))
    }
    assert readers == {}
    native = [p for p in (ROOT / "csrc").rglob("*") if p.is_file() and "getenv" in p.read_text()]
    assert native == []


def test_at_most_ten_environment_variables() -> None:
    text = (ROOT / "python" / "attnforge" / "_settings.py").read_text()
    names = set(re.findall(r"\bATTNFORGE_[A-Z_]+\b", text))
    assert 0 < len(names) <= 10


def test_no_path_of_somebodys_machine() -> None:
    """Documentation and results name no absolute path of a developer's or a build machine."""
    pattern = re.compile(rb"(?<![\w.$}])/(?:home|Users|root|wor[k]|far[m]|mnt)/\w")
    found = []
    for path in files():
        data = path.read_bytes()
        if b"\0" in data[:4096]:
            continue
        for number, line in enumerate(data.splitlines(), 1):
            if pattern.search(line):
                found.append(
                    f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace')[:90]}"
                )
    assert found == []


def test_no_binaries() -> None:
    allowed = {".png", ".svg", ".gif", ".pdf"}
    binary = [p for p in files() if p.suffix not in allowed and b"\0" in p.read_bytes()[:4096]]
    assert binary == []


def requirement_names(lines: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in names if match}


@pytest.mark.parametrize(
    ("group", "extras"),
    [("demo", ["cli", "demo"]), ("test", ["cli", "demo", "test", "dev", "docs"])],
)
def test_pins_cover_the_extras(group: str, extras: list[str]) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch>=2.10"]
    wanted = {
        name
        for extra in extras
        for name in requirement_names(project["optional-dependencies"][extra])
    } - {"attnforge"}
    pinned: set[str] = set()
    for name in (group, "model"):
        pinned |= requirement_names(
            (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        )
    assert wanted - pinned == set()
    assert "torch" not in pinned, "torch's source is chosen by tools/bootstrap.py"
