"""Tables and figure of trained examples come from the committed runs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from attnforge.testing import training


def test_tables(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "measurements" / "training"
    folder.mkdir(parents=True)
    runs = [
        {"layer": name, "parameters": 12345, "losses": [[0, 6.0], [20, 5.0], [40, last]]}
        for name, last in (("worse", 3.25), ("better", 2.5))
    ]
    (folder / "char_lm.json").write_text(json.dumps({"runs": runs}))
    lines = training.char_lm_table(tmp_path).splitlines()
    assert lines[0] == "| layer | parameters | step 0 | step 40 |"
    assert lines[2:] == ["| better | 12 k | 6.00 | 2.50 |", "| worse | 12 k | 6.00 | 3.25 |"]
    with pytest.raises(FileNotFoundError):
        training.smollm2_table(tmp_path)


@pytest.fixture
def sparse_runs(tmp_path: Path) -> Path:
    """A tree with the two files of sparse attention."""
    folder = tmp_path / "docs" / "measurements" / "training"
    folder.mkdir(parents=True)
    lines = [
        {"method": name, "top_k": top_k, "density": top_k / 16, "mass": 0.75, "perplexity": worse,
         "loss_change": 0.125, "standard_error": 0.0625}
        for top_k in (4, 8) for name, worse in (("mean", 12.0), ("Seer gate, seed 0", 11.0))
    ]  # fmt: skip
    (folder / "block_sparse.json").write_text(json.dumps({"perplexity": 10.0, "lines": lines}))
    found = [
        {"layer": name, "seed": 0, "parameters": 9400, "curve": [[0, 2.0, 0.125], [9, 0.5, 0.75]]}
        for name in ("dense", "nsa", "nsa-fine", "nsa-paper")
    ]
    (folder / "nsa_needle.json").write_text(json.dumps({"steps": 9, "runs": found}))
    return tmp_path


def test_tables_of_sparse_attention(sparse_runs: Path) -> None:
    lines = training.block_sparse_table(sparse_runs).splitlines()
    assert lines[2] == "| all | dense | 100% | 100% | 10.00 | |"
    assert lines[3] == "| 8 | Seer gate, seed 0 | 50.0% | 75.0% | 11.00 | +0.125 ± 0.062 |"
    assert [line.split(" | ")[1] for line in lines[4:]] == ["mean", "Seer gate, seed 0", "mean"]
    lines = training.needle_table(sparse_runs).splitlines()
    names = ("dense", "NSA, one projection, means", "the same, windows of 2", "NSA, paper")
    assert lines[2:] == [f"| {name} | 9 | 0 | 9 k | 0.500 | 75.0% |" for name in names]


def test_figures_of_sparse_attention(sparse_runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    root = Path(__file__).resolve().parents[2]
    draw = runpy.run_path(str(root / "docs" / "figures" / "draw_block_sparse.py"))
    draw["main"](sparse_runs, tmp_path)
    for name in ("block_sparse_quality", "nsa_needle"):
        text = (tmp_path / f"{name}.svg").read_text()
        assert "<svg" in text
        assert len(text) > 5000
