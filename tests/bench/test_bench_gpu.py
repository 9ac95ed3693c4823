"""The GPU side of the benchmark, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from attnforge.cli.app import build
from attnforge.testing import bench, bench_flash, roofline


@pytest.mark.parametrize("sweep", [False, True])
def test_cases_are_of_the_gpu_and_distinct(sweep: bool) -> None:
    cases = bench.family_cases("flash", sweep=sweep, device="cuda")
    assert cases
    assert all(case.device == "cuda" for case in cases)
    assert all(set(case.peers) <= set(bench_flash.PEERS) for case in cases)
    assert len({(case.series, case.name) for case in cases}) == len(cases)
    # 16,384 tokens, 2048 channels, full: 4 S^2 hidden per sequence.
    full = {case.name: case.work for case in cases}.get("forward-full-bf16-s16384-d128")
    assert full in (None, 4.0 * 16384**2 * 2048)


class _Event:
    """A CUDA event on a clock that a test turns by hand."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = _Event.now_ms

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    return waits


def test_gpu_time_is_read_from_events(clock: list[str]) -> None:
    def run() -> None:
        _Event.now_ms += 2.0

    assert roofline.seconds_per_call(run, 5, "cuda") == pytest.approx(2e-3)
    assert clock == ["wait", "wait"]  # before the first event, and before the times are read


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_said() -> None:
    result = CliRunner().invoke(build(), ["bench", "flash", "--device", "cuda"])
    assert result.exit_code == 2
    assert "no CUDA device" in result.output
