"""The fixture that starts the ranks of a test as processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(script: str, folder: Path, world: int) -> None:
    """Run ``script RANK WORLD STORE`` once per rank; each has to say that it is fine."""
    path = Path(__file__).with_name(script)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(world), str(folder / "store")],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, text in zip(ranks, said, strict=True):
        assert rank.returncode == 0, text
        assert text.strip().endswith("fine")


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[[str], None]:
    """``run_ranks("script.py")`` runs it on 4 ranks."""
    return lambda script: _run(script, tmp_path, 4)
