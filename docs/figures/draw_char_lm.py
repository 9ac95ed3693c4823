"""Draws docs/figures/char_lm.svg from the committed runs: `python docs/figures/draw_char_lm.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from attnforge.testing.plots import _RC
from attnforge.testing.training import runs

HERE = Path(__file__).parent
# Four families, a colour each; in a family line styles tell layers apart.
FAMILIES = {
    "softmax": ["softmax"],
    "normalised": ["hedgehog", "based", "fast", "lln", "flowformer"],
    "decay and gates": ["lightning", "mamba2", "gla", "hgrn2", "regla", "gsa"],
    "delta rules": ["delta", "gated_delta", "kda"],
    "cosine": ["cottention"],
}
COLOURS = ["#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))]


def main() -> None:
    losses = {run["layer"]: run["losses"] for run in runs(HERE.parents[1], "char_lm")["runs"]}
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for (family, layers), colour in zip(FAMILIES.items(), COLOURS, strict=True):
            known = [layer for layer in layers if layer in losses]
            for layer, style in zip(known, STYLES, strict=False):
                steps, bits = zip(*losses[layer], strict=True)
                name = layer if family == layer else f"{family}: {layer}"
                axes.plot(steps, bits, color=colour, linestyle=style, linewidth=1.4, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("bits per held-out character")
        axes.set_ylim(2.4, 5.0)
        figure.legend(loc="outside right center")
        figure.savefig(HERE / "char_lm.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
