"""Draws docs/figures/flash.svg: `python docs/figures/draw_flash.py` (needs matplotlib).

Left: one query tile of the forward. Right: one decode step split over the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent

# Okabe-Ito tints: input, scratch that lives in the cache, state carried by the loop, output.
INPUT, SCRATCH, STATE, OUTPUT = "#CDE7F7", "#F2F2F2", "#FBE3B5", "#CFEBDD"


def box(
    axes: Any, at: tuple[float, float], size: tuple[float, float], text: str, colour: str
) -> None:
    """A labelled box; `at` is its centre."""
    (x, y), (w, h) = at, size
    axes.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour, edgecolor="#333333", linewidth=0.8,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=7, linespacing=1.35)


def arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, linewidth=0.9, color="#333333",
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def forward(axes: Any) -> None:
    axes.set_title("forward: one query tile, keys in blocks", fontsize=9, fontweight="bold")
    wide, high = 2.8, 0.9
    box(axes, (1.6, 8.6), (wide, high), "Q tile [96, D]\nread once, scaled, packed", INPUT)
    box(axes, (4.9, 8.6), (wide, high), "K block [128, D]\npacked once per KV head", INPUT)
    box(axes, (8.2, 8.6), (wide, high), "V block [128, Dv]\npacked once per KV head", INPUT)
    box(axes, (3.25, 6.7), (3.4, 0.9), "S = Q Kᵀ  [96, 128] fp32\nsoftcap, ALiBi, mask", SCRATCH)
    box(axes, (3.25, 5.0), (3.4, 0.9), "m' = max(m, rowmax S)\nP = 2^(S - m')  fp32", SCRATCH)
    box(axes, (8.2, 3.2), (wide, 0.9), "O = O 2^(m - m') + P V\n[96, Dv] fp32", STATE)
    box(axes, (3.25, 3.2), (3.4, 0.9), "m, l per row\nl = l 2^(m - m') + rowsum P", STATE)
    box(axes, (8.2, 1.2), (wide, 0.9), "out = round(O / l)\n[B, Sq, Hq, Dv]", OUTPUT)
    box(axes, (3.25, 1.2), (3.4, 0.9), "lse = ln l + m ln 2\nfp32 [B, Hq, Sq]", OUTPUT)
    arrow(axes, (1.6, 8.15), (2.6, 7.15))
    arrow(axes, (4.9, 8.15), (3.9, 7.15))
    arrow(axes, (3.25, 6.25), (3.25, 5.45))
    arrow(axes, (3.25, 4.55), (3.25, 3.65))
    arrow(axes, (4.95, 5.0), (7.6, 3.65))
    arrow(axes, (8.2, 8.15), (8.2, 3.65))
    arrow(axes, (8.2, 2.75), (8.2, 1.65))
    arrow(axes, (3.25, 2.75), (3.25, 1.65))
    arrow(axes, (1.55, 3.2), (1.55, 6.7), bend=-0.45)
    axes.text(0.42, 4.95, "next\nkey\nblock", fontsize=7, ha="center", va="center")


def decode(axes: Any) -> None:
    axes.set_title("decode: keys split, states merged", fontsize=9, fontweight="bold")
    box(axes, (5.0, 8.6), (6.6, 0.9), "q rows of a KV head: G heads × Sq rows, in registers", INPUT)
    for x, text in ((1.8, "keys 0 – 2047"), (5.0, "keys 2048 – 4095"), (8.2, "last keys")):
        box(axes, (x, 6.7), (2.6, 0.9), f"K, V: {text}\nstreamed, not packed", INPUT)
        box(axes, (x, 4.8), (2.6, 0.9), "m, l, O of this split\nfp32", STATE)
        arrow(axes, (x, 8.15), (x, 7.15))
        arrow(axes, (x, 6.25), (x, 5.25))
        arrow(axes, (x, 4.35), (5.0 + (x - 5.0) * 0.35, 3.45))
    box(
        axes, (5.0, 3.0), (6.6, 0.9),
        "merge in fixed order: weights 2^(m - max m)\nthe same for any number of threads", SCRATCH,
    )  # fmt: skip
    box(axes, (5.0, 1.2), (6.6, 0.9), "out [B, Sq, Hq, Dv],  lse fp32 [B, Hq, Sq]", OUTPUT)
    arrow(axes, (5.0, 2.55), (5.0, 1.65))


def main() -> None:
    options = {"font.family": "DejaVu Sans", "svg.hashsalt": "attnforge", "svg.fonttype": "path"}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        for axes, draw in zip(figure.subplots(1, 2), (forward, decode), strict=True):
            axes.set_xlim(0, 9.8)
            axes.set_ylim(0.5, 9.2)
            axes.axis("off")
            draw(axes)
        figure.savefig(HERE / "flash.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
