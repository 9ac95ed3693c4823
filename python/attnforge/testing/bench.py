"""Honest benchmarks: candidate and peers interleaved in one process, with error beside speed.

Protocol (the same for every family):

- one repeat = one burst of the candidate, one of each peer and one of the roofline probe, in an
  order that rotates from repeat to repeat; idle time before each burst;
- a burst is as many calls as fit into 80 ms (one call if a call is longer); on a GPU 20 ms, by
  events on its stream;
- the headline is the **median of the paired ratios** peer / candidate, where a pair comes from
  one repeat, so that a slow second of a shared machine hits both sides; minimum and median times
  stand beside it, with the steal ticks and the load by other processes meanwhile;
- the fraction of peak is paired in the same way with a probe burst of that repeat;
- every number carries its error against float64 and an environment block.

A family describes its cases in `attnforge.testing.bench_<family>`; nothing here knows attention.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attnforge.testing.results import (
    ErrorStat,
    Goal,
    Result,
    Timing,
    Versus,
    from_json,
    load_note,
    markdown_table,
    render_table,
    table_rows,
    to_json,
)
from attnforge.testing.roofline import UNIT, Peaks, Resource, measure_peaks
from attnforge.tuning.measure import BURST_S, calls_per_burst, seconds_per_call

__all__ = [
    "FAMILIES",
    "Case",
    "ErrorStat",
    "Goal",
    "Progress",
    "Result",
    "Timing",
    "Versus",
    "Workload",
    "family_cases",
    "flash_cases",
    "from_json",
    "load_note",
    "markdown_table",
    "render_table",
    "run_case",
    "run_cases",
    "select_cases",
    "set_threads",
    "table_rows",
    "to_json",
]

FAMILIES = ("block_sparse", "cope", "flash", "linear", "paged", "reductions", "retrieval")
_REST_S = {"cpu": 0.1, "cuda": 0.01}
REPEATS = 15
QUICK_REPEATS = 5

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: called before each case with what runs next, and at the end."""


@dataclass(slots=True)
class Workload:
    """What one case runs, with its inputs already made.

    `peers` maps a name to a callable, or to the sentence that says why the peer cannot run here.
    `errors` computes the error of the candidate ("attnforge") and of each peer.
    """

    candidate: Callable[[], object]
    peers: dict[str, Callable[[], object] | str]
    errors: Callable[[], dict[str, ErrorStat]] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a benchmark.

    `work` is flops (resource "compute") or bytes (resource "read") of the problem itself, from the
    operator's cost formula: never what an implementation happens to do. `series` and `x` place the
    case in a plot. `build(backend)` makes the inputs, once, just before the timing; its
    `Workload.peers` has the names of `peers`.
    """

    name: str
    title: str
    family: str
    resource: Resource
    work: float
    build: Callable[[str | None], Workload]
    peers: tuple[str, ...] = ()
    goals: Mapping[str, Goal] = field(default_factory=dict)
    peak_goal: float | None = None
    series: str = ""
    x: int = 0
    repeats: int = REPEATS
    device: str = "cpu"


def flash_cases(quick: bool = False) -> list[Case]:
    """The cases of the `flash` family's speed table; `quick` takes 5 repeats instead of 15."""
    return family_cases("flash", quick)


def family_cases(
    family: str, quick: bool = False, sweep: bool = False, device: str = "cpu"
) -> list[Case]:
    """The cases of one family: its table, or its sweep over sequence lengths for the plots.

    Raises:
        ValueError: the family has no benchmark.
    """
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"attnforge.bench: no benchmark for family {family!r}; there is: {known}")
    suffix = "_gpu" if device == "cuda" else ""
    name = f"attnforge.testing.bench_{family}{suffix}"
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"attnforge.bench: no {device} benchmark for family {family!r} yet")
    module = importlib.import_module(name)
    cases: list[Case] = module.sweep(quick) if sweep else module.table(quick)
    return cases


