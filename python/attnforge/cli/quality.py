"""`attnforge quality`: what sparse decode costs a language model, as a table, JSON and a plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attnforge.cli._progress import progress_bar

__all__ = ["register"]


def _numbers(words: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in words.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise typer.BadParameter(f"{words!r}; want numbers of keys such as 256,1024", None,
                                 param_hint="--budgets")  # fmt: skip
    return found


def _quality(
    quick: Annotated[
        bool, typer.Option("--quick", help="Does it run: a short context, one budget.")
    ] = False,
    length: Annotated[
        int | None, typer.Option("--context", min=64, help="Tokens of context (default 8192).")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Tokens behind it (default 64).")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="Keys per head, as 256,512,1024 (default).")
    ] = None,
    needles: Annotated[
        int | None, typer.Option("--needles", min=0, max=16, help="Needles (default 8).")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Places in the text and needles.")
    ] = 1,
    policy: Annotated[
        str, typer.Option("--policy", help="Only policies whose name has this word.")
    ] = "",
    model: Annotated[
        str | None, typer.Option("--model", help="Folder of a model (default SmolLM2-135M).")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to read (default: the examples' story).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads (default: torch's).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write results and environment to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw losses, needles and speed: an SVG or PNG.")
    ] = None,
) -> None:
    """Perplexity, needles and speed of decode under every policy, over budgets."""
    from attnforge.integrations import transformers as hf
    from attnforge.testing import machine, quality, quality_report, smollm2

    text = smollm2.TEXT if text is None else text
    if not text.is_file():
        raise typer.BadParameter(f"there is no file {text}", param_hint="--text")
    given: dict[str, Any] = {"context": length, "tokens": tokens, "needles": needles,
             "budgets": None if budgets is None else _numbers(budgets)}  # fmt: skip
    setup = replace(
        quality.QUICK if quick else quality.Setup(), seeds=seeds, only=policy,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
    env = machine.environment()

    def save(data: dict[str, Any]) -> None:
        """Write what is known so far: the whole run takes long."""
        data["environment"] = env
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    try:
        with hf.enable(), progress_bar() as progress:
            tokenizer, loaded = smollm2.load(model)
            story = text.read_text(encoding="utf-8")
            data = quality.measure(loaded, tokenizer, story, setup, progress, save)
    except (ImportError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    save(data)
    typer.echo(quality_report.render(data["lines"]))
    typer.echo(
        "change of the loss: per token against dense, with its standard error, paired by token\n"
        "attention of a step: median over the layers that are not dense, together; against dense: "
        "median of paired steps"
    )
    if json_file is not None:
        typer.echo(f"wrote {json_file}")
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        quality_report.draw(data, plot)
        typer.echo(f"wrote {plot}")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("quality")(_quality)
