"""Where a sparse step passes a dense one: the measured costs of each policy.

A step over n keys with a budget of b is modelled by three numbers,

    fixed + per_key * n + per_budget * b        against n

all in dense terms: per_key and per_budget in dense keys per key, fixed in MiB of K and V that dense
decode reads meanwhile, so that it counts less the more heads and channels a model has. It is fitted
by `python -m attnforge.testing.crossover`, which rewrites ``crossovers.json`` beside this file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Costs", "costs_of", "measured"]

_FILE = Path(__file__).with_name("crossovers.json")
_loaded: dict[str, Any] = {}


class Costs(NamedTuple):
    """Of one policy, see above."""

    fixed: float  # MiB
    per_key: float
    per_budget: float

    def crossover(self, budget: int, key_bytes: int) -> float:
        """Keys from which a step is faster than dense; key_bytes: K and V of a key, all heads."""
        left = 1.0 - self.per_key
        if left <= 0.0:
            return math.inf
        return (self.fixed * 2**20 / key_bytes + self.per_budget * budget) / left


def measured() -> dict[str, Any]:
    """The file: device, threads, commit, date and ``costs`` by name of the policy's class."""
    if not _loaded:
        _loaded.update(json.loads(_FILE.read_text(encoding="utf-8")))
    return _loaded


def costs_of(policy: str) -> Costs | None:
    """The measured costs of a policy class; None if it was not measured."""
    found = measured()["costs"].get(policy)
    return None if found is None else Costs(*found)
