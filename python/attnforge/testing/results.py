"""Results of a benchmark: their types, as a table, as Markdown, as JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnforge.testing.roofline import Peaks

__all__ = [
    "ErrorStat",
    "Goal",
    "Result",
    "Timing",
    "Versus",
    "from_json",
    "load_note",
    "markdown_table",
    "render_table",
    "table_rows",
    "to_json",
]

# Fractions of the error bound beyond this are no rounding: torch's bf16 forward reaches about 100.
WRONG = 1000.0


@dataclass(frozen=True, slots=True)
class ErrorStat:
    """Error against float64 on the same rounded inputs.

    `max_abs` is in the tensor's own unit; `bound` is the largest fraction of the per-element error
    bound that was used (above 1 is a failure), None where only the absolute error was taken.
    """

    max_abs: float
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """A speed-up over one peer: what must be reached, and what is aimed for."""

    at_least: float
    aim: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call: the best and the median burst, and all of them."""

    min_s: float
    median_s: float
    calls_per_burst: int
    bursts_s: list[float]


@dataclass(frozen=True, slots=True)
class Versus:
    """The candidate against one peer: median and quartiles of the paired ratios (>1: faster)."""

    peer: str
    ratio: float
    ratio_low: float
    ratio_high: float
    timing: Timing
    rate: float
    error: ErrorStat | None
    goal: Goal | None


@dataclass(frozen=True, slots=True)
class Result:
    """A measured case. `rate` and `peak` are in `unit`; `peak_fraction` is a paired median."""

    name: str
    title: str
    family: str
    unit: str
    work: float
    series: str
    x: int
    timing: Timing
    rate: float
    peak: float
    peak_source: str
    peak_fraction: float
    peak_goal: float | None
    error: ErrorStat | None
    versus: list[Versus]
    unavailable: dict[str, str]
    repeats: int
    steal_ticks: int
    other_cores: float  # cores that other processes kept busy meanwhile, on average


def load_note(results: Sequence[Result]) -> str:
    """One line on how quiet the machine was while these were timed."""
    steal = sum(r.steal_ticks for r in results)
    others = [r.other_cores for r in results]
    mean = sum(others) / max(1, len(others))
    return (
        f"machine meanwhile: {steal} steal ticks; other processes used {mean:.2f} cores "
        f"on average, {max(others, default=0.0):.2f} in the worst case"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _err(stat: ErrorStat | None) -> str:
    if stat is None:
        return "-"
    return f"{stat.max_abs:.1e}" + ("" if stat.bound is None else f" [{stat.bound:.2g}]")


def _ratio(versus: Versus) -> str:
    """The headline, unless the peer's result is wrong: a wrong answer has no speed."""
    bound = versus.error.bound if versus.error is not None else None
    return "wrong result" if bound is not None and bound > WRONG else f"{versus.ratio:.2f}x"


HEADER = (
    "case",
    "min ms",
    "median ms",
    "rate",
    "of peak",
    "error [of bound]",
    "peer",
    "peer ms",
    "peer error",
    "ratio",
    "bar / aim",
)


def table_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The cells under `HEADER`: one row per peer, the case's own cells on its first row."""
    rows: list[tuple[str, ...]] = []
    for r in results:
        own = (
            r.title,
            _ms(r.timing.min_s),
            _ms(r.timing.median_s),
            f"{r.rate:.1f} {r.unit}",
            f"{r.peak_fraction:.0%}" + (f" (bar {r.peak_goal:.0%})" if r.peak_goal else ""),
            _err(r.error),
        )
        rest = [
            (
                v.peer,
                _ms(v.timing.median_s),
                _err(v.error),
                _ratio(v),
                f"{v.goal.at_least:g}x / {v.goal.aim:g}x" if v.goal else "",
            )
            for v in r.versus
        ]
        rest += [(name, "not run", "-", "-", why[:40]) for name, why in r.unavailable.items()]
        rest = rest or [("", "", "", "", "")]
        for i, cells in enumerate(rest):
            rows.append((own if i == 0 else ("",) * len(own)) + cells)
    return rows


def render_table(results: Sequence[Result]) -> str:
    """The results as aligned plain text, the same in a terminal, a log and a pipe."""
    rows = [HEADER, *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    text_columns = {0, 6, 10}

    def line(row: tuple[str, ...]) -> str:
        cells = (
            c.ljust(w) if i in text_columns else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(HEADER), line(tuple("-" * w for w in widths)), *map(line, rows[1:])])


def markdown_table(results: Sequence[Result]) -> str:
    """The results as a Markdown table, for the measurements page."""
    rows = [HEADER, tuple("---" for _ in HEADER), *table_rows(results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def to_json(results: Sequence[Result], env: Mapping[str, Any], peaks: Peaks | None = None) -> str:
    """One JSON document: environment, same-run peaks, results with every burst."""
    document = {
        "schema": 1,
        "environment": dict(env),
        "peaks": peaks.as_dict() if peaks is not None else {},
        "results": [asdict(r) for r in results],
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> tuple[list[Result], dict[str, Any], dict[str, Any]]:
    """What `to_json` wrote: results, environment and peaks.

    Raises:
        ValueError: another schema.
    """
    document = json.loads(text)
    if document.get("schema") != 1:
        raise ValueError(f"attnforge.bench: unknown result schema {document.get('schema')!r}")

    def error(raw: dict[str, Any] | None) -> ErrorStat | None:
        return None if raw is None else ErrorStat(**raw)

    results: list[Result] = []
    for raw in document["results"]:
        versus = [
            Versus(
                **{
                    **v,
                    "timing": Timing(**v["timing"]),
                    "error": error(v["error"]),
                    "goal": Goal(**v["goal"]) if v["goal"] else None,
                }
            )
            for v in raw["versus"]
        ]
        results.append(
            Result(
                **{
                    **raw,
                    "timing": Timing(**raw["timing"]),
                    "error": error(raw["error"]),
                    "versus": versus,
                }
            )
        )
    return results, document["environment"], document["peaks"]
