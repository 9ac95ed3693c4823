"""Measures where sparse decode passes dense decode, for `attnforge.policies`.

    python -m attnforge.testing.crossover               # rewrites policies/crossovers.json
    python -m attnforge.testing.crossover --threads 1 --only quest,hip

Each policy steps over contexts and budgets in turn with dense decode; times are those of the
process's own CPU, at one thread unless said otherwise, so that neighbours on the machine weigh
little. The three costs of `policies._crossover` are the least squares fit to the relative times.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import attnforge
from attnforge import policies
from attnforge.policies import Policy, _crossover
from attnforge.testing import machine

__all__ = ["fit", "main", "measure", "table"]

# Heads and channels of a usual model; K and V of a key are 2 KiB in bf16.
HEADS, GROUP, DIM = 4, 4, 128
_KEY_BYTES = 2 * 2 * HEADS * DIM
CONTEXTS, BUDGETS = (4096, 8192, 16384), (256, 1024)
# TidalDecode and Recycled are dense at times, PyramidKV is SnapKV: no cost of their own.
MEASURED: dict[str, Callable[[int], Policy]] = {
    name: policies.POLICIES[name]
    for name in ("centroid", "h2o", "hip", "quest", "razor", "snapkv", "sparq", "streaming",
                 "twilight")
} | {
    "lsh": lambda budget: policies.MagicPIG(),
    # A choice at each step, though some are reused in use.
    "lserve": partial(policies.LServe, every=1),
    "tokenselect": partial(policies.TokenSelect, reuse=2.0),
}  # fmt: skip


def _seconds(run: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def fit(rows: Sequence[tuple[int, int, float]], key_bytes: int) -> _crossover.Costs:
    """rows: (keys, budget, time of a step over that of dense decode of the same keys)."""
    keys, budget, ratio = torch.tensor(rows, dtype=torch.float64).unbind(1)
    # Each equation over its number of keys: relative errors count.
    a = torch.stack([2**20 / key_bytes / keys, torch.ones_like(keys), budget / keys], 1)
    # A negative cost is noise: such a column is left out and the others are fitted anew.
    used = [0, 1, 2]
    while True:
        found = torch.linalg.lstsq(a[:, used], ratio.unsqueeze(1)).solution.squeeze(1)
        bad = [n for n, x in zip(used, found.tolist(), strict=True) if x < 0]
        if not bad:
            break
        used = [n for n in used if n not in bad]
    costs = dict(zip(used, found.tolist(), strict=True))
    return _crossover.Costs(*(round(costs.get(n, 0.0), 3) for n in range(3)))


@torch.no_grad()
def measure(
    names: Sequence[str], contexts: Sequence[int] = CONTEXTS, repeats: int = 7
) -> dict[str, Any]:
    """Costs by class name."""
    g = torch.Generator().manual_seed(0)
    rows: dict[str, list[tuple[int, int, float]]] = {}
    for keys in contexts:
        k, v = (torch.randn(1, HEADS, keys, DIM, generator=g).bfloat16().transpose(1, 2)
                for _ in range(2))  # fmt: skip
        q = torch.randn(1, 64, HEADS * GROUP, DIM, generator=g).bfloat16()
        for name in names:
            for budget in BUDGETS:
                policy = MEASURED[name](budget)
                policy.crossover = 0
                policy.observe(q, k[:, :-1], v[:, :-1])
                step = partial(policy.attend, q[:, -1:], k, v)
                step()
                dense = _seconds(partial(attnforge.flash_decode, q[:, -1:], k, v), repeats)
                kind = type(policy).__name__
                rows.setdefault(kind, []).append((keys, budget, _seconds(step, repeats) / dense))
    return {kind: list(fit(own, _KEY_BYTES)) for kind, own in rows.items()}


def table(root: Path) -> str:
    """The committed costs, for the documentation."""
    found = json.loads((root / "python/attnforge/policies/crossovers.json").read_text())
    lines = ["| policy | fixed, MiB of K and V | per key | per budget | faster than dense from |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for kind, own in sorted(found["costs"].items()):
        at = _crossover.Costs(*own).crossover(1024, _KEY_BYTES)
        keys = "never" if at == math.inf else f"{max(1024, math.ceil(at)):,} keys"
        lines.append(f"| `{kind}` | {own[0]:.2f} | {own[1]:.3f} | {own[2]:.2f} | {keys} |")
    return (
        f"{found['device']}, {found['threads']} thread(s), kernels {found['isa']}, commit "
        f"`{found['commit']}`, {found['date']}.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="names of policies, by commas")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [n for n in args.only.split(",") if n] or sorted(MEASURED)
    costs = measure(names)
    env = machine.environment()
    kept = {key: env[key] for key in ("device", "threads", "isa", "commit", "date")}
    document = {**kept, "costs": {**_crossover.measured().get("costs", {}), **costs}}
    _crossover._FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for kind, own in sorted(costs.items()):
        at = _crossover.Costs(*own).crossover(1024, _KEY_BYTES)
        print(f"{kind:14} fixed {own[0]:7.2f} MiB  per key {own[1]:5.3f}  per budget {own[2]:6.2f}"
              f"  passes dense at {at:.0f} keys of 2 KiB, budget 1024")  # fmt: skip


if __name__ == "__main__":
    main()
