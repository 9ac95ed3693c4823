"""The command line: ``attnforge demo | doctor | list | explain | bench | tune | quality | cache``.

Each command is a module beside this one with ``register(app)``. A command whose module is not
part of this installation is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["build", "main"]

_COMMANDS = ("demo", "doctor", "list", "explain", "bench", "tune", "quality", "cache")


def build() -> typer.Typer:
    """The typer application with every command that is installed."""
    import typer

    from attnforge import __version__

    app = typer.Typer(
        name="attnforge",
        help="Attention kernels for PyTorch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )

    def show_version(value: bool) -> None:
        if value:
            typer.echo(f"attnforge {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version."
        ),
    ) -> None:
        """Attention kernels for PyTorch."""

    for name in _COMMANDS:
        module = f"attnforge.cli.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).register(app)
    return app


def main() -> None:
    """Entry point of the console script."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"attnforge: the command line needs {' and '.join(missing)}; "
            "install the extra: pip install 'attnforge[cli]'"
        )
    build()()
