"""The progress of a long command, on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["Progress", "progress_bar"]

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called before each step with what runs next, and at the end."""


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A rich bar on a terminal, one plain line per step elsewhere."""
    if not sys.stderr.isatty():

        def plain(what: str, done: int, total: int) -> None:
            print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def rich(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield rich
