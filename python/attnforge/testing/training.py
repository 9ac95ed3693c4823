"""Tables of what the examples trained: runs are committed under ``docs/measurements/training/``.

    python examples/char_lm.py all --steps 120 --out docs/measurements/training/char_lm.json
    python examples/linearize_smollm2.py --window 32 --length 256 --segments 4 --steps 24 \\
        --out docs/measurements/training/smollm2_linear.json
    python bench/quality_block_sparse.py --out docs/measurements/training/block_sparse.json
    python examples/nsa_needle.py --layers dense nsa nsa-fine --steps 1200 --seeds 3 \\
        --out docs/measurements/training/nsa_needle.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "NEEDLE_LAYERS", "block_sparse_table", "char_lm_table", "needle_table", "runs", "smollm2_table",
]  # fmt: skip

# What the layers of the needle task are called.
NEEDLE_LAYERS = {
    "dense": "dense",
    "nsa": "NSA, one projection, means",
    "nsa-fine": "the same, windows of 2",
    "nsa-paper": "NSA, paper",
}


def runs(root: Path, name: str) -> Any:
    """A committed file."""
    path = root / "docs" / "measurements" / "training" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def char_lm_table(root: Path) -> str:
    """Held-out bits per character by step, the best layer first."""
    data = runs(root, "char_lm")
    shown = [step for step, _ in data["runs"][0]["losses"] if step % 40 == 0]
    lines = [
        f"| layer | parameters | {' | '.join(f'step {s}' for s in shown)} |",
        f"| --- | --- |{' --- |' * len(shown)}",
    ]
    for run in sorted(data["runs"], key=lambda r: float(r["losses"][-1][1])):
        losses = dict(map(tuple, run["losses"]))
        cells = " | ".join(f"{losses[s]:.2f}" for s in shown)
        lines.append(f"| {run['layer']} | {run['parameters'] / 1e3:.0f} k | {cells} |")
    return "\n".join(lines) + "\n"


def smollm2_table(root: Path) -> str:
    """Perplexity by kind of attention."""
    data = runs(root, "smollm2_linear")
    names = ("softmax", "linearised, distilled", "linearised, untrained", "window alone")
    lines = ["| attention | perplexity |", "| --- | --- |"]
    lines += [f"| {name} | {data[name]:.1f} |" for name in names]
    return "\n".join(lines) + "\n"


def block_sparse_table(root: Path) -> str:
    """Per method and number of blocks: what is read, the share of probability found, the cost."""
    data = runs(root, "block_sparse")
    lines = ["| blocks per row | method | density | probability found | perplexity | change of the "
             "loss |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    dense = f"| all | dense | 100% | 100% | {data['perplexity']:.2f} | |"
    ordered = sorted(data["lines"], key=lambda x: (-x["top_k"], x["perplexity"]))
    lines += [dense] + [
        f"| {x['top_k']} | {x['method']} | {x['density']:.1%} | {x['mass']:.1%} | "
        f"{x['perplexity']:.2f} | {x['loss_change']:+.3f} ± {x['standard_error']:.3f} |"
        for x in ordered
    ]
    return "\n".join(lines) + "\n"


def needle_table(root: Path) -> str:
    """Of each run of the needle task its end."""
    data = runs(root, "nsa_needle")
    lines = [
        "| layer | steps | seed | parameters | loss | needles found |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in data["runs"]:
        step, loss, right = run["curve"][-1]
        name, size = NEEDLE_LAYERS[run["layer"]], run["parameters"] / 1e3
        lines.append(
            f"| {name} | {step} | {run['seed']} | {size:.0f} k | {loss:.3f} | {right:.1%} |"
        )
    return "\n".join(lines) + "\n"
