"""Split-KV decode: any number of splits, lengths, groups; poisoned caches; its gradient path."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import assert_same, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 8, 17, 128, 5000])
@pytest.mark.parametrize("rows", [1, 5])
def test_bounds(target: Target, num_splits: int, dtype: torch.dtype, rows: int) -> None:
    # checks 1, 3, 10; more splits than keys among them
    case = FlashCase(seqlen_q=rows, seqlen_k=150, heads_q=8, heads_k=2, head_dim=64, dtype=dtype,
                     decode=True, causal=True, used=(150, 71))  # fmt: skip
    inputs = case.make()
    got = inputs.forward(target.backend, num_splits=num_splits)
    compare(got, inputs.truth(grad=False), inputs.context).check()


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 4500])
def test_lengths_around_the_fixed_split(target: Target, length: int) -> None:
    inputs = FlashCase(batch=1, seqlen_q=1, seqlen_k=4500, heads_q=4, heads_k=1, head_dim=32,
                       decode=True, causal=True, used=(length,)).make()  # fmt: skip
    compare(inputs.forward(target.backend), inputs.truth(grad=False), inputs.context).check()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16, 24])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_groups(target: Target, group: int, rows: int) -> None:
    # dense_paged 5.2, 13 and 39
    inputs = FlashCase(seqlen_q=rows, seqlen_k=90, heads_q=2 * group, heads_k=2, head_dim=16,
                       decode=True, causal=True).make()  # fmt: skip
    compare(inputs.forward(target.backend), inputs.truth(grad=False), inputs.context).check()


@pytest.mark.parametrize("options", [
    {"softcap": 10.0, "spread": 4.0}, {"alibi": "batch"}, {"sinks": "mixed"},
    {"window": (30, 0)}, {"window": (0, 0)}, {"window": (5, 3), "causal": False},
    {"causal": False}, {"head_dim": 576, "v_head_dim": 512}, {"head_dim": 8, "v_head_dim": 256},
    {"softcap": 9.0, "alibi": "head", "sinks": "normal", "window": (50, 0)},
], ids=lambda o: "_".join(o))  # fmt: skip
@pytest.mark.parametrize("num_splits", [0, 7])
def test_features(target: Target, options: dict[str, object], num_splits: int) -> None:
    base: dict[str, object] = {"seqlen_q": 3, "seqlen_k": 130, "heads_q": 6, "heads_k": 2,
                               "decode": True, "causal": True, "used": (130, 2)}  # fmt: skip
    inputs = FlashCase(**{**base, **options}).make()  # type: ignore[arg-type]
    got = inputs.forward(target.backend, num_splits=num_splits)
    compare(got, inputs.truth(grad=False), inputs.context).check()


def test_more_rows_than_keys(target: Target) -> None:
    # check 20: the first rows see nothing
    inputs = FlashCase(batch=3, seqlen_q=6, seqlen_k=40, heads_q=4, heads_k=2, decode=True,
                       causal=True, used=(2, 0, 6)).make()  # fmt: skip
    got = inputs.forward(target.backend)
    compare(got, inputs.truth(grad=False), inputs.context).check()
    assert (got["lse"][0, :, :4] == -torch.inf).all()
    assert (got["lse"][1] == -torch.inf).all()
    assert not got["out"][1].any()


def test_causal_is_the_default(target: Target) -> None:
    inputs = FlashCase(seqlen_q=5, seqlen_k=40, decode=True, causal=True).make()
    out = attnforge.flash_decode(inputs.q, inputs.k, inputs.v, backend=target.backend)
    assert torch.equal(out, inputs.forward(target.backend)["out"])
    assert not torch.equal(out, inputs.forward(target.backend, causal=False)["out"])


def test_gradients(target: Target) -> None:
    inputs = FlashCase(seqlen_q=3, seqlen_k=70, heads_q=4, heads_k=2, decode=True, causal=True,
                       used=(70, 20), sinks="normal").make()  # fmt: skip
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


def test_default_split_ignores_the_batch(target: Target) -> None:
    # check 74, decode: bitwise alone, in the batch, and with another cache capacity
    inputs = FlashCase(batch=4, seqlen_q=1, seqlen_k=4200, heads_q=4, heads_k=1, decode=True,
                       causal=True, used=(4200, 1, 2500, 77)).make()  # fmt: skip
    whole = inputs.forward(target.backend)
    for b in range(4):
        length = int(inputs.options["cache_seqlens"][b])
        one = inputs.with_(q=inputs.q[b : b + 1], k=inputs.k[b : b + 1, :length],
                           v=inputs.v[b : b + 1, :length],
                           cache_seqlens=torch.tensor([length], dtype=torch.int32))  # fmt: skip
        assert_same(
            one.forward(target.backend),
            {n: x[b : b + 1] for n, x in whole.items()},
            exact=target.exact,
        )


def test_bad_num_splits() -> None:
    inputs = FlashCase(seqlen_q=1, decode=True).make()
    for bad in (-1, 1.5, "2", None):
        with pytest.raises(ValueError, match=r"attnforge\.flash_decode: num_splits is"):
            inputs.forward("reference", num_splits=bad)
