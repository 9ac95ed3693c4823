"""PNG plots over sequence length and other sizes, with the roofline (extra `bench`: matplotlib).

A panel is a view of a series: the rate of every side, or (families bound by memory) the time of
every side beside the fraction of the read bandwidth. Series that differ after the first comma of
their titles alone ("decode over keys, int8 pages") also share a figure, a line each.

The style is fixed: Okabe-Ito colours (distinct under the common colour deficiencies), a marker and
a line style per implementation so that grey print still tells them apart, no date in the file.
The same results give the same bytes under the same matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attnforge.testing.bench import Result

__all__ = ["group_series", "save_plots", "slug"]

# Okabe and Ito's palette: (colour, marker, line style) per implementation.
_STYLE: dict[str, tuple[str, str, str]] = {
    "attnforge": ("#0072B2", "o", "-"),
    "sdpa": ("#D55E00", "s", "--"),
    "sdpa gathered": ("#D55E00", "s", "--"),
    "sdpa folded": ("#E69F00", "^", "-."),
    "contiguous": ("#56B4E9", "P", "--"),
    "flex compiled": ("#009E73", "D", ":"),
}
_OTHER = ("#CC79A7", "v", "--")
# Lines of a comparison, in order.
_CYCLE = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "D", "-."),
    ("#CC79A7", "v", ":"),
    ("#E69F00", "^", "-"),
    ("#56B4E9", "P", "--"),
)
# Of a family's figures, left to right; families that are not here show the rate.
_VIEWS = {"paged": ("time", "fraction")}
_PEAK_COLOUR = "#000000"
_LABEL = {
    "sdpa": "torch SDPA",
    "sdpa gathered": "torch SDPA, pages gathered",
    "sdpa folded": "torch SDPA, group folded",
    "contiguous": "attnforge, contiguous",
}

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


def _lines(results: Sequence[Result], view: str) -> dict[str, list[tuple[int, float]]]:
    """Points (x, y) of every side of a series."""
    lines: dict[str, list[tuple[int, float]]] = {"attnforge": []}
    for r in results:
        own = {"rate": r.rate, "time": r.timing.median_s * 1e3, "fraction": 100 * r.peak_fraction}
        lines["attnforge"].append((r.x, own[view]))
        # A peer may read other bytes than ours: it has a time, but no fraction here.
        for v in r.versus if view != "fraction" else ():
            y = v.rate if view == "rate" else v.timing.median_s * 1e3
            lines.setdefault(v.peer, []).append((r.x, y))
    return lines


def _draw_series(results: Sequence[Result], peak: float, axes: Any, view: str) -> None:
    """One panel: a view of every side of a series, and in a rate the peak line."""
    lines = _lines(results, view)
    for name, points in lines.items():
        _plot(axes, points, _STYLE.get(name, _OTHER), _LABEL.get(name, name))
    ys = [y for points in lines.values() for _, y in points]
    if view == "rate" and peak > 0:
        label = "peak FMA rate" if results[0].unit == "GFLOP/s" else "peak read bandwidth"
        axes.axhline(peak, color=_PEAK_COLOUR, linewidth=1, label=f"{label}, same run")
    _finish(axes, results, view, max([peak if view == "rate" else 0.0, *ys]))
    axes.set_title(results[0].series, fontsize=9)


def _draw_together(series: Mapping[str, Sequence[Result]], axes: Any, view: str) -> None:
    """One panel: a view of our side of several series, named by what their titles differ in."""
    ys = []
    for (title, results), style in zip(series.items(), _CYCLE, strict=False):
        points = _lines(results, view)["attnforge"]
        _plot(axes, points, style, title.partition(", ")[2])
        ys += [y for _, y in points]
    some = next(iter(series.values()))
    _finish(axes, some, view, max(ys))
    axes.set_title(some[0].series.partition(",")[0], fontsize=9)


def _plot(
    axes: Any, points: Sequence[tuple[int, float]], style: tuple[str, str, str], label: str
) -> None:
    colour, marker, dashes = style
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=colour,
        marker=marker,
        linestyle=dashes,
        markersize=4,
        linewidth=1.5,
        label=label,
    )


def _finish(axes: Any, results: Sequence[Result], view: str, top: float) -> None:
    """Axes, legend and labels of a panel."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([r.x for r in results]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_length))
    if view == "time":
        axes.set_yscale("log", base=10)
        axes.set_ylim(top=8 * top)  # the legend stands above the curves
    else:
        axes.set_ylim(0, 1.4 * max(top, 100.0 if view == "fraction" else 0.0))
    if view == "fraction":
        axes.axhline(100, color=_PEAK_COLOUR, linewidth=1, label="read bandwidth, same run")
    axes.legend(fontsize=7, loc="upper left", ncols=2)
    axes.set_ylabel(
        {"time": "ms per call", "fraction": "% of bandwidth"}.get(view, results[0].unit)
    )


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
    """Write one PNG per series, one per comparison of series, and an overview of the series.

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
    views = _VIEWS.get(name, ("rate",))
    together: dict[str, dict[str, list[Result]]] = {}
    for title, rs in series.items():
        if " over " in title:
            together.setdefault(title.partition(",")[0], {})[title] = rs
    written: list[Path] = []
    with matplotlib.rc_context(_RC):
        columns = min(2, len(series) * len(views))
        rows = -(-len(series) * len(views) // columns)
        overview = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.4), dpi=150, layout="constrained")
        panels = list(overview.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[len(series) * len(views) :]:
            axes.set_visible(False)
        shown = [(rs, view) for rs in series.values() for view in views]
        for axes, (rs, view) in zip(panels, shown, strict=False):
            _draw_series(rs, _peak(rs, peaks), axes, view)
        common = {_over(title) for title in series}
        label = common.pop() if len(common) == 1 else "as the titles say"
        overview.supxlabel(f"{label}\n{_caption(env)}", fontsize=7)
        written.append(_save(overview, folder / f"{name}.png"))

        def figure(title: str, draw: Callable[[Any, str], None]) -> None:
            size = (6.4, 4.0) if len(views) == 1 else (4.6 * len(views), 3.6)
            drawn = Figure(figsize=size, dpi=150, layout="constrained")
            panels = drawn.subplots(1, len(views), squeeze=False).flat
            for axes, view in zip(panels, views, strict=True):
                draw(axes, view)
            drawn.supxlabel(f"{_over(title)}\n{_caption(env)}", fontsize=6)
            written.append(_save(drawn, folder / f"{name}-{slug(title)}.png"))

        for title, rs in series.items():
            figure(title, partial(_draw_series, rs, _peak(rs, peaks)))
        for title, several in together.items():
            if len(several) > 1:
                figure(title, partial(_draw_together, several))
    return written


def _save(figure: Any, path: Path) -> Path:
    # Without a Software entry the file does not change with matplotlib's version string.
    figure.savefig(path, metadata={"Software": None})
    return path
