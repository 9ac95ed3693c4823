"""Pictures against the matrix that they never make."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import viz


def problem(sq: int = 50, sk: int = 70, heads: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, lse and the matrix P [B, H, Sq, Sk] in float64; causal, grouped heads."""
    torch.manual_seed(3)
    q, k = torch.randn(2, sq, heads, 16), torch.randn(2, sk, heads // 2, 16)
    _, lse = attnforge.flash_attention(q, k, k, causal=True, return_lse=True)
    wide = k.double().repeat_interleave(2, 2)
    s = torch.einsum("bihd,bjhd->bhij", q.double(), wide) / 4
    hidden = torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)
    return q, k, lse, s.masked_fill(hidden, -torch.inf).softmax(-1)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=2e-5)


def test_tiles_are_means_of_rows_of_the_mass_of_keys() -> None:
    q, k, lse, p = problem()
    picture = viz.tile_map(q, k, lse, rows=4, columns=7, batch=1, causal=True)
    want = torch.stack([x.mean(1) for x in p[1].split(13, 1)], 1)  # [H, 4, Sk]
    want = torch.stack([x.sum(-1) for x in want.split(10, -1)], -1)
    close(picture.values, want)
    close(picture.values.sum(-1), torch.ones(4, 4, dtype=torch.float64))
    assert picture.rows == ("0..12", "13..25", "26..38", "39..49")
    assert picture.columns[-1] == "60..69"
    assert picture.panels == ("head 0", "head 1", "head 2", "head 3")


def test_tiles_of_the_largest_probability() -> None:
    q, k, lse, p = problem()
    picture = viz.tile_map(q, k, lse, rows=4, columns=7, of="max", causal=True)
    want = torch.stack([x.amax(1) for x in p[0].split(13, 1)], 1)
    want = torch.stack([x.amax(-1) for x in want.split(10, -1)], -1)
    close(picture.values, want)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (1, 1), (49, 69)])
def test_more_tiles_than_tokens(rows: int, columns: int) -> None:
    q, k, lse, _ = problem()
    for of in ("mean", "max"):
        picture = viz.tile_map(q, k, lse, rows=rows, columns=columns, of=of, causal=True)
        assert picture.values.shape[1] <= rows
        assert picture.values.shape[2] <= columns


def test_spans_have_names_and_a_rest() -> None:
    q, k, lse, p = problem()
    picture = viz.span_map(q, k, lse, {"system": 5, "none": 0, "user": 30}, rows=1, causal=True)
    assert picture.columns == ("system", "none", "user", "rest")
    parts = p[0].mean(1).split([5, 0, 30, 35], -1)
    close(picture.values[:, 0], torch.stack([x.sum(-1) for x in parts], -1))
    whole = viz.span_map(q, k, lse, {"all": 70}, causal=True)
    assert whole.columns == ("all",)


def test_statistics_of_heads_by_layer() -> None:
    layers = [problem(), problem(40, 40)]
    picture = viz.head_map([x[:3] for x in layers], sink=3, causal=True)
    assert picture.values.shape == (4, 2, 4)
    for i, (_, _, _, p) in enumerate(layers):
        peak, at = p[0].max(-1)
        sq, sk = p.shape[2:]
        want = torch.stack([
            torch.special.entr(p[0]).sum(-1).mean(-1),
            p[0, ..., :3].sum(-1).mean(-1),
            peak.mean(-1),
            (torch.arange(sq) + sk - sq - at).double().mean(-1),
        ])  # fmt: skip
        close(picture.values[:, i], want)


def test_no_buffer_of_the_matrix() -> None:
    """The largest allocation stays far below S x S."""
    q, k = torch.randn(1, 2048, 1, 16), torch.randn(1, 2048, 1, 16)
    _, lse = attnforge.flash_attention(q, k, k, causal=True, return_lse=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        viz.tile_map(q, k, lse, rows=32, columns=32, causal=True)
        viz.head_map([(q, k, lse)], causal=True)
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert 0 < largest < 2048 * 2048  # bytes: a quarter of the matrix


def test_html_holds_the_numbers_and_escapes_names(tmp_path: Path) -> None:
    values = torch.tensor([[[0.25, float("nan")]]])
    names: Any = (("</script><b>",), ("row",), ("a", "b"))
    picture = viz.Picture(values, "<title>", "down", "across", *names)
    text = picture.html(tmp_path / "map.html").read_text()
    match = re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    data = json.loads(match[1])
    assert data["values"] == [[[0.25, None]]]
    assert data["panels"] == ["</script><b>"]
    assert "&lt;title&gt;" in text
    assert text.count("</script>") == 2
    assert "[[" not in text.replace("[[[", "").replace("[[68", "")
    assert not re.search(r"(src|href)=", text), "asks no server for anything"


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    q, k, lse, _ = problem()
    path = viz.tile_map(q, k, lse, causal=True).png(tmp_path / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_without_matplotlib_the_way_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    q, k, lse, _ = problem()
    picture = viz.tile_map(q, k, lse, causal=True)
    with pytest.raises(ImportError, match=r"attnforge\[viz\]"):
        picture.png(tmp_path / "map.png")


def test_errors_name_what_is_wanted() -> None:
    q, k, lse, _ = problem()
    with pytest.raises(ValueError, match="of='median'"):
        viz.tile_map(q, k, lse, of="median")
    with pytest.raises(ValueError, match="batch is 2"):
        viz.tile_map(q, k, lse, batch=2)
    with pytest.raises(ValueError, match="'user' of 80 keys"):
        viz.span_map(q, k, lse, {"user": 80})
    with pytest.raises(ValueError, match="no layers"):
        viz.head_map([])
    with pytest.raises(ValueError, match="names say"):
        viz.Picture(torch.zeros(1, 2, 3), "", "", "", ("a",), ("b",), ("c",))
