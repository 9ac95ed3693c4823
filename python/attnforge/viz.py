"""Pictures of attention, without the S x S matrix: tiles, spans and heads, as PNG or HTML.

    from attnforge import viz
    out, lse = attnforge.flash_attention(q, k, v, causal=True, return_lse=True)
    viz.tile_map(q, k, lse, causal=True).html("map.html")       # needs nothing but torch
    viz.span_map(q, k, lse, {"system": 40, "user": 512}, causal=True).png("spans.png")
    viz.head_map([(q, k, lse), ...], causal=True).png("heads.png")  # layers x heads

Every function reduces on the operators of ``attnforge.reductions`` and takes their options (give
what the attention had): the largest buffer is rows x tiles. A `Picture` is named numbers, which
``html`` writes with the values under the pointer and ``png`` draws with matplotlib (the extra
``viz``).
"""

from __future__ import annotations

import html as _html
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import reductions

__all__ = ["Picture", "head_map", "span_map", "tile_map"]

_WHERE = "attnforge.viz"


@dataclass(frozen=True)
class Picture:
    """Panels of named numbers.

    Attributes:
        values: [panels, rows, columns] on the CPU.
        title, row_axis, column_axis: what it is, and what rows and columns stand for.
        panels, rows, columns: their names.
    """

    values: Tensor
    title: str
    row_axis: str
    column_axis: str
    panels: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = (len(self.panels), len(self.rows), len(self.columns))
        if tuple(self.values.shape) != sizes:
            raise ValueError(
                f"{_WHERE}.Picture: values have shape {tuple(self.values.shape)}; names say {sizes}"
            )

    def html(self, path: str | Path) -> Path:
        """Write one file that opens in any browser and asks no server for anything."""
        data = {
            "values": [[[_number(x) for x in row] for row in p] for p in self.values.tolist()],
            "rows": self.rows,
            "columns": self.columns,
            "panels": self.panels,
        }
        # "</" could end the script: JSON may write the slash escaped.
        text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
        page = _PAGE
        for name in ("title", "row_axis", "column_axis"):
            page = page.replace(f"[[{name}]]", _html.escape(getattr(self, name)))
        path = Path(path)
        path.write_text(page.replace("[[data]]", text), encoding="utf-8")
        return path

    def png(self, path: str | Path, *, dpi: int = 120) -> Path:
        """Draw the panels in a grid, each with a scale of its own."""
        try:
            figures = importlib.import_module("matplotlib.figure")
        except ImportError:
            raise ImportError(
                f"{_WHERE}: matplotlib is missing; pip install 'attnforge[viz]', or write html()"
            ) from None
        across = math.ceil(math.sqrt(len(self.panels)))
        down = math.ceil(len(self.panels) / across)
        figure = figures.Figure(figsize=(3.4 * across, 3.0 * down), layout="constrained")
        figure.suptitle(self.title)
        for i, (name, panel) in enumerate(zip(self.panels, self.values, strict=True)):
            axes = figure.add_subplot(down, across, i + 1)
            image = axes.imshow(
                panel.numpy(), aspect="auto", interpolation="nearest", cmap="viridis"
            )
            axes.set_title(name, fontsize=8)
            for axis, names, label, turn in (
                (axes.yaxis, self.rows, self.row_axis, 0),
                (axes.xaxis, self.columns, self.column_axis, 45),
            ):
                step = math.ceil(len(names) / 8)  # as many labels as can be read
                axis.set_ticks(range(0, len(names), step), names[::step], fontsize=6, rotation=turn)
                axis.set_label_text(label, fontsize=7)
            figure.colorbar(image, ax=axes)
        path = Path(path)
        figure.savefig(path, dpi=dpi, format="png")
        return path


def _number(x: float) -> float | None:
    return float(f"{x:.4g}") if math.isfinite(x) else None


def _edges(n: int, tiles: int) -> list[int]:
    """Boundaries of at most ``tiles`` tiles of equal size over n, the last one perhaps shorter."""
    size = max(1, math.ceil(n / tiles))
    return [*range(0, n, size), n] if n else [0]