def select_cases(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """The cases whose name matches a shell pattern; a plain word matches anywhere in the name."""
    if pattern is None:
        return list(cases)
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [c for c in cases if fnmatch.fnmatchcase(c.name, glob)]


def _cpu_ticks() -> list[int]:
    """The machine's counters: user nice system idle iowait irq softirq steal ..., in ticks."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return [int(x) for x in first[1:9]]
    except (OSError, IndexError, ValueError):
        return [0] * 8


@dataclass(slots=True)
class _Load:
    """What the machine did beside us since this object was made: the honesty of a timing."""

    ticks: list[int] = field(default_factory=_cpu_ticks)
    own: float = field(default_factory=lambda: sum(os.times()[:2]))
    begin: float = field(default_factory=time.perf_counter)

    def steal_ticks(self) -> int:
        """Ticks (usually 10 ms) that the host took from this machine."""
        return _cpu_ticks()[7] - self.ticks[7]

    def other_cores(self) -> float:
        """Cores that other processes kept busy, on average."""
        busy = [now - then for now, then in zip(_cpu_ticks(), self.ticks, strict=True)]
        seconds = sum(busy[i] for i in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")
        own = sum(os.times()[:2]) - self.own
        elapsed = max(time.perf_counter() - self.begin, 1e-9)
        return max(0.0, (seconds - own) / elapsed)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, mid, high


def run_case(
    case: Case, peaks: Peaks, backend: str | None = None, rest_s: float | None = None
) -> Result:
    """Measure one case by the protocol above.

    Args:
        case: what to run.
        peaks: probes from `measure_peaks`; their best rates are updated.
        backend: forced backend of the candidate, or None for the registry's choice.
        rest_s: idle seconds before each burst; None takes the device's default.
    """
    rest_s = _REST_S[case.device] if rest_s is None else rest_s
    workload = case.build(backend)
    probe = peaks.of(case.resource)
    runs: dict[str, Callable[[], object]] = {"attnforge": workload.candidate}
    unavailable: dict[str, str] = {}
    long = BURST_S[case.device]
    calls = {"attnforge": calls_per_burst(workload.candidate, long, case.device)}
    for name, run in workload.peers.items():
        if isinstance(run, str):
            unavailable[name] = run
            continue
        try:
            calls[name] = calls_per_burst(run, long, case.device)
        except Exception as error:  # a peer that fails is reported, it does not end the run
            unavailable[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            continue
        runs[name] = run

    times: dict[str, list[float]] = {name: [] for name in runs}
    peak_rates: list[float] = []
    order = [*runs, "peak"]
    load = _Load()
    for repeat in range(case.repeats):
        turn = repeat % len(order)
        for name in order[turn:] + order[:turn]:
            time.sleep(rest_s)
            if name == "peak":
                peak_rates.append(probe.burst())
            else:
                times[name].append(seconds_per_call(runs[name], calls[name], case.device))
    steal, others = load.steal_ticks(), load.other_cores()

    errors = workload.errors() if workload.errors is not None else {}
    timings = {
        name: Timing(min(t), statistics.median(t), calls[name], t) for name, t in times.items()
    }
    ours = times["attnforge"]
    scale = case.work * 1e-9
    versus: list[Versus] = []
    for name in runs:
        if name == "attnforge":
            continue
        low, mid, high = _quartiles([p / o for p, o in zip(times[name], ours, strict=True)])
        versus.append(
            Versus(
                peer=name,
                ratio=mid,
                ratio_low=low,
                ratio_high=high,
                timing=timings[name],
                rate=scale / timings[name].median_s,
                error=errors.get(name),
                goal=case.goals.get(name),
            )
        )
    fractions = [scale / o / p for o, p in zip(ours, peak_rates, strict=True)]
    return Result(
        name=case.name,
        title=case.title,
        family=case.family,
        unit=UNIT[case.resource],
        work=case.work,
        series=case.series,
        x=case.x,
        timing=timings["attnforge"],
        rate=scale / timings["attnforge"].median_s,
        peak=statistics.median(peak_rates),
        peak_source=probe.source,
        peak_fraction=statistics.median(fractions),
        peak_goal=case.peak_goal,
        error=errors.get("attnforge"),
        versus=versus,
        unavailable=unavailable,
        repeats=case.repeats,
        steal_ticks=steal,
        other_cores=others,
    )


def run_cases(
    cases: Sequence[Case],
    progress: Progress | None = None,
    *,
    peaks: Peaks | None = None,
    backend: str | None = None,
    rest_s: float | None = None,
) -> list[Result]:
    """Measure every case in turn; inputs of one case are freed before the next is built.

    Args:
        cases: from `flash_cases()` or `family_cases()`.
        progress: called as `progress(title, done, total)` before each case and once at the end.
        peaks: same-run peaks, measured first if not given.
        backend: forced backend of the candidate.
        rest_s: idle seconds before each burst; None takes the device's default.

    Returns:
        one `Result` per case, in order.
    """
    total = len(cases)
    if peaks is None:
        if progress is not None:
            progress("peaks of this machine", 0, total)
        peaks = measure_peaks(cases[0].device if cases else "cpu")
    results: list[Result] = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress(case.title, done, total)
        results.append(run_case(case, peaks, backend, rest_s))
    if progress is not None:
        progress("done", total, total)
    return results


def set_threads(threads: int | None) -> int:
    """Set torch's intra-op threads (None: leave them) and return the number in force."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"attnforge.bench: threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    return torch.get_num_threads()
