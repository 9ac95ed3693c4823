"""The linear benchmark: all sides but SDPA compute the same thing."""

from __future__ import annotations

import pytest
import torch

from attnforge.testing import bench, bench_delta, bench_linear
from attnforge.testing.bench_linear import FUNCTIONS, Shape


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_sides_agree(cpu: str, function: str, backward: bool) -> None:
    workload = bench_linear.build(Shape(function, 192, backward, heads=2, dim=16), cpu)
    plain, sdpa = workload.peers["plain chunks"], workload.peers["sdpa"]
    assert callable(plain)
    assert callable(sdpa)
    sdpa()
    ours, theirs = workload.candidate(), plain()
    if not backward:
        ours, theirs = (ours,), (theirs,)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.transpose(1, 2), b.reshape(a.transpose(1, 2).shape),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
    if not backward:
        assert workload.errors()["attnforge"].max_abs < 1e-4


def test_step_sides_agree(cpu: str) -> None:
    workload = bench_linear.build_step(3, 2, 8, cpu)
    plain = workload.peers["plain torch"]
    assert callable(plain)
    for _ in range(3):
        torch.testing.assert_close(workload.candidate(), plain())


def test_cases() -> None:
    cases = bench.family_cases("linear", quick=True)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) == 2 * len(FUNCTIONS) + 3 + len(bench_delta.cases(1))
    assert cases[0].work == 4 * 64 * 64 * 8 * 8192
    assert len({case.series for case in bench.family_cases("linear", sweep=True)}) == 2


def test_a_length_and_its_parts_are_the_same_tokens(
    cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_linear, "_keep_freed_memory", lambda: None)  # of the test process
    case = bench_linear.length_case(64, 4, 1)
    workload = case.build(cpu)
    parts = workload.peers["its parts"]
    assert callable(parts)
    whole, pieces = workload.candidate(), parts()
    assert [piece.shape for piece in pieces] == [(1, 16, 8, 64)] * 4
    torch.testing.assert_close(whole[:, :16], pieces[0])  # the others begin with a state of zero
    assert case.work == 4 * 64 * 64 * 8 * 64


@pytest.mark.parametrize("gate", ["none", "scalar", "key"])
def test_delta_case_runs(cpu: str, gate: str) -> None:
    shape = bench_delta.Shape(gate, 70, backward=True, heads=2, dim=16)
    work = bench_delta.build(shape, cpu)
    assert shape.flops == 3.5 * 6 * 70 * 2 * 16 * 16
    assert len(work.candidate()) == len(work.peers["sdpa"]()) + (1 if gate == "none" else 2)
    bound = work.errors()["attnforge"].bound
    assert bound is not None
    assert bound < 1
