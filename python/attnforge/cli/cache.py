"""``attnforge cache path | list | clear``: the results of tuning on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import attnforge
from attnforge.tuning import store
from attnforge.tuning.device import environment
from attnforge.tuning.entry import Entry
from attnforge.tuning.lookup import foreign

__all__ = ["register"]


def _files() -> list[Path]:
    folder = store.directory()
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _state(entry: Entry) -> str:
    """``"in use"``, or why not."""
    specs = {spec.id: spec for spec in attnforge.list_kernels()}
    if entry.spec not in specs:
        return "no such kernel"
    other = foreign(entry, environment(specs[entry.spec]))
    return "not in use: " + "; ".join(f"{k} {v}" for k, v in other.items()) if other else "in use"


def _rows() -> Iterator[dict[str, Any]]:
    for path in _files():
        for entry in store.read(path):
            yield {**entry.to_json(), "file": str(path), "state": _state(entry)}


def _line(row: dict[str, Any]) -> str:
    problem, measured = row["problem"], row["measured"]
    sizes = " ".join(f"{k}={v}" for k, v in {**problem["dims"], **problem["bucket"]}.items())
    config = " ".join(f"{k}={v}" for k, v in row["config"].items())
    what = "+".join(problem["features"])
    return (
        f"{row['spec']} {problem['dtype']} {sizes} {what}: {config} x{measured['gain']:.3f} "
        f"{measured['date']} ({row['state']})"
    )


def register(app: typer.Typer) -> None:
    """Add the command group ``cache``."""
    cache = typer.Typer(help="Results of tuning on this machine.", no_args_is_help=True)
    app.add_typer(cache, name="cache")

    @cache.command()
    def path() -> None:
        """Print the directory of results; it may not exist yet."""
        typer.echo(str(store.directory()))

    @cache.command("list")
    def list_(
        as_json: bool = typer.Option(False, "--json", help="One JSON array of objects."),
    ) -> None:
        """List every result: kernel, bucket, config, gain, and whether it is in use here."""
        rows = list(_rows())
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
        else:
            typer.echo("\n".join(map(_line, rows)) or f"no results in {store.directory()}")

    @cache.command()
    def clear() -> None:
        """Remove all results (files of tuning only; other programs go on with what they read)."""
        files = _files()
        for file in files:
            file.unlink()
        typer.echo(f"removed {len(files)} file(s) from {store.directory()}")
