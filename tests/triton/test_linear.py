"""The additive recurrence in Triton, within the bounds of the float64 truth, every gradient too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge.backends.triton import linear
from attnforge.testing.compare import compare, same_bits
from attnforge.testing.linear import LinearCase, linear_inputs
from attnforge.testing.oracle import unit_roundoff
from attnforge.triton_kernels.linear import config

GATES = ("none", "head", "scalar", "key", "value")
BF16, FP16 = torch.bfloat16, torch.float16
SMALL: dict[str, Any] = {"heads": 1, "value_heads": 1, "key_dim": 16, "value_dim": 16}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several column tiles, and chunks that short sequences have several of.

    Self-tests run the sizes that ship.
    """
    monkeypatch.setattr(config, "CHUNK", 8)
    monkeypatch.setattr(config, "SUB", 4)
    tile = {"BLOCK_C": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(config, "choose", lambda *_: dict(tile))
    monkeypatch.setattr(config, "STEP_COLUMNS", 16)


def check(case: LinearCase, **changes: Any) -> None:
    inputs = linear_inputs(case, **changes)
    rounding = unit_roundoff(case.dtype) if case.dtype.itemsize == 2 else 0.0  # of states
    compare(inputs.run("triton"), inputs.truth(rounding), str(case)).check()


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate: str) -> None:
    # a head of q for two of v, two tiles of value columns, dims that fill none, a chunk and a tail
    time = 6 if gate in ("key", "value") else 20
    check(LinearCase(time=time, heads=1, value_heads=2, key_dim=13, value_dim=20, gate=gate))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("gate", ["scalar", "key", "value"])
def test_sixteen_bits(gate: str, dtype: torch.dtype) -> None:
    check(LinearCase(time=17 if gate == "scalar" else 5, gate=gate, dtype=dtype, **SMALL))


@pytest.mark.parametrize("gate", ["head", "scalar", "key"])
def test_denominator(gate: str) -> None:
    norm = "abs" if gate == "head" else "sum"
    check(LinearCase(**{**SMALL, "value_dim": 20}, time=9, gate=gate, normalize=norm, scale=0.7))


def test_denominator_of_16_bit_rows() -> None:
    check(LinearCase(**SMALL, time=17, gate="scalar", normalize="sum", dtype=BF16))


@pytest.mark.parametrize("normalize", [False, "sum"])
def test_bidirectional(normalize: bool | str) -> None:
    check(LinearCase(time=17, causal=False, cu_seqlens=(0, 0, 1, 14), normalize=normalize, **SMALL))


@pytest.mark.parametrize("gate", ["scalar", "key", "value"])
def test_packed_sequences(gate: str) -> None:
    # empty ones in front, between and behind, one token, and rows that none of them has
    ends = (0, 0, 1, 1, 7, 7)
    check(LinearCase(time=9, gate=gate, cu_seqlens=ends, **SMALL))


@pytest.mark.parametrize("gate", ["none", "value"])
@pytest.mark.parametrize("time", [0, 1])
def test_lengths(gate: str, time: int) -> None:
    check(LinearCase(time=time, gate=gate, states=time == 0, **SMALL))


@pytest.mark.parametrize(
    ("gate", "strength"), [("scalar", 1e-5), ("scalar", 60.0), ("scalar", 1e4), ("key", 1e4)]
)
def test_weak_and_strong_gates(gate: str, strength: float) -> None:
    check(LinearCase(time=36 if gate == "scalar" else 9, gate=gate, strength=strength, **SMALL))


@pytest.mark.parametrize("gate", ["scalar", "key", "value"])
def test_resets(gate: str) -> None:
    # -inf, and so far below that the decay is 0; the truth takes -1e4 for -inf
    case = LinearCase(time=18 if gate == "scalar" else 10, gate=gate, strength=0.5, **SMALL)
    log = linear_inputs(case).leaves.gate
    assert log is not None
    log[:, [0, 5, 8]] = -float("inf")
    log[:, 6] = -1e3
    check(case, gate=log)


def test_packed_sequences_have_the_bits_of_single_ones() -> None:
    case = LinearCase(time=20, gate="scalar", cu_seqlens=(0, 13, 20), states=False, **SMALL)
    inputs = linear_inputs(case)
    whole = inputs.run("triton")["out"]
    x = inputs.leaves
    assert x.gate is not None
    for lo, hi in ((0, 13), (13, 20)):
        q, k, v, g = (t[:, lo:hi] for t in (x.q, x.k, x.v, x.gate))
        alone, _ = attnforge.simple_gla(q, k, v, g, backend="triton")
        assert same_bits(alone, whole[:, lo:hi])


@pytest.mark.parametrize(
    ("gate", "normalize"),
    [("none", "sum"), ("head", False), ("scalar", False), ("key", "abs"), ("value", False)],
)
def test_steps_are_the_recurrence(gate: str, normalize: bool | str) -> None:
    case = LinearCase(batch=3, time=2, heads=1, value_dim=20, gate=gate, normalize=normalize)
    inputs = linear_inputs(case)
    x = inputs.leaves
    assert x.state is not None
    whole, last = inputs.call(x, backend="reference")
    slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    live, own = [0, 2], [4, 1]
    pool = torch.full((6, *x.state.shape[1:]), 7.0)
    zs = torch.full(pool.shape[:3], 7.0)
    pool[own], zs[own] = x.state[live], x.state[live, ..., 0] if x.z is None else x.z[live]
    name = {"head": "decay", "scalar": "g", "key": "gk", "value": "gv"}.get(gate, "")
    q, k, v = (t.clone() for t in x[:3])
    q[1], v[1] = torch.nan, torch.nan  # of a skipped row
    for t in range(case.time):
        now = {} if x.gate is None else {name: x.gate if gate == "head" else x.gate[:, t]}
        out = attnforge.linear_step(
            q[:, t], k[:, t], v[:, t], (pool, zs) if normalize else pool,
            state_indices=slots, normalize=normalize, backend="triton", **now,
        )  # fmt: skip
        torch.testing.assert_close(out[live], whole[live, t], rtol=2e-5, atol=2e-5)
        assert same_bits(out[1], torch.zeros_like(out[1]))
    state, z = last if normalize else (last, None)
    torch.testing.assert_close(pool[own], state[live], rtol=2e-5, atol=2e-5)
    assert bool((pool[[0, 2, 3, 5]] == 7.0).all())
    if z is not None:
        torch.testing.assert_close(zs[own], z[live], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", ["numbers", "channels"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_shipped_tiles_fit(monkeypatch: pytest.MonkeyPatch, kernel: str, arch: str) -> None:
    monkeypatch.undo()
    for width in (16, 64, 128, 256):
        for itemsize in (2, 4):
            shape = config.Shape(arch, itemsize, width)
            assert config.fits(kernel, config.choose(kernel, shape), shape), shape


def test_wide_heads_are_refused() -> None:
    x = torch.zeros(1, 4, 1, 264)
    with pytest.raises(ValueError, match="head_dim 264 is not served"):
        attnforge.linear_attention(x, x, x, backend="triton")
    assert {spec.id for spec in linear.SPECS} >= {"triton.linear.chunk_fwd"}