def _one(op: str, q: Tensor, k: Tensor, lse: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch entry that is looked at, as a batch of one, without gradients."""
    if q.ndim != 4 or not -q.shape[0] <= batch < q.shape[0]:
        raise ValueError(
            f"{_WHERE}.{op}: batch is {batch} and q has shape {tuple(q.shape)}; want "
            "[B, Sq, Hq, D] and one of its batch entries"
        )
    return q.detach()[batch][None], k.detach()[batch][None], lse.detach()[batch][None]


def _tile_mean(rows: Tensor, edges: Sequence[int]) -> Tensor:
    """rows [H, Sq, n] -> [H, tiles, n], the mean over the rows of each tile."""
    parts = [rows[:, a:b].mean(1) for a, b in pairwise(edges)]
    return torch.stack(parts, 1) if parts else rows[:, :0]


def _tile_names(edges: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{a}..{b - 1}" for a, b in pairwise(edges))


def _head_names(n: int) -> tuple[str, ...]:
    return tuple(f"head {h}" for h in range(n))


def tile_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: int = 64,
    columns: int = 64,
    of: str = "mean",
    batch: int = 0,
    **options: Any,
) -> Picture:
    """The attention matrix of each head at the size of a screen.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], lse [B, Hq, Sq]. of="mean": the mass that the queries of a
    tile give to its keys, on average, so that a row of tiles sums to 1. of="max": the largest
    probability in the tile, which shows single keys that a mean hides.
    """
    if of not in ("mean", "max") or rows < 1 or columns < 1:
        raise ValueError(
            f"{_WHERE}.tile_map: of={of!r}, rows={rows}, columns={columns}; want 'mean' or 'max' "
            "and at least one row and column"
        )
    q, k, lse = _one("tile_map", q, k, lse, batch)
    across, down = _edges(k.shape[1], columns), _edges(q.shape[1], rows)
    if of == "max":
        sizes = [max(1, math.ceil(n / t)) for n, t in ((q.shape[1], rows), (k.shape[1], columns))]
        values = reductions.block_max(q, k, lse, *sizes, **options)[0]
    else:
        bounds = torch.tensor(across, dtype=torch.int32, device=q.device)
        values = _tile_mean(reductions.span_mass(q, k, lse, bounds, **options)[0], down)
    names = (_head_names(q.shape[2]), _tile_names(down), _tile_names(across))
    return Picture(values.cpu(), f"attention, {of} of tiles", "queries", "keys", *names)


def span_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spans: Mapping[str, int],
    *,
    rows: int = 32,
    batch: int = 0,
    **options: Any,
) -> Picture:
    """The mass that queries give to named parts of the keys: where a prompt is read.

    spans: name -> length in tokens, from key 0 on; keys behind the last span form "rest".
    """
    q, k, lse = _one("span_map", q, k, lse, batch)
    ends = [0]
    for name, length in spans.items():
        ends.append(ends[-1] + length)
        if length < 0 or ends[-1] > k.shape[1]:
            raise ValueError(
                f"{_WHERE}.span_map: span {name!r} of {length} keys ends at {ends[-1]}; want "
                f"lengths of at least 0 within {k.shape[1]} keys"
            )
    names = tuple(spans)
    if ends[-1] < k.shape[1]:
        ends, names = [*ends, k.shape[1]], (*names, "rest")
    down = _edges(q.shape[1], rows)
    bounds = torch.tensor(ends, dtype=torch.int32, device=q.device)
    values = _tile_mean(reductions.span_mass(q, k, lse, bounds, **options)[0], down).cpu()
    heads = _head_names(q.shape[2])
    return Picture(values, "mass of spans", "queries", "spans", heads, _tile_names(down), names)


def head_map(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    sink: int = 4,
    batch: int = 0,
    **options: Any,
) -> Picture:
    """Statistics of heads, layer by layer: one panel each, layers down, heads across.

    layers: (q, k, lse) of each layer, with as many query heads. Panels, as means over queries:
    "entropy" in nats; "sink", the mass of the first ``sink`` keys; "peak", the largest
    probability; "reach", how many keys back that one lies (of self-attention aligned to the last
    key).
    """
    if not layers:
        raise ValueError(f"{_WHERE}.head_map: no layers; want (q, k, lse) of one or more")
    found = [_heads(*_one("head_map", *layer, batch), sink, options) for layer in layers]
    if len({x.shape for x in found}) > 1:
        heads = [x.shape[1] for x in found]
        raise ValueError(
            f"{_WHERE}.head_map: layers have {heads} query heads; want as many in each"
        )
    values = torch.stack(found, 1).cpu()  # [4, layers, H]
    names = (
        ("entropy", "sink", "peak", "reach"),
        tuple(f"layer {i}" for i in range(len(found))),
        _head_names(values.shape[2]),
    )
    return Picture(values, "heads", "layers", "heads", *names)


def _heads(q: Tensor, k: Tensor, lse: Tensor, sink: int, options: dict[str, Any]) -> Tensor:
    """[4, H] of one layer: means over its queries."""
    bounds = torch.tensor([0, min(sink, k.shape[1])], dtype=torch.int32, device=q.device)
    peak, at = (x[0, ..., 0] for x in reductions.topk_keys(q, k, lse, 1, **options))  # [H, Sq]
    own = torch.arange(q.shape[1], device=q.device) + (k.shape[1] - q.shape[1])
    reach = torch.where(at < 0, 0, own - at).to(peak.dtype)
    rows = (
        reductions.row_entropy(q, k, lse, **options)[0],
        reductions.span_mass(q, k, lse, bounds, **options)[0, ..., 0],
        peak,
        reach,
    )
    return torch.stack([x.mean(-1) for x in rows])


_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>[[title]]</title>
<style>
body { font: 14px sans-serif; margin: 1.5em; color: #222; background: #fff }
main { display: flex; flex-wrap: wrap; gap: 1.2em }
canvas { width: 260px; height: 260px; image-rendering: pixelated; border: 1px solid #999 }
figcaption { font-size: 12px } figure { margin: 0 }
#at { position: fixed; padding: .2em .5em; background: #222; color: #fff; display: none }
</style>
<h1>[[title]]</h1>
<p>Down: [[row_axis]]. Across: [[column_axis]]. Each panel has a scale of its own.</p>
<main></main><div id="at"></div>
<script id="data" type="application/json">[[data]]</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const at = document.getElementById("at");
const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function colour(t) {
  const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), 3);
  return stops[i].map((c, n) => Math.round(c + (x - i) * (stops[i + 1][n] - c)));
}
data.panels.forEach((name, p) => {
  const rows = data.values[p], figure = document.createElement("figure");
  const canvas = document.createElement("canvas"), label = document.createElement("figcaption");
  canvas.width = data.columns.length; canvas.height = data.rows.length;
  const known = rows.flat().filter(v => v !== null);
  const low = Math.min(...known), high = Math.max(...known);
  label.textContent = name + ": " + low + " to " + high;
  const pen = canvas.getContext("2d"), image = pen.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((v, i) => {
    const c = v === null ? [255, 0, 0] : colour(high > low ? (v - low) / (high - low) : 0);
    image.data.set([...c, 255], 4 * i);
  });
  pen.putImageData(image, 0, 0);
  canvas.onmousemove = e => {
    const r = Math.floor(e.offsetY / canvas.clientHeight * data.rows.length);
    const c = Math.floor(e.offsetX / canvas.clientWidth * data.columns.length);
    if (!(rows[r] && c in rows[r])) return;
    at.textContent = data.rows[r] + " / " + data.columns[c] + ": " + (rows[r][c] ?? "not finite");
    at.style.cssText = `display:block;left:${e.clientX + 14}px;top:${e.clientY + 14}px`;
  };
  canvas.onmouseleave = () => { at.style.display = "none"; };
  figure.append(canvas, label);
  document.querySelector("main").append(figure);
});
</script>
"""
