"""The committed pages are what their generators give, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attnforge.testing import docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md"])


def test_generated_parts_are_up_to_date() -> None:
    stale = [str(path.relative_to(ROOT)) for path in docs.stale_pages(ROOT)]
    assert not stale, f"run `python -m attnforge.testing.docs`: {stale}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#\s]*)", text):
        assert not target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_anchors_exist() -> None:
    for page in PAGES:
        for file, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text("utf-8")):
            target = (page.parent / file) if file else page
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in heads}


def test_every_environment_variable_is_documented() -> None:
    settings = (ROOT / "python/attnforge/_settings.py").read_text(encoding="utf-8")
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    names = set(re.findall(r'"(ATTNFORGE_\w+)"', settings))
    assert names
    assert names <= set(re.findall(r"`(ATTNFORGE_\w+)`", page))


def test_unknown_generator_is_an_error() -> None:
    with pytest.raises(ValueError, match="no generator"):
        docs.render_page("<!-- begin nothing -->\n<!-- end nothing -->", ROOT)


def test_matrix_names_every_flash_kernel() -> None:
    matrix = docs.support_matrix("flash")
    for spec in docs.own_kernels("flash"):
        assert f"`{spec.id}`" in matrix
    table = [line.strip("| ").split(" | ") for line in matrix.splitlines() if line.count("|") > 9]
    columns = {kernel: cells for kernel, _, *cells in zip(*table, strict=True)}
    definitions = [kernel for kernel in columns if kernel.startswith("`reference.")]
    assert definitions
    assert table[-1][0].startswith("functions of your own")
    for kernel in definitions:  # the reference has every feature but CUDA C++ of the caller's
        assert set(columns[kernel][:-1]) <= {"yes", "–"}, kernel
