"""CUDA kernels of the linear family under the emulator, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge.backends.cuda import flash, linear
from attnforge.registry import Request
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.linear import LinearCase, linear_inputs

pytestmark = pytest.mark.usefixtures("twin")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
NAMES = ["fp32", "bf16", "fp16"]
GATES = ("none", "head", "scalar", "key", "value")
GATE_NAMES = {"none": "g", "head": "decay", "scalar": "g", "key": "gk", "value": "gv"}  # of a step
# Operands of 16-bit calls are rounded to tf32, 2^-11 each; a result has two of them in a row.
ROUNDING = {FP32: 0.0, BF16: 2.0**-10, FP16: 2.0**-10}


def check(case: LinearCase, **changes: Any) -> None:
    inputs = linear_inputs(case, **changes)
    truth = inputs.truth(ROUNDING[case.dtype])
    compare(inputs.run("emulated"), truth, str(case)).check()


def one_head(**options: Any) -> LinearCase:
    return LinearCase(**{"heads": 1, "value_heads": 1, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("gate", ["scalar", "key", "value"])
def test_every_kernel(gate: str, dtype: torch.dtype) -> None:
    # the backward has a walk of either width; two tiles of columns; whole chunks and a tail
    check(one_head(time=37, key_dim=64, value_dim=128, gate=gate, dtype=dtype))
    if dtype is BF16:
        check(one_head(time=16, key_dim=128, value_dim=64, gate=gate, dtype=dtype))


@pytest.mark.parametrize("gate", ["none", "head"])
def test_uniform_gates(gate: str) -> None:
    check(one_head(time=66, key_dim=64, value_dim=64, gate=gate))
    check(one_head(time=33, key_dim=64, value_dim=64, gate=gate, dtype=BF16, states=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences_and_groups(gate: str, dtype: torch.dtype) -> None:
    # empty ones in front, between and behind, one token, and rows that none of them has
    check(LinearCase(time=44, heads=1, value_heads=2, gate=gate, key_dim=16, value_dim=24,
                     cu_seqlens=(0, 0, 1, 1, 34, 40, 40), dtype=dtype))  # fmt: skip


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("strength", [1e-5, 8.0, 1e4])
def test_weak_and_strong_gates(gate: str, strength: float) -> None:
    check(one_head(time=34, gate=gate, strength=strength))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES[:2])
@pytest.mark.parametrize("gate", ["scalar", "key", "value"])
def test_resets(gate: str, dtype: torch.dtype) -> None:
    # -inf, and so far below that the decay is 0; the truth takes -1e4 for -inf
    case = one_head(time=36, gate=gate, strength=0.5, dtype=dtype)
    log = linear_inputs(case).leaves.gate
    assert log is not None
    log[:, [0, 7, 8, 33]] = -float("inf")
    log[:, 13] = -1e3
    check(case, gate=log)


def test_a_decay_behind_a_strong_gate_keeps_its_digits() -> None:
    # sums of gates in one fp32 number would be off by 1e-4 here
    case = one_head(time=32, gate="scalar", strength=0.1)
    log = linear_inputs(case).leaves.gate
    assert log is not None
    log[:, 3:20] = -100.0
    check(case, gate=log)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", [0, 1])
def test_short_sequences(gate: str, time: int) -> None:
    check(one_head(time=time, gate=gate, batch=2, scale=-0.3))


def test_large_fp16_values() -> None:
    # the state is past 65504, and so are products of a chunk
    case = one_head(time=40, key_dim=64, value_dim=64, gate="scalar", strength=0.01, dtype=FP16,
                    scale=1e-6)  # fmt: skip
    leaves = linear_inputs(case).leaves
    large = {n: 100 * getattr(leaves, n).abs() for n in "qkv"}
    inputs = linear_inputs(case, **large)
    assert float(inputs.truth().values["state"].abs().max()) > 65504
    check(case, **large)


@settings(max_examples=8)
@given(
    st.sampled_from(GATES), st.integers(0, 50), st.integers(1, 2), st.integers(1, 3),
    st.integers(1, 16), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 3),
)  # fmt: skip
def test_shapes(
    gate: str, time: int, heads: int, group: int, k: int, v: int, dtype: torch.dtype, seed: int
) -> None:
    case = LinearCase(
        time=time, heads=heads, value_heads=heads * group, key_dim=8 * k, value_dim=8 * v,
        gate=gate, dtype=dtype,
    )  # fmt: skip
    inputs = linear_inputs(case, seed)
    truth = inputs.truth(ROUNDING[dtype])
    compare(inputs.run("emulated"), truth, str(case)).check()


@pytest.mark.parametrize("gate", GATES)
def test_what_is_not_of_a_sequence_is_not_read(gate: str) -> None:
    case = one_head(time=40, gate=gate, dtype=BF16, cu_seqlens=(0, 9, 30), key_dim=16)
    inputs = linear_inputs(case)
    want = inputs.run("emulated")
    for x in inputs.leaves[:4]:
        if x is not None and x.dim() > 1:
            x[:, 30:] = torch.nan
    inputs.dout[:, 30:] = torch.nan
    got = inputs.run("emulated")
    for x in (*want.values(), *got.values()):
        x.nan_to_num_(7.0)
    assert_same(got, want)


@pytest.mark.parametrize("gate", ["scalar", "key"])
def test_segments_and_neighbours(gate: str) -> None:
    # a packed sequence has the bits of a call of its own; two segments are one pass
    case = one_head(time=48, gate=gate, cu_seqlens=(0, 16, 48), states=False)
    leaves = linear_inputs(case).leaves
    q, k, v, g = leaves[:4]
    assert g is not None
    run: Any = attnforge.simple_gla if gate == "scalar" else attnforge.gla
    ends = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    options: dict[str, Any] = {"output_final_state": True, "backend": "emulated"}
    packed, states = run(q, k, v, g, cu_seqlens=ends, **options)
    alone, state = run(*(x[:, 16:] for x in (q, k, v, g)), **options)
    assert same_bits(packed[:, 16:].contiguous(), alone)
    assert same_bits(states[1:], state)
    whole, last = run(q, k, v, g, **options)
    first, middle = run(*(x[:, :21] for x in (q, k, v, g)), **options)
    second, end = run(*(x[:, 21:] for x in (q, k, v, g)), initial_state=middle, **options)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end, last, atol=1e-5, rtol=1e-5)


def test_layouts() -> None:
    # strided, broadcast and unaligned operands
    case = one_head(time=19, gate="key", dtype=BF16, key_dim=16)
    want = linear_inputs(case).run("emulated")
    leaves = linear_inputs(case).leaves
    strided = leaves.q.transpose(1, 2).contiguous().transpose(1, 2)
    shifted = torch.empty(leaves.k.numel() + 1, dtype=BF16)[1:].view(leaves.k.shape)
    shifted.copy_(leaves.k)
    inputs = linear_inputs(case)
    inputs.leaves = inputs.leaves._replace(q=strided, k=shifted)
    call = inputs.call(inputs.leaves, backend="emulated")
    assert same_bits(call[0], want["out"])
    assert same_bits(call[1], want["state"])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("gate", GATES)
def test_step(gate: str, dtype: torch.dtype) -> None:
    case = LinearCase(batch=3, time=1, heads=1, value_heads=2, key_dim=70, value_dim=66, gate=gate,
                      dtype=dtype, states=False)  # fmt: skip
    q, k, v, log = linear_inputs(case).leaves[:4]
    g = torch.Generator().manual_seed(3)
    pool = torch.randn((4, 2, 70, 66), generator=g)
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    found = {}
    for backend in ("emulated", "reference"):
        own = pool.clone()
        wide = [x[:, 0].float() if backend == "reference" else x[:, 0] for x in (q, k, v)]
        now = log if log is None or gate == "head" else log[:, 0]
        given: dict[str, Any] = {GATE_NAMES[gate]: now}
        out = attnforge.linear_step(
            wide[0], wide[1], wide[2], own, state_indices=slots, backend=backend, **given
        )
        found[backend] = (out.float(), own)
    tolerance = 1e-5 if dtype is FP32 else 1e-2
    torch.testing.assert_close(found["emulated"][0], found["reference"][0], atol=tolerance,
                               rtol=tolerance)  # fmt: skip
    torch.testing.assert_close(found["emulated"][1], found["reference"][1], atol=1e-5, rtol=1e-5)
    assert not found["emulated"][0][1].any()
    assert same_bits(found["emulated"][1][[1, 3]], pool[[1, 3]])


@pytest.mark.parametrize(
    ("dims", "features", "why"),
    [
        ((192, 64), (), "head_dim 192 is not served"),
        ((64, 100), (), "v_head_dim 100 is not served"),
        ((64, 64), ("normalize",), "does not have normalize"),
        ((64, 64), ("bidirectional",), "does not have bidirectional"),
    ],
)
def test_what_goes_elsewhere(dims: tuple[int, int], features: tuple[str, ...], why: str) -> None:
    sizes = (("head_dim", dims[0]), ("v_head_dim", dims[1]), ("group", 1))
    request = Request("linear_chunk_fwd", "cuda", "sm_80", BF16, sizes, frozenset(features))
    reasons = [need(request) for need in linear.SPECS[0].requires[:-2]]
    assert any(reason is not None and why in reason for reason in reasons)


def test_a_gate_gradient_beside_a_final_state_wants_that_state() -> None:
    case = one_head(time=8, gate="scalar")
    q, k, v, log, state, _ = linear_inputs(case).leaves
    assert log is not None
    assert state is not None
    none = torch.empty(0)
    made = [torch.empty_like(x) for x in (q, k, v, log, state)]
    with pytest.raises(RuntimeError, match="wants the final state beside its gradient"):
        flash._operator("linear_chunk_bwd")(
            v, state, q, k, v, v, none, log, state, None, *made, torch.empty(99_999), 2, 1.0, 0
        )
