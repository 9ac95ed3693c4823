"""The benchmark harness: pairing, tables, JSON, plots, cases; on tiny or fake workloads."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnforge.testing import bench, bench_flash, machine
from attnforge.testing.bench import Case, ErrorStat, Goal, Workload
from attnforge.testing.bench_flash import Shape
from attnforge.testing.roofline import Peaks, Probe


def fake_peaks() -> Peaks:
    compute = Probe("compute", "fake", lambda: 100.0)
    read = Probe("read", "fake", lambda: 10.0)
    return Peaks(compute, read, [compute, read])


def sleeper(seconds: float) -> Workload:
    def broken() -> object:
        raise RuntimeError("no such kernel\nsecond line")

    return Workload(
        candidate=lambda: time.sleep(seconds),
        peers={"slow": lambda: time.sleep(4 * seconds), "broken": broken, "absent": "not here"},
        errors=lambda: {"attnforge": ErrorStat(1e-6), "slow": ErrorStat(2e-6)},
    )


@pytest.fixture(scope="module")
def results() -> list[bench.Result]:
    case = Case(
        name="fake-case", title="fake", family="flash", resource="compute", work=1e9,
        build=lambda backend: sleeper(0.01), goals={"slow": Goal(2, 3)}, peak_goal=0.5,
        series="fake series", x=1024, repeats=3,
    )  # fmt: skip
    seen: list[tuple[str, int, int]] = []
    out = bench.run_cases(
        [case, dataclasses.replace(case, name="second", x=2048)],
        lambda what, done, total: seen.append((what, done, total)),
        peaks=fake_peaks(),
        rest_s=0.0,
    )
    assert seen == [("fake", 0, 2), ("fake", 1, 2), ("done", 2, 2)]
    return out


def test_ratio_is_paired_and_failures_are_reported(results: list[bench.Result]) -> None:
    (slow,) = results[0].versus
    assert slow.peer == "slow"
    assert 2.5 < slow.ratio < 6
    assert slow.ratio_low <= slow.ratio <= slow.ratio_high
    assert results[0].unavailable == {
        "absent": "not here",
        "broken": "RuntimeError: no such kernel",
    }
    assert results[0].peak == pytest.approx(100.0)
    assert results[0].peak_fraction == pytest.approx(results[0].rate / 100.0, rel=0.2)
    assert len(results[0].timing.bursts_s) == 3
    assert results[0].timing.min_s <= results[0].timing.median_s


def test_table_and_json(results: list[bench.Result]) -> None:
    text = bench.render_table(results)
    assert "fake" in text
    assert "not run" in text
    assert "2x / 3x" in text
    assert len({line.index("peer") for line in text.splitlines() if " peer " in line}) == 1
    env = machine.environment()
    again, env_again, peaks = bench.from_json(bench.to_json(results, env, fake_peaks()))
    assert again == results
    assert env_again == env
    assert peaks["compute"]["unit"] == "GFLOP/s"
    with pytest.raises(ValueError, match="schema"):
        bench.from_json('{"schema": 99}')


def test_plots_are_deterministic(results: list[bench.Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from attnforge.testing import plots

    env, peaks = machine.environment(), fake_peaks().as_dict()
    first = plots.save_plots(results, tmp_path / "a", env, peaks)
    second = plots.save_plots(results, tmp_path / "b", env, peaks)
    assert [p.name for p in first] == ["flash.png", "flash-fake-series.png"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert plots.save_plots([], tmp_path / "c", env, peaks) == []


def test_environment_block() -> None:
    env = machine.environment(restricted="avx2")
    assert env["threads"] == torch.get_num_threads()
    assert env["restricted"] == "avx2"
    assert all(env[key] for key in ("device", "isa", "torch", "commit", "date"))


def test_cases_cover_the_speed_table() -> None:
    cases = bench.flash_cases(quick=True)
    names = [c.name for c in cases]
    assert len(set(names)) == len(names)
    assert {c.repeats for c in cases} == {bench.QUICK_REPEATS}
    assert {c.repeats for c in bench.flash_cases()} == {bench.REPEATS}
    assert bench.select_cases(cases, "decode") == [c for c in cases if c.resource == "read"]
    assert bench.select_cases(cases, "train-*-fp16-*")[0].goals["sdpa"].at_least == 12
    assert bench.select_cases(cases, None) == cases
    with pytest.raises(ValueError, match="nope"):
        bench.family_cases("nope")


def test_work_comes_from_the_cost_formula() -> None:
    s, d, h = 2048, 64, 8
    assert bench_flash.work(Shape("forward", torch.float32)) == 4 * d * s * s * h
    causal = bench_flash.work(Shape("forward", torch.float32, causal=True))
    assert causal == 4 * d * h * s * (s + 1) // 2
    assert bench_flash.work(Shape("train", torch.float32, causal=True)) == 3.5 * causal
    window = Shape("forward", torch.float32, causal=True, window=256)
    assert bench_flash.work(window) == 4 * d * h * (256 * s - 256 * 255 // 2)


def tiny_shapes() -> Iterator[Shape]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Shape("forward", dtype, q_len=96, kv_len=96, q_heads=4, kv_heads=2, causal=True)
        yield Shape("train", dtype, q_len=64, kv_len=64, q_heads=4, kv_heads=2, causal=True)
        yield Shape("decode", dtype, q_len=1, kv_len=100, q_heads=4, kv_heads=2, causal=True)
    yield Shape("forward", torch.float32, q_len=80, kv_len=80, q_heads=2, kv_heads=2)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("shape", list(tiny_shapes()), ids=lambda s: s.name)
def test_all_implementations_compute_the_same(shape: Shape, backend: str | None) -> None:
    peers = ("sdpa", "sdpa folded") if shape.mode == "decode" else ("sdpa",)
    workload = bench_flash.build(shape, peers, backend)
    assert workload.errors is not None
    errors = workload.errors()
    assert set(errors) == {"attnforge", *peers}
    limit = 2e-5 if shape.dtype == torch.float32 else 0.06
    for name, stat in errors.items():
        assert math.isfinite(stat.max_abs), name
        assert stat.max_abs < limit, name


def test_folded_peer_refuses_more_rows() -> None:
    shape = Shape("forward", torch.float32, q_len=8, kv_len=8)
    workload = bench_flash.build(shape, ("sdpa folded",), "reference")
    assert "one query row" in str(workload.peers["sdpa folded"])


def test_command_line_rejects_what_it_does_not_know() -> None:
    typer_testing = pytest.importorskip("typer.testing")
    from attnforge.cli.app import build

    run = typer_testing.CliRunner().invoke
    assert run(build(), ["bench", "nope"]).exit_code == 2
    assert run(build(), ["bench", "flash", "--isa", "mmx"]).exit_code == 2
    assert run(build(), ["bench", "flash", "--case", "no-such-case"]).exit_code == 2


@pytest.mark.slow
def test_restricted_run_limits_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    if "AVX2" not in torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX2"):
        pytest.skip("no AVX2 here")
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "attnforge", "bench", "flash", "--quick", "--isa", "avx2",
        "--case", "forward-causal-fp32-s2048-d64", "--json", str(out),
    ]  # fmt: skip
    source = str(Path(bench.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    results, block, _ = bench.from_json(out.read_text(encoding="utf-8"))
    assert [r.name for r in results] == ["forward-causal-fp32-s2048-d64"]
    assert block["torch_isa"] == "AVX2"
    assert block["isa"] in ("avx2", "no native library")
