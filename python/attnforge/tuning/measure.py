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

__all__ = ["BURST_S", "Gain", "burst", "calls_per_burst", "duel", "lower_rank"]

BURST_S = 0.08
Call = Callable[[], object]


def burst(run: Call, calls: int) -> float:
    """Seconds per call over ``calls`` calls in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def calls_per_burst(run: Call, seconds: float = BURST_S) -> int:
    """Warm up, then choose how many calls fill one burst (one if a call is longer)."""
    run()  # first touch, thread pool, selection
    best = min(burst(run, 1) for _ in range(2))
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


def duel(
    default: Call, candidate: Call, calls: tuple[int, int], repeats: int, deadline: float
) -> Gain:
    """Paired bursts; fewer than ``repeats`` if the monotonic clock passes ``deadline``."""
    base: list[float] = []
    ours: list[float] = []
    for repeat in range(repeats):
        if repeat % 2:
            ours.append(burst(candidate, calls[1]))
            base.append(burst(default, calls[0]))
        else:
            base.append(burst(default, calls[0]))
            ours.append(burst(candidate, calls[1]))
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


def screen(calls: Sequence[tuple[Call, int]], rounds: int, deadline: float) -> list[float]:
    """The best seconds per call of each, over rounds that visit all of them in turn.

    What is far behind after a round is not visited again (infinity if never).
    """
    best = [math.inf] * len(calls)
    left = list(range(len(calls)))
    for turn in range(rounds):
        for index in left[turn % len(left) :] + left[: turn % len(left)]:
            if time.monotonic() > deadline:
                return best
            best[index] = min(best[index], burst(*calls[index]))
        lead = min(best)
        left = [index for index in left if best[index] <= 1.25 * lead]
    return best
