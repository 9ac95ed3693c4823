"""Table and plot of `attnforge.testing.quality`; a run is committed under docs/measurements.

attnforge quality --json docs/measurements/quality/smollm2.json --plot docs/figures/quality.svg
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "policies_table", "render"]

_RUN = "docs/measurements/quality/smollm2.json"
_HEAD = ("policy", "setting", "keys read", "perplexity", "change of the loss", "needles",
         "attention of a step", "against dense")  # fmt: skip


_PANELS: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
    ("change of the loss", lambda x: float(x["loss_change"])),
    ("needles found, %", lambda x: 100 * x["found"] / max(1, x["needles"])),
    ("attention of a step, speed-up", lambda x: float(x["speedup"])),
)


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    change = f"{line['loss_change']:+.3f} ± {line['standard_error']:.3f}"
    return (
        line["policy"], line["setting"], f"{line['read']:.1%}", f"{line['perplexity']:.2f}",
        "" if line["policy"] == "dense" else change, f"{line['found']}/{line['needles']}",
        f"{line['milliseconds']:.2f} ms", f"{line['speedup']:.2f}x",
    )  # fmt: skip


def render(lines: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal."""
    rows = [_HEAD, *map(_cells, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def policies_table(root: Path) -> str:
    """The committed run: where, what, and a row per policy and setting."""
    data = json.loads((root / _RUN).read_text(encoding="utf-8"))
    setup, env = data["setup"], data["environment"]
    rows = [_HEAD, ("---",) * len(_HEAD), *map(_cells, data["lines"])]
    return (
        f"SmolLM2-135M (fp32), {setup['context']} tokens of context, {setup['tokens']} tokens "
        f"behind them, {setup['needles']} needles, {setup['seeds']} seed(s); layers "
        f"{', '.join(map(str, setup['dense']))} dense. {env['device']}, {env['threads']} "
        f"thread(s), kernels {env['isa']}, commit `{env['commit']}`, {env['date']}.\n\n"
        + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    )


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Loss, needles found and speed over the share of keys read, a line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from attnforge.testing.plots import _CYCLE, _RC

    dense, *lines = data["lines"]
    names = list(dict.fromkeys(line["policy"] for line in lines))
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        panels = figure.subplots(1, 3)
        for n, name in enumerate(names):
            own = sorted((x for x in lines if x["policy"] == name), key=lambda x: float(x["read"]))
            colour, marker, _ = _CYCLE[n % len(_CYCLE)]
            dashes = ("-", "--", ":")[n // len(_CYCLE) % 3]
            for axes, (_, value) in zip(panels, _PANELS, strict=True):
                axes.plot(
                    [100 * x["read"] for x in own], [value(x) for x in own], label=name,
                    color=colour, marker=marker, markersize=4, linestyle=dashes, linewidth=1.2,
                )  # fmt: skip
        for axes, (title, value) in zip(panels, _PANELS, strict=True):
            axes.axhline(value(dense), color="#000000", linewidth=1)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("keys read, % of the context")
            axes.set_ylabel(title)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=8)
        figure.savefig(path, metadata={"Date": None})
