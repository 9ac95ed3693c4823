"""The additive recurrence within the per-element bound of the float64 truth, every gradient too.

The derivation of the bounds stands in ``attnforge.testing.linear``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnforge.testing.cases import Target
from attnforge.testing.compare import compare
from attnforge.testing.linear import LinearCase, linear_inputs

pytestmark = pytest.mark.thinned(3)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]
GATES = ("none", "head", "scalar", "key", "value")


def check(target: Target, case: LinearCase, **changes: Any) -> None:
    inputs = linear_inputs(case, **changes)
    compare(inputs.run(target.backend), inputs.truth(), str(case)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("gate", GATES)
def test_gates(target: Target, gate: str, dtype: torch.dtype) -> None:
    check(target, LinearCase(batch=2, time=39, gate=gate, dtype=dtype))


@pytest.mark.parametrize("gate", GATES)
def test_grouped_value_heads_and_odd_sizes(level: Target, gate: str) -> None:
    check(level, LinearCase(time=34, heads=2, value_heads=6, key_dim=13, value_dim=37, gate=gate))
    check(level, LinearCase(time=5, heads=1, value_heads=1, key_dim=70, value_dim=9, gate=gate))


@pytest.mark.parametrize("normalize", ["sum", "abs"])
@pytest.mark.parametrize("gate", GATES[:4])
def test_denominator(target: Target, gate: str, normalize: str) -> None:
    check(target, LinearCase(time=21, value_heads=4, gate=gate, normalize=normalize, scale=0.7))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
def test_denominator_of_16_bit_rows(level: Target, dtype: torch.dtype) -> None:
    check(level, LinearCase(time=40, value_heads=4, gate="key", normalize=True, dtype=dtype))


@pytest.mark.parametrize("normalize", [False, "sum"])
def test_bidirectional(target: Target, normalize: bool | str) -> None:
    check(target, LinearCase(batch=2, time=37, value_heads=4, causal=False, normalize=normalize))
    check(target, LinearCase(time=37, causal=False, cu_seqlens=(0, 0, 9, 30), normalize=normalize))


@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences(level: Target, gate: str) -> None:
    # empty ones in front, between and behind, one token, and rows that none of them has
    case = LinearCase(time=50, gate=gate, cu_seqlens=(0, 0, 1, 1, 34, 45, 45))
    check(level, case)
    if gate != "value":
        check(level, LinearCase(**{**vars(case), "normalize": "sum"}))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", [0, 1, 3, 4, 5, 32, 33])
def test_lengths(level: Target, gate: str, time: int) -> None:
    check(level, LinearCase(time=time, gate=gate))


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("strength", [0.0, 1e-5, 8.0, 60.0, 1e4])
def test_weak_and_strong_gates(level: Target, gate: str, strength: float) -> None:
    check(level, LinearCase(time=36, gate=gate, strength=strength))


@pytest.mark.parametrize("gate", ["scalar", "key", "value"])
def test_resets(target: Target, gate: str) -> None:
    # -inf, and so far below that the decay is 0; the truth takes -1e4 for -inf
    case = LinearCase(time=22, gate=gate, strength=0.5)
    log = linear_inputs(case).leaves.gate
    assert log is not None
    log[:, [0, 7, 8, 19]] = -float("inf")
    log[:, 13] = -1e3
    check(target, case, gate=log)


def test_without_states(level: Target) -> None:
    for gate in GATES:
        check(level, LinearCase(time=19, gate=gate, states=False, scale=-0.3))


def test_two_head_tiles(level: Target) -> None:
    # more columns than a tile has, in few heads: tasks split them, sums over tiles meet again
    for gate in ("scalar", "key", "value"):
        check(level, LinearCase(time=35, heads=1, value_heads=1, key_dim=72, value_dim=100,
                                gate=gate))  # fmt: skip


@given(
    st.sampled_from(GATES), st.integers(0, 70), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 40), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_shapes(
    gate: str, time: int, heads: int, group: int, k: int, v: int, dtype: torch.dtype, norm: bool
) -> None:
    check(
        Target("cpu"),
        LinearCase(
            time=time, heads=heads, value_heads=heads * group, key_dim=k, value_dim=v, gate=gate,
            dtype=dtype, normalize=norm and gate != "value",
        ),
    )  # fmt: skip
