"""Draws the figures of docs/sparse_quality.md from the committed runs.

python docs/figures/draw_block_sparse.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from attnforge.testing.plots import _CYCLE, _RC
from attnforge.testing.training import NEEDLE_LAYERS, runs

HERE = Path(__file__).parent


def quality(data: dict[str, Any], path: Path) -> None:
    """Perplexity over density, a line per method; dense attention as the floor."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for line in data["lines"]:
        name = str(line["method"]).partition(", seed")[0]
        if name == line["method"] or line["method"].endswith("seed 0"):
            lines.setdefault(name, []).append((100 * line["density"], line["perplexity"]))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), (colour, marker, dashes) in zip(lines.items(), _CYCLE, strict=False):
        axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker, linewidth=1.4,
                  linestyle=dashes, markersize=4, label=name)  # fmt: skip
    axes.axhline(data["perplexity"], color="#000000", linewidth=1, label="dense")
    axes.set_xlabel("blocks read, % of what a dense causal call sees")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def needle(data: dict[str, Any], path: Path) -> None:
    """Loss and share of needles found by step, a line per run."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for run in data["runs"]:
        colour, _, dashes = _CYCLE[list(NEEDLE_LAYERS).index(run["layer"])]
        steps, losses, right = zip(*run["curve"], strict=True)
        label = NEEDLE_LAYERS[run["layer"]] if run["seed"] == 0 else None
        for axes, values in zip(panels, (losses, [100 * r for r in right]), strict=True):
            axes.plot(steps, values, color=colour, linestyle=dashes, linewidth=1.2, label=label)
    for axes, name in zip(panels, ("loss", "needles found, %"), strict=True):
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main(root: Path = HERE.parents[1], folder: Path = HERE) -> None:
    with matplotlib.rc_context(_RC):
        quality(runs(root, "block_sparse"), folder / "block_sparse_quality.svg")
        needle(runs(root, "nsa_needle"), folder / "nsa_needle.svg")


if __name__ == "__main__":
    main()
