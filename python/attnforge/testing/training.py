"""Tables of what the examples trained: runs are committed under ``docs/measurements/training/``.

    python examples/char_lm.py all --steps 120 --out docs/measurements/training/char_lm.json
    python examples/linearize_smollm2.py --window 32 --length 256 --segments 4 --steps 24 \\
        --out docs/measurements/training/smollm2_linear.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["char_lm_table", "runs", "smollm2_table"]


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
