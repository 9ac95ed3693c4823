"""CUDA kernels of the delta rules and of the diagonal scan under the emulator, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.delta import GROWTH, DeltaCase, ScanInputs

pytestmark = pytest.mark.usefixtures("twin")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
NAMES = ["fp32", "bf16", "fp16"]

FINE = ("final_state", "dbeta", "dinitial_state")

# Three tf32 products are good to 2^-22, which equal keys take for a beta that is off by as much at
# every token. Operands of what leaves in out are rounded to tf32 in 16-bit calls, 2^-11 twice.
GROWTHS = {FP32: 4 * GROWTH, BF16: 4 * GROWTH + 2.0**14, FP16: 4 * GROWTH + 2.0**14}


def check(loose: float = 1.0, **options: Any) -> None:
    case = DeltaCase(**options)
    inputs = case.make()
    truth, fine = (inputs.truth(growth=n) for n in (loose * GROWTHS[case.dtype], 4 * GROWTH))
    for name in FINE:  # fp32 for every dtype
        if name in truth.bounds:
            truth.bounds[name] = fine.bounds[name]
    compare(inputs.run("emulated"), truth, str(case)).check()


GATES = ["none", "scalar", "key"]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("key_dim", [64, 128])
@pytest.mark.parametrize("gate", GATES[1:])
def test_every_kernel(gate: str, key_dim: int, dtype: torch.dtype) -> None:
    check(time=40, key_dim=key_dim, value_dim=192 - key_dim, gate=gate, dtype=dtype)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", [0, 1, 15, 16, 17, 31, 32, 33, 64])
def test_lengths(time: int, gate: str) -> None:
    check(time=time, gate=gate)


@pytest.mark.parametrize(("gate", "dtype"), [("none", FP32), ("none", BF16), ("key", BF16)])
@pytest.mark.parametrize("keys", ["same", "near"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.99])
def test_keys_that_repeat(keys: str, beta: float, gate: str, dtype: torch.dtype) -> None:
    # With a beta of nearly 2 what is written alternates in sign: operands outgrow their sums.
    check(3.0 if beta > 1 and dtype is BF16 else 1.0, time=40, gate=gate, strength=1e-3, keys=keys,
          beta=(beta, beta), dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences_and_groups(gate: str, dtype: torch.dtype) -> None:
    check(time=50, group=2, lengths=(0, 1, 33, 0, 9), value_dim=72, gate=gate, dtype=dtype)


def test_several_heads_and_batches() -> None:
    check(time=20, batch=2, heads=2, group=2, key_dim=72, gate="key", dtype=BF16)


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("strength", [1e-5, 20.0, 1e4])
def test_weak_and_strong_gates(strength: float, gate: str) -> None:
    check(time=40, strength=strength, gate=gate, state=strength < 1)


@pytest.mark.parametrize("gate", GATES[1:])
def test_resets(gate: str) -> None:
    inputs = DeltaCase(time=40, gate=gate).make()
    assert inputs.g is not None
    inputs.g[:, [0, 9, 10, 33]] = -torch.inf
    truth = replace(inputs, g=inputs.g.clamp_min(-1e4)).truth(growth=GROWTHS[FP32])
    compare(inputs.run("emulated"), truth, f"resets {gate}").check()


def test_beta_of_zero() -> None:
    """What is not written has a gradient of beta all the same."""
    check(time=33, beta=(0.0, 0.0))


@settings(max_examples=8)
@given(
    st.integers(0, 70), st.integers(1, 2), st.integers(1, 2), st.integers(1, 16),
    st.integers(1, 9), st.sampled_from(GATES), st.sampled_from(DTYPES),
    st.integers(0, 3),
)  # fmt: skip
def test_shapes(
    time: int, heads: int, group: int, k: int, v: int, gate: str, dtype: torch.dtype, seed: int
) -> None:
    check(time=time, heads=heads, group=group, key_dim=8 * k, value_dim=8 * v, gate=gate,
          dtype=dtype, seed=seed)  # fmt: skip


@pytest.mark.parametrize("gate", GATES[1:])
def test_what_is_not_of_a_sequence_is_not_read(gate: str) -> None:
    inputs = DeltaCase(time=40, lengths=(9, 21), gate=gate).make()
    want = inputs.run("emulated")
    for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.dout):
        assert x is not None
        x[:, 30:] = torch.nan
    found = inputs.run("emulated")
    assert_same(found, want)
    for name, x in found.items():
        if not name.endswith("state"):
            assert not x[:, 30:].any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("gate", GATES)
def test_step(gate: str, dtype: torch.dtype) -> None:
    inputs = DeltaCase(time=1, batch=3, group=2, key_dim=70, value_dim=66, gate=gate, dtype=dtype,
                       state=False).make()  # fmt: skip
    pool = torch.randn((4, 2, 70, 66), generator=torch.Generator().manual_seed(3))
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    g = None if inputs.g is None else inputs.g[:, 0]
    found = {}
    for backend in ("emulated", "reference"):
        own = pool.clone()
        rows = (x[:, 0] for x in (inputs.q, inputs.k, inputs.v))
        q, k, v = (x.float() if backend == "reference" else x for x in rows)
        out = attnforge.delta_step(
            q, k, v, own, inputs.beta[:, 0], g=g, state_indices=slots, backend=backend
        )
        found[backend] = (out.float(), own)
    (out, states), (want, want_states) = found["emulated"], found["reference"]
    tolerance = 1e-5 if dtype is FP32 else 1e-2
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(states, want_states, atol=1e-5, rtol=1e-5)
    assert not out[1].any()
    assert same_bits(states[[1, 3]], pool[[1, 3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_diagonal_scan(packed: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    ends = torch.tensor([0, 0, 9, 20], dtype=torch.int32) if packed else None
    batch, n = (1, 3) if packed else (2, 2)
    gate = -normal(batch, 23, 70).abs()
    gate[:, 5] = -torch.inf
    inputs = ScanInputs(
        normal(batch, 23, 70).to(dtype), gate, normal(n, 70), ends,
        normal(batch, 23, 70).to(dtype), normal(n, 70),
    )  # fmt: skip
    truth = replace(inputs, g=gate.clamp_min(-1e4)).truth()
    compare(inputs.run("emulated"), truth, f"scan {dtype} {packed}").check()


@pytest.mark.parametrize("time", [0, 1, 8, 9])
def test_short_scans(time: int) -> None:
    x = torch.ones(1, time, 3)
    out, state = attnforge.hgrn(x, 0 * x, output_final_state=True, backend="emulated")
    assert out[0, :, 0].tolist() == list(range(1, time + 1))
    assert state is not None
    assert state.tolist() == [[time] * 3]
