"""``attnforge tune WHAT``: measure kernel configs on this machine and keep the winners."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import attnforge
from attnforge.cli._progress import progress_bar
from attnforge.cli.explain import parse_shape

__all__ = ["register"]


def _arguments(text: str) -> tuple[tuple[int, ...], ...]:
    """``q[/k[/v]]`` as three shapes: k defaults to q, v to k."""
    parts = [parse_shape(part, "--shapes") for part in text.split("/")]
    if len(parts) > 3:
        raise typer.BadParameter(f"{text!r} has {len(parts)} shapes; want q, q/k or q/k/v",
                                 param_hint="--shapes")  # fmt: skip
    return tuple(parts + parts[-1:] * (3 - len(parts)))


def _function(what: str) -> Any:
    """The public function that shapes belong to: itself, or the attention of a family."""
    function = getattr(attnforge, what, None) or getattr(attnforge, f"{what}_attention", None)
    if not callable(function):
        raise typer.BadParameter(f"{what!r} is no function that takes shapes", param_hint="WHAT")
    return function


def _tune(
    what: Annotated[
        str,
        typer.Argument(
            help="A family (flash), an operator (flash_fwd), or a function (flash_decode)."
        ),
    ],
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shapes", help="q, q/k or q/k/v of one call: 1,1,32,128/1,32768,8,128; repeat."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="A file of attnforge.trace_shapes.")
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget", min=1.0, help="Seconds for everything.")
    ] = 60.0,
    resume: Annotated[
        bool,
        typer.Option("--resume/--force", help="Keep what has a result, or measure it again."),
    ] = True,
    confirm: Annotated[
        int,
        typer.Option("--confirm", min=0, help="Fresh processes in which a winner must win again."),
    ] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads (results hold for that number).")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="With --shapes.")] = "fp32",
    causal: Annotated[
        bool, typer.Option("--causal/--no-causal", help="With --shapes: bottom-right causal.")
    ] = True,
) -> None:
    """Tune kernels on this machine. Without --shapes and --trace: a few common problems."""
    if shapes and trace is not None:
        raise typer.BadParameter("want --shapes or --trace, not both")
    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"budget": budget, "force": not resume, "confirm": confirm}
    target: Any = what
    if shapes:
        target = _function(what)
        options |= {"shapes": [_arguments(text) for text in shapes]}
        options |= {"dtype": dtype, "causal": causal}
    elif trace is not None:
        options["trace"] = trace
    try:
        with progress_bar() as progress:
            report = attnforge.tune(target, progress=progress, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(str(report))
    if any(outcome.status == "unfinished" for outcome in report.outcomes):
        typer.echo("the budget ended first: run again with a larger --budget to go on")
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("tune")(_tune)
