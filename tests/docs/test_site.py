"""The site builds without a warning, and its reference has everything that is public."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import attnforge
import attnforge.nn

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"jit", "reductions", "retrieval", "paged_cache", "patterns"}  # pages of their own


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason="the extra docs is not installed")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_reference_is_whole(site: Path) -> None:
    headings: set[str] = set()
    for page in (site / "api").rglob("index.html"):
        headings |= set(re.findall(r'<h\d id="attnforge\.([\w.]+)"', page.read_text("utf-8")))
    shown = {heading.split(".")[-1] for heading in headings}
    public = {name for name in attnforge.__all__ if not name.startswith("__")} - MODULES
    assert public - shown == set()
    layers = {n for n, x in vars(attnforge.nn).items() if not (n[0] == "_" or is_module(x))}
    assert {f"nn.{name}" for name in layers} - headings == set()


def is_module(value: object) -> bool:
    return isinstance(value, ModuleType)


def test_links_lead_where_they_should(site: Path) -> None:
    front = (site / "index.html").read_text("utf-8")
    assert 'href="guide/"' in front
    assert 'href="https://github.com/attnforge/attnforge/blob/main/CONTRIBUTING.md"' in front
    assert 'href="../measurements/' in (site / "guide" / "index.html").read_text("utf-8")


def test_a_link_to_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    with caplog.at_level(logging.WARNING):
        text = hook.outward("[a](../setup.py#x) [b](flash.md) [c](gone.md)", "docs", "https://r")
    assert text.startswith("[a](https://r/blob/main/setup.py#x) [b](flash.md) ")
    assert [r.getMessage() for r in caplog.records] == [
        "docs links to docs/gone.md, which does not exist"
    ]
