"""Bitwise promises: repeats, thread counts, batch composition, deterministic mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import assert_same

SHAPES: dict[str, dict[str, Any]] = {
    "square": {"batch": 2, "seqlen_q": 150, "seqlen_k": 150, "causal": True},
    "one_head": {"batch": 1, "seqlen_q": 333, "seqlen_k": 500, "heads_q": 1, "heads_k": 1},
    "few_rows": {"batch": 1, "seqlen_q": 2, "seqlen_k": 5000, "heads_q": 4, "heads_k": 1},
    "mqa": {"batch": 1, "seqlen_q": 90, "seqlen_k": 200, "heads_q": 7, "heads_k": 1},
    "varlen": {"lengths": ((3, 9), (140, 133), (1, 700), (0, 2)), "causal": True},
    "window": {"batch": 1, "seqlen_q": 300, "seqlen_k": 300, "window": (31, 0)},
}
FEATURES = {"alibi": "head", "sinks": "normal", "softcap": 20.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_thread_count(level: Target, name: str, dtype: torch.dtype) -> None:
    # check 73
    inputs = FlashCase(
        dtype=dtype, **{"heads_q": 4, "heads_k": 2, **FEATURES, **SHAPES[name]}
    ).make()
    torch.set_num_threads(1)
    want = inputs.run(level.backend)
    for threads in (2, 3, 7, 16):
        torch.set_num_threads(threads)
        assert_same(inputs.run(level.backend), want, f"{threads} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decode_thread_count(level: Target, dtype: torch.dtype) -> None:
    # check 73
    inputs = FlashCase(batch=2, seqlen_q=1, seqlen_k=7000, heads_q=8, heads_k=2, dtype=dtype,
                       decode=True, causal=True, used=(7000, 2100)).make()  # fmt: skip
    for splits in (0, 1, 5):
        torch.set_num_threads(1)
        want = inputs.forward(level.backend, num_splits=splits)
        for threads in (2, 3, 7, 16):
            torch.set_num_threads(threads)
            got = inputs.forward(level.backend, num_splits=splits)
            assert_same(got, want, f"{threads} threads, {splits} splits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("rows", "keys"), [(1, 600), (3, 70), (130, 130), (50, 200)])
def test_batch_composition(target: Target, rows: int, keys: int, dtype: torch.dtype) -> None:
    # check 74: b = 1 against inside b = 8, and in another order
    inputs = FlashCase(batch=8, seqlen_q=rows, seqlen_k=keys, heads_q=4, heads_k=2, dtype=dtype,
                       causal=True, alibi="batch").make()  # fmt: skip
    whole = inputs.run(target.backend)
    assert inputs.dlse is not None
    for b in (0, 3, 7):
        one = inputs.with_(
            **{n: getattr(inputs, n)[b : b + 1] for n in ("q", "k", "v", "dout", "dlse")},
            alibi_slopes=inputs.options["alibi_slopes"][b : b + 1],
        )
        assert_same(
            one.run(target.backend),
            {n: x[b : b + 1] for n, x in whole.items()},
            str(b),
            exact=target.exact,
        )
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    mixed = inputs.with_(
        **{n: getattr(inputs, n)[order] for n in ("q", "k", "v", "dout", "dlse")},
        alibi_slopes=inputs.options["alibi_slopes"][order],
    )
    assert_same(
        mixed.run(target.backend), {n: x[order] for n, x in whole.items()}, exact=target.exact
    )


def test_heads_do_not_mix(target: Target) -> None:
    # a KV head alone gives the bits that it gives among others
    inputs = FlashCase(seqlen_q=70, seqlen_k=90, heads_q=6, heads_k=3, causal=True).make()
    whole = inputs.run(target.backend)
    assert inputs.dlse is not None
    one = inputs.with_(q=inputs.q[:, :, 2:4], k=inputs.k[:, :, 1:2], v=inputs.v[:, :, 1:2],
                       dout=inputs.dout[:, :, 2:4], dlse=inputs.dlse[:, 2:4])  # fmt: skip
    want = {n: whole[n][:, :, 2:4] for n in ("out", "dq")}
    want |= {n: whole[n][:, :, 1:2] for n in ("dk", "dv")} | {"lse": whole["lse"][:, 2:4]}
    assert_same(one.run(target.backend), want, exact=target.exact)


@pytest.mark.parametrize("name", SHAPES)
def test_repeats(cpu: str, name: str) -> None:
    # check 72: with more threads than cores, so that the order of work changes
    inputs = FlashCase(**{"heads_q": 4, "heads_k": 2, **FEATURES, **SHAPES[name]}).make()
    torch.set_num_threads(4)
    want = inputs.run(cpu)
    for _ in range(60):
        assert_same(inputs.run(cpu), want)


def test_repeats_of_a_large_batch(cpu: str) -> None:
    # check 72: 250 repeats, batch 60
    inputs = FlashCase(batch=60, seqlen_q=20, seqlen_k=20, head_dim=8, causal=True).make()
    torch.set_num_threads(4)
    want = inputs.run(cpu)
    for _ in range(250):
        assert_same(inputs.run(cpu), want)


@pytest.mark.plain_memory
def test_deterministic_mode_changes_nothing(target: Target) -> None:
    # check 75: every kernel is deterministic, so the flag is honoured by doing the same
    inputs = FlashCase(seqlen_q=90, seqlen_k=130, heads_q=4, heads_k=2, sinks="normal").make()
    want = inputs.run(target.backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(inputs.run(target.backend), want, exact=target.exact)
    finally:
        torch.use_deterministic_algorithms(False)


def test_levels_agree(cpu: str) -> None:
    # two levels differ by rounding alone: both stay in the bound, checked in test_flash_bounds
    from attnforge import _native
    from attnforge.testing.cases import use_isa

    inputs = FlashCase(seqlen_q=70, seqlen_k=90, causal=True).make()
    results = []
    for name in _native.isa_levels():
        with use_isa(name) as level:
            assert level == name
            results.append(inputs.run(cpu))
    for other in results[1:]:
        for key in other:
            torch.testing.assert_close(other[key], results[0][key], rtol=1e-4, atol=1e-5)
