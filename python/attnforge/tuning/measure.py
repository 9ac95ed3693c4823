"""Bursts of calls and what may be said from pairs of them.

A burst of the default and one of a candidate stand side by side, in an order that alternates, so
that a slow second of a shared machine hits both. The median of the paired ratios is the gain; a
candidate wins only if the lower end of a distribution-free confidence interval of that median lies
above the margin.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BURST_S", "Gain", "calls_per_burst", "duel", "lower_rank", "screen", "seconds_per_call"]

# A GPU needs no long bursts: its clock is its own, and nobody shares it.
BURST_S = {"cpu": 0.08, "cuda": 0.02}
Call = Callable[[], object]


def seconds_per_call(run: Callable[[], object], calls: int, device: str) -> float:
    """Mean seconds of ``calls`` calls in a row; on "cuda" by events on the current stream."""
    if device == "cuda":
        event: Any = torch.cuda.Event
        begin_event, end_event = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        begin_event.record()
        for _ in range(calls):
            run()
        end_event.record()
        torch.cuda.synchronize()
        return float(begin_event.elapsed_time(end_event)) * 1e-3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def calls_per_burst(run: Call, seconds: float, device: str) -> int:
    """Warm up, then choose how many calls fill one burst (one if a call is longer)."""
    seconds_per_call(run, 1, device)  # first touch, thread pool, selection, compilation
    best = min(seconds_per_call(run, 1, device) for _ in range(2))
    return max(1, min(10_000, int(seconds / max(best, 1e-9))))


@dataclass(frozen=True)
class Gain:
    """Time of the default over time of the candidate: the median pair and its 95% interval."""

    middle: float
    low: float
    high: float
    default_s: float  # medians over the bursts
    candidate_s: float
    repeats: int

    @property
    def spread(self) -> float:
        """Half the interval relative to the median."""
        return (self.high - self.low) / 2 / self.middle


def duel(runs: tuple[Call, Call], repeats: int, deadline: float, device: str) -> Gain:
    """Paired bursts of a default and a candidate.

    Fewer than ``repeats`` if the monotonic clock passes ``deadline``.
    """
    calls = [calls_per_burst(run, BURST_S[device], device) for run in runs]
    base: list[float] = []
    ours: list[float] = []
    for repeat in range(repeats):
        for side in (1, 0) if repeat % 2 else (0, 1):
            (base, ours)[side].append(seconds_per_call(runs[side], calls[side], device))
        if time.monotonic() > deadline:
            break
    ratios = sorted(b / o for b, o in zip(base, ours, strict=True))
    rank = lower_rank(len(ratios))
    low, high = (0.0, math.inf) if rank is None else (ratios[rank], ratios[-1 - rank])
    return Gain(
        statistics.median(ratios),
        low,
        high,
        statistics.median(base),
        statistics.median(ours),
        len(ratios),
    )


def lower_rank(count: int, tail: float = 0.025) -> int | None:
    """Index of the order statistic below which the median lies with probability ``tail`` at most.

    The number of values below the true median is binomial (n, 1/2) whatever their distribution.
    None for fewer than 6 values, which bound nothing at 2.5%.
    """
    below, rank = 0.0, None
    for k in range(count):
        below += math.comb(count, k) * 0.5**count
        if below > tail:
            break
        rank = k
    return rank


def screen(
    runs: Sequence[Call], seconds: float, rounds: int, deadline: float, device: str
) -> list[float]:
    """The best seconds per call of each, over rounds that visit all of them in turn.

    What is far behind after a round is not visited again (infinity if never).
    """
    calls = calls_per_burst(runs[0], seconds, device)
    best = [math.inf] * len(runs)
    left = list(range(len(runs)))
    for turn in range(rounds):
        for index in left[turn % len(left) :] + left[: turn % len(left)]:
            if time.monotonic() > deadline:
                return best
            best[index] = min(best[index], seconds_per_call(runs[index], calls, device))
        lead = min(best)
        left = [index for index in left if best[index] <= 1.25 * lead]
    return best
