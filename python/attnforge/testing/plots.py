"""PNG plots of rate over sequence length, with the roofline (extra `bench`: matplotlib).

The style is fixed: Okabe-Ito colours (distinct under the common colour deficiencies), a marker and
a line style per implementation so that grey print still tells them apart, no date in the file.
The same results give the same bytes under the same matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnforge.testing.bench import Result

__all__ = ["group_series", "save_plots", "slug"]

# Okabe and Ito's palette: (colour, marker, line style) per implementation.
_STYLE: dict[str, tuple[str, str, str]] = {
    "attnforge": ("#0072B2", "o", "-"),
    "sdpa": ("#D55E00", "s", "--"),
    "sdpa folded": ("#E69F00", "^", "-."),
    "flex compiled": ("#009E73", "D", ":"),
}
_OTHER = ("#CC79A7", "v", "--")
_PEAK_COLOUR = "#000000"
_LABEL = {"sdpa": "torch SDPA", "sdpa folded": "torch SDPA, group folded"}

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#D0D0D0",
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "attnforge",
}


def group_series(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by their `series`, in order of x; results of no series are left out."""
    series: dict[str, list[Result]] = {}
    for r in results:
        if r.series:
            series.setdefault(r.series, []).append(r)
    return {name: sorted(rs, key=lambda r: r.x) for name, rs in series.items()}


def slug(series: str) -> str:
    """A file name from the title of a series."""
    return re.sub(r"[^a-z0-9]+", "-", series.lower().replace("+", " ")).strip("-")


def _over(series: str) -> str:
    """What the x axis of a series is: "decode over requests, ..." says it."""
    _, found, rest = series.partition(" over ")
    return rest.partition(",")[0] if found else "sequence length"


def _length(x: float, _position: object = None) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"


def _draw(axes: Any, results: Sequence[Result], peak: float) -> None:
    """One panel: rate of every implementation, and the peak line, over sequence length."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines: dict[str, list[tuple[int, float]]] = {"attnforge": []}
    for r in results:
        lines["attnforge"].append((r.x, r.rate))
        for v in r.versus:
            lines.setdefault(v.peer, []).append((r.x, v.rate))
    for name, points in lines.items():
        colour, marker, style = _STYLE.get(name, _OTHER)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour,
            marker=marker,
            linestyle=style,
            markersize=4,
            linewidth=1.5,
            label=_LABEL.get(name, name),
        )
    if peak > 0:
        label = "peak FMA rate" if results[0].unit == "GFLOP/s" else "peak read bandwidth"
        axes.axhline(peak, color=_PEAK_COLOUR, linewidth=1, label=f"{label}, same run")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([r.x for r in results]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_length))
    top = max([peak, *(y for points in lines.values() for _, y in points)])
    axes.set_ylim(0, 1.4 * top)  # the legend stands above the curves
    axes.legend(fontsize=7, loc="upper left", ncols=2)
    axes.set_ylabel(results[0].unit)
    axes.set_title(results[0].series, fontsize=9)


def _peak(results: Sequence[Result], peaks: Mapping[str, Any]) -> float:
    """The highest peak of the run; a caller without run-wide peaks gets the cases' own."""
    resource = "compute" if results[0].unit == "GFLOP/s" else "read"
    known = peaks.get(resource, {}).get("peak", 0.0)
    return float(max([known, *(r.peak for r in results)]))


def _caption(env: Mapping[str, Any]) -> str:
    restricted = env.get("restricted", "no")
    limit = f", both sides limited to {restricted}" if restricted != "no" else ""
    return (
        f"{env.get('device')}, {env.get('threads')} threads, kernels {env.get('isa')}, "
        f"torch {env.get('torch')} {env.get('torch_isa')}{limit}\n"
        f"commit {env.get('commit')}, {env.get('date')}"
    )


def save_plots(
    results: Sequence[Result],
    directory: str | Path,
    env: Mapping[str, Any],
    peaks: Mapping[str, Any],
    name: str = "flash",
) -> list[Path]:
    """Write one PNG per series and one overview of them all.

    Args:
        results: measured cases; those without a `series` are ignored.
        directory: created if missing.
        env: `attnforge.testing.machine.environment()`, printed as the caption.
        peaks: `Peaks.as_dict()`, for the roofline.
        name: prefix of the file names, the family.

    Returns:
        the files written, the overview first.

    Raises:
        ModuleNotFoundError: matplotlib is missing (`pip install attnforge[bench]`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    series = group_series(results)
    if not series:
        return []
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with matplotlib.rc_context(_RC):
        columns = min(2, len(series))
        rows = -(-len(series) // columns)
        overview = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.4), dpi=150, layout="constrained")
        panels = list(overview.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[len(series) :]:
            axes.set_visible(False)
        for axes, rs in zip(panels, series.values(), strict=False):
            _draw(axes, rs, _peak(rs, peaks))
        common = {_over(title) for title in series}
        label = common.pop() if len(common) == 1 else "as the titles say"
        overview.supxlabel(f"{label}\n{_caption(env)}", fontsize=7)
        written.append(_save(overview, folder / f"{name}.png"))
        for title, rs in series.items():
            figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
            axes = figure.subplots()
            _draw(axes, rs, _peak(rs, peaks))
            figure.supxlabel(f"{_over(title)}\n{_caption(env)}", fontsize=6)
            written.append(_save(figure, folder / f"{name}-{slug(title)}.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    # Without a Software entry the file does not change with matplotlib's version string.
    figure.savefig(path, metadata={"Software": None})
    return path
