"""Delta rules and the diagonal scan in Triton against the float64 recurrence, every gradient."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge.testing.compare import compare
from attnforge.testing.delta import GROWTH, DeltaCase, ScanInputs
from attnforge.testing.oracle import unit_roundoff
from attnforge.triton_kernels.linear import config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several column tiles and short chunks; self-tests run the sizes that ship."""
    tile = {"BLOCK_C": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(config, "delta", lambda *_: dict(tile))
    monkeypatch.setattr(config, "SUB", 4)
    monkeypatch.setattr(config, "STEP_COLUMNS", 16)
    monkeypatch.setattr(config, "SCAN", {"BLOCK_T": 8, "BLOCK_D": 4, "num_warps": 4})


def check(case: DeltaCase, growth: float = GROWTH) -> None:
    """Beside 16-bit inputs products of states round to 16 bits."""
    rounded = unit_roundoff(case.dtype) / unit_roundoff(FP32) if case.dtype.itemsize == 2 else 0.0
    inputs = case.make()
    compare(inputs.run("triton"), inputs.truth(growth=growth + 8 * rounded), str(case)).check()


@pytest.mark.parametrize(
    "case",
    [
        DeltaCase(time=6, group=2, key_dim=13, gate="none"),
        DeltaCase(time=6, key_dim=13, value_dim=20, gate="scalar"),
        DeltaCase(time=6, key_dim=20, value_dim=8, gate="key"),
        DeltaCase(time=9, gate="scalar", dtype=BF16),
        DeltaCase(time=5, gate="key", dtype=FP16),
        # states of two segments of chunks are made again
        DeltaCase(time=35, key_dim=8, value_dim=8, gate="none"),
        # empty sequences in front, between and behind; one token; rows that no sequence has
        DeltaCase(time=9, lengths=(0, 5, 1, 0, 2, 0), gate="scalar", state=False),
        DeltaCase(time=8, lengths=(0, 6), gate="key", key_dim=8, value_dim=8),
        DeltaCase(time=0, gate="key"),
        # decays down to where factors are 0, and writes that reflect
        DeltaCase(time=9, gate="scalar", strength=1e4),
        DeltaCase(time=6, gate="key", strength=90.0, beta=(2.0, 2.0)),
    ],
    ids=str,
)
def test_against_float64(case: DeltaCase) -> None:
    check(case)


@pytest.mark.parametrize("keys", ["same", "near"])
def test_correlated_keys(keys: str) -> None:
    # inverses by powers explode here
    check(DeltaCase(time=16, keys=keys, beta=(1.99, 1.99), gate="none"), growth=1024.0)


@pytest.mark.parametrize("gate", ["scalar", "key"])
def test_hard_resets(gate: str) -> None:
    inputs = DeltaCase(time=7, gate=gate, key_dim=8, value_dim=8).make()
    assert inputs.g is not None
    at = torch.tensor([0, 3, 5])
    inputs.g[:, at] = -torch.inf
    found = inputs.run("triton")
    compare(found, inputs.truth(), gate).check()
    assert not bool(found["dg"][:, at].any())


@pytest.mark.parametrize("gate", ["none", "scalar", "key"])
def test_steps_are_the_sequence(gate: str) -> None:
    case = DeltaCase(time=2, batch=2, group=2, key_dim=20, value_dim=20, gate=gate)
    inputs = case.make()
    assert inputs.initial_state is not None
    slots = torch.tensor([2, 1], dtype=torch.int32)
    pool = torch.full((4, *inputs.initial_state.shape[1:]), 7.0)
    pool[slots.long()] = inputs.initial_state
    rows = []
    for t in range(case.time):
        q, k, v, beta = (x[:, t] for x in (inputs.q, inputs.k, inputs.v, inputs.beta))
        g = None if inputs.g is None else inputs.g[:, t]
        rows.append(
            attnforge.delta_step(q, k, v, pool, beta, g=g, state_indices=slots, backend="triton")
        )
    found = {"out": torch.stack(rows, 1), "final_state": pool[slots.long()]}
    compare(found, inputs.truth(grad=False), str(case)).check()
    assert bool((pool[[0, 3]] == 7.0).all())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [None, (0, 17, 1, 0)], ids=["batch", "packed"])
def test_scan(dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    time, dim = 20, 5
    n = 1 if lengths is None else len(lengths)
    g = -torch.rand(1, time, dim) * 3
    g[:, 9, ::3], g[:, 10] = -torch.inf, 0.0
    ends = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = ScanInputs(
        torch.randn(1, time, dim).to(dtype), g, torch.randn(n, dim), ends,
        torch.randn(1, time, dim).to(dtype), torch.randn(n, dim),
    )  # fmt: skip
    compare(inputs.run("triton"), inputs.truth(), "scan").check()
