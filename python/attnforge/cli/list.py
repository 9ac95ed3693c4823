"""``attnforge list``: every kernel with what it requires."""

from __future__ import annotations

import json

import typer

import attnforge

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command ``list``."""

    @app.command("list")
    def list_(
        op: str = typer.Option("", help="Only kernels of this operator, such as flash_fwd."),
        as_json: bool = typer.Option(False, "--json", help="One JSON array of objects."),
    ) -> None:
        """List every kernel: id, operator, backend, requirements."""
        specs = attnforge.list_kernels(op or None)
        if as_json:
            typer.echo(json.dumps([spec.describe() for spec in specs], indent=2))
            return
        if not specs:
            known = ", ".join(sorted({spec.op for spec in attnforge.list_kernels()}))
            typer.echo(f"attnforge list: no kernel of operator {op!r}; want one of {known}")
            raise typer.Exit(1)
        for spec in specs:
            typer.echo(f"{spec.id:24} {spec.op:14} score {spec.score:g}  {spec.notes}")
            for need in spec.requires:
                typer.echo(f"{'':24} needs {need}")
