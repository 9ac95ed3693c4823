"""Hook of mkdocs (mkdocs.yml): the front page, and links that lead out of docs/.

The pages are written to be read in the repository. On the site README.md is the front page, so its
links into docs/ become links between pages; what lies elsewhere in the tree is linked on GitHub.
A link to a file that does not exist is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)((?:#[^)\s]*)?\))")
log = logging.getLogger("mkdocs.hooks.docs_site")


def outward(text: str, home: str, repository: str) -> str:
    """Links of a page in folder `home` of the repository, as the site needs them."""

    def lead(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path = posixpath.normpath(posixpath.join(home, target))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", home or "README.md", path)
        if path.startswith("docs/"):
            inside = posixpath.relpath(path, home if home.startswith("docs") else "docs")
            if (ROOT / path).is_file():
                return f"{before}{inside}{after}"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{before}{repository}/{kind}/main/{path}{after}"

    return LINK.sub(lead, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the front page, made of README.md."""
    from mkdocs.structure.files import File

    text = outward((ROOT / "README.md").read_text(encoding="utf-8"), "", config["repo_url"])
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Links of every other page."""
    if page.file.src_uri == "index.md":
        return markdown
    home = posixpath.join("docs", posixpath.dirname(page.file.src_uri)).rstrip("/")
    return outward(markdown, home, config["repo_url"])
