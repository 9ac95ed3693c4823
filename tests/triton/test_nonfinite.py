"""NaN and infinity in the Triton kernels: where IEEE arithmetic sends them, and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import assert_same

pytestmark = pytest.mark.thinned(3)

BAD = [math.nan, math.inf, -math.inf]
FP32, BF16 = torch.float32, torch.bfloat16


def changed(inputs: FlashInputs, name: str, place: object, value: float) -> FlashInputs:
    x = getattr(inputs, name).clone()
    x[place] = value
    return inputs.with_(**{name: x})


def agree(a: Tensor, b: Tensor, name: str = "") -> None:
    assert_same({"x": a}, {"x": b}, name)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("row", [0, 36])
def test_nan_in_one_query_row(dtype: torch.dtype, row: int) -> None:
    inputs = FlashCase(seqlen_q=37, seqlen_k=50, heads_q=4, heads_k=2, dtype=dtype).make()
    want = inputs.run("triton")
    got = changed(inputs, "q", (1, row, 1, 2), math.nan).run("triton")
    hit = torch.zeros(want["out"].shape[:3], dtype=torch.bool)
    hit[1, row, 1] = True
    for name in ("out", "dq"):
        assert got[name][hit].isnan().all(), name
        agree(got[name][~hit], want[name][~hit], name)
    stat = hit.transpose(1, 2)
    assert got["lse"][stat].isnan().all()
    agree(got["lse"][~stat], want["lse"][~stat])
    for name in ("dk", "dv"):  # its group and sequence only
        assert got[name][1, :, 0].isnan().all()
        agree(got[name][0], want[name][0])
        agree(got[name][:, :, 1], want[name][:, :, 1])


@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_one_kv_head_of_one_sequence(name: str) -> None:
    inputs = FlashCase(seqlen_q=33, seqlen_k=20, heads_q=4, heads_k=2, dtype=BF16).make()
    want = inputs.run("triton")
    got = changed(inputs, name, (0, slice(None), 1), math.nan).run("triton")
    hit = torch.zeros(2, 1, 4, dtype=torch.bool)
    hit[0, :, 2:] = True
    rows_hit, keys_hit = hit.expand(2, 33, 4), hit[:, :, ::2].expand(2, 20, 2)
    assert got["out"][rows_hit].isnan().all()
    assert got["dq"][rows_hit].isnan().all()
    for part, mask in (("out", rows_hit), ("dq", rows_hit), ("dk", keys_hit), ("dv", keys_hit)):
        agree(got[part][~mask], want[part][~mask], part)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("key", [69, 50, 33, 1])
def test_hidden_future_keys(name: str, value: float, key: int) -> None:
    # causal; rows before the bad key are bitwise what they were, forward and dQ
    inputs = FlashCase(batch=1, seqlen_q=70, seqlen_k=70, heads_q=1, heads_k=1, causal=True,
                       dtype=(FP32, BF16)[key % 2]).make()  # fmt: skip
    want = inputs.run("triton")
    got = changed(inputs, name, (0, key), value).run("triton")
    for part in ("out", "dq"):
        agree(got[part][:, :key], want[part][:, :key], part)
    agree(got["lse"][..., :key], want["lse"][..., :key])
    if math.isnan(value):
        assert got["out"][:, key:].isnan().all()
        assert got["dq"][:, key:].isnan().all()


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("rows", [90, 20])
def test_hidden_past_keys(name: str, value: float, rows: int) -> None:
    # a window; keys that only rows past the bad one see get clean gradients too
    inputs = FlashCase(batch=1, seqlen_q=rows, seqlen_k=90, heads_q=1, heads_k=1, window=(10, 0),
                       dtype=(FP32, BF16)[rows == 20]).make()  # fmt: skip
    bad = 90 - rows
    want = inputs.run("triton")
    got = changed(inputs, name, (0, bad), value).run("triton")
    first = 11  # row 0 stands at key `bad`
    for part in ("out", "dq"):
        agree(got[part][:, first:], want[part][:, first:], part)
    agree(got["lse"][..., first:], want["lse"][..., first:])
    for part in ("dk", "dv"):
        agree(got[part][:, bad + first :], want[part][:, bad + first :], part)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["q", "dout"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_rows_that_do_not_see_a_key_leave_its_gradient(
    name: str, dtype: torch.dtype, value: float
) -> None:
    # the mirror image in dK and dV: a bad row 20 of a causal call reaches keys 0..20
    inputs = FlashCase(batch=1, seqlen_q=70, seqlen_k=70, heads_q=2, heads_k=1, causal=True,
                       dtype=dtype).make()  # fmt: skip
    want = inputs.run("triton")
    got = changed(inputs, name, (0, 20, 1), value).run("triton")
    for part in ("dk", "dv"):
        agree(got[part][:, 21:], want[part][:, 21:], part)
        assert not got[part][:, :21].isfinite().all(-1).any(), part
    others = [r for r in range(70) if r != 20]
    agree(got["dq"][:, others], want["dq"][:, others])
    agree(got["dq"][:, :, 0], want["dq"][:, :, 0])


@pytest.mark.parametrize("value", [math.nan, 1e30], ids=str)
@pytest.mark.parametrize("options", [
    {"used": (37, 64), "seqlen_q": 20, "causal": True},
    {"used": (0, 1), "seqlen_q": 40, "window": (9, 4)},
    {"used": (37, 64), "seqlen_q": 3, "decode": True, "causal": True},
    {"used": (20, 5), "lengths": ((9, 33), (40, 6)), "causal": True},
], ids=["rows", "window", "decode", "varlen"])  # fmt: skip
def test_slots_past_the_used_keys(value: float, options: dict[str, Any]) -> None:
    # never read, so bitwise the same; their gradients are 0
    inputs = FlashCase(seqlen_k=65, heads_q=2, heads_k=1, **options).make()
    used = inputs.options.get("seqused_k", inputs.options.get("cache_seqlens")).tolist()  # type: ignore[union-attr]
    want = inputs.run("triton")
    k, v = inputs.k.clone(), inputs.v.clone()

    def tail(x: Tensor, b: int) -> Tensor:
        if x.dim() == 4:
            return x[b, used[b] :]
        start, stop = inputs.options["cu_seqlens_k"].tolist()[b : b + 2]
        return x[start + used[b] : stop]

    for b in range(2):
        for x in (k, v):
            tail(x, b).fill_(value)
    poisoned = inputs.with_(k=k, v=v)
    got = poisoned.run("triton")
    assert_same(got, want)
    assert_same(poisoned.forward("triton"), inputs.forward("triton"))
    for b in range(2):
        for name in ("dk", "dv"):
            assert not tail(got[name], b).any()


@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("key", [3, 38])
def test_infinity_in_a_visible_value(decode: bool, value: float, key: int) -> None:
    # it reaches its column of every row that sees it, and no other column
    inputs = FlashCase(batch=1, seqlen_q=5, seqlen_k=39, heads_q=1, heads_k=1, decode=decode,
                       causal=True).make()  # fmt: skip
    want = inputs.forward("triton")
    got = changed(inputs, "v", (0, key, 0, 5), value).forward("triton")
    sees = slice(0, 5) if key == 3 else slice(4, 5)
    assert (got["out"][:, sees, :, 5] == value).all()
    agree(got["out"][:, : sees.start], want["out"][:, : sees.start])
    keep = [c for c in range(16) if c != 5]
    agree(got["out"][..., keep], want["out"][..., keep])
    agree(got["lse"], want["lse"])


def test_infinite_logits() -> None:
    # +inf makes its row NaN and no other; -inf takes the key out
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=30, heads_q=1, heads_k=1).make()
    got = changed(inputs, "k", (0, 17, 0, 5), math.inf).forward("triton")
    up = inputs.q[0, :, 0, 5] > 0
    assert got["out"][0, up].isnan().all()
    rest = [j for j in range(30) if j != 17]
    without = inputs.with_(k=inputs.k[:, rest], v=inputs.v[:, rest]).truth(grad=False)
    error = (got["out"].double() - without.values["out"]).abs()[0, ~up]
    assert (error <= 2 * without.bounds["out"][0, ~up]).all()


@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
def test_sinks_of_infinity(decode: bool) -> None:
    # +inf takes all the weight: output 0, LSE +inf; -inf is no sink
    inputs = FlashCase(seqlen_q=2, seqlen_k=40, decode=decode, causal=True).make()
    more = {"num_splits": 2} if decode else {}
    sinks = torch.tensor([math.inf, -math.inf])
    got = inputs.with_(sinks=sinks).forward("triton", **more)
    assert not got["out"][:, :, 0].any()
    assert (got["lse"][:, 0] == math.inf).all()
    want = inputs.forward("triton", **more)
    agree(got["out"][:, :, 1], want["out"][:, :, 1])
    agree(got["lse"][:, 1], want["lse"][:, 1])


def test_huge_finite_logits() -> None:
    # finite scaled logits never give NaN
    inputs = FlashCase(batch=1, seqlen_q=9, seqlen_k=40, spread=1e18, causal=True).make()
    got = inputs.with_(k=inputs.k * 1e18).run("triton")
    assert all(got[name].isfinite().all() for name in ("out", "lse"))
