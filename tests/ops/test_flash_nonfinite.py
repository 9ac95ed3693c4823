"""NaN and infinity go where IEEE arithmetic sends them, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnforge.testing.cases import FlashCase, FlashInputs, Target
from attnforge.testing.compare import assert_same

BAD = [math.nan, math.inf, -math.inf]
DTYPES = [torch.float32, torch.bfloat16]
DTYPE_IDS = ["fp32", "bf16"]


def agree(target: Target, a: Tensor, b: Tensor, name: str = "") -> None:
    assert_same({"x": a}, {"x": b}, name, exact=target.exact)


def changed(inputs: FlashInputs, name: str, place: object, value: float) -> FlashInputs:
    x = getattr(inputs, name).clone()
    x[place] = value
    return inputs.with_(**{name: x})


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("at", ["first", "last"])
def test_nan_in_one_query_row(target: Target, dtype: torch.dtype, rows: int, at: str) -> None:
    # check 18: only that row, bitwise
    row = 0 if at == "first" else rows - 1
    inputs = FlashCase(seqlen_q=rows, seqlen_k=90, heads_q=4, heads_k=2, dtype=dtype).make()
    want = inputs.run(target.backend)
    got = changed(inputs, "q", (1, row, 1, 2), math.nan).run(target.backend)
    hit = torch.zeros(want["out"].shape[:3], dtype=torch.bool)
    hit[1, row, 1] = True
    for name in ("out", "dq"):
        assert got[name][hit].isnan().all(), name
        agree(target, got[name][~hit], want[name][~hit], name)
    stat = hit.transpose(1, 2)
    assert got["lse"][stat].isnan().all()
    agree(target, got["lse"][~stat], want["lse"][~stat])
    for name in ("dk", "dv"):  # its group and sequence only
        assert got[name][1, :, 0].isnan().all()
        agree(target, got[name][0], want[name][0])
        agree(target, got[name][:, :, 1], want[name][:, :, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("rows", [2, 40])
def test_nan_in_one_batch_and_head(
    target: Target, name: str, dtype: torch.dtype, rows: int
) -> None:
    # check 19: K or V of one KV head of one sequence
    inputs = FlashCase(seqlen_q=rows, seqlen_k=50, heads_q=6, heads_k=3, dtype=dtype).make()
    want = inputs.run(target.backend)
    got = changed(inputs, name, (0, slice(None), 1), math.nan).run(target.backend)
    hit = torch.zeros(2, 1, 6, dtype=torch.bool)
    hit[0, :, 2:4] = True
    rows_hit, keys_hit = hit.expand(2, rows, 6), hit[:, :, ::2].expand(2, 50, 3)
    assert got["out"][rows_hit].isnan().all()
    for part, mask in (("out", rows_hit), ("dq", rows_hit), ("dk", keys_hit), ("dv", keys_hit)):
        agree(target, got[part][~mask], want[part][~mask], part)
    assert got["dq"][rows_hit].isnan().all()
    if name == "k":
        assert got["lse"][rows_hit.transpose(1, 2)].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("key", [89, 80, 60, 1])
def test_hidden_future_keys(
    target: Target, name: str, value: float, dtype: torch.dtype, key: int
) -> None:
    # section 6: causal; rows before the bad key are bitwise what they were, forward and dQ
    inputs = FlashCase(batch=1, seqlen_q=90, seqlen_k=90, causal=True, dtype=dtype).make()
    want = inputs.run(target.backend)
    got = changed(inputs, name, (0, key), value).run(target.backend)
    for part in ("out", "dq"):
        agree(target, got[part][:, :key], want[part][:, :key], part)
    agree(target, got["lse"][..., :key], want["lse"][..., :key])
    if math.isnan(value):
        assert got["out"][:, key:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("rows", [150, 20])
def test_hidden_past_keys(
    target: Target, name: str, value: float, dtype: torch.dtype, rows: int
) -> None:
    # section 6: a window; keys that only rows past the bad one see get clean gradients too
    inputs = FlashCase(batch=1, seqlen_q=rows, seqlen_k=150, window=(10, 0), dtype=dtype).make()
    bad = 150 - rows
    want = inputs.run(target.backend)
    got = changed(inputs, name, (0, bad), value).run(target.backend)
    first = 11  # row 0 stands at key `bad`
    for part in ("out", "dq"):
        agree(target, got[part][:, first:], want[part][:, first:], part)
    agree(target, got["lse"][..., first:], want["lse"][..., first:])
    for part in ("dk", "dv"):
        agree(target, got[part][:, bad + first :], want[part][:, bad + first :], part)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", ["q", "dout"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_rows_that_do_not_see_a_key_leave_its_gradient(
    target: Target, name: str, dtype: torch.dtype, value: float
) -> None:
    # the mirror image in dK and dV: a bad row 20 of a causal call reaches keys 0..20
    inputs = FlashCase(batch=1, seqlen_q=90, seqlen_k=90, causal=True, dtype=dtype).make()
    want = inputs.run(target.backend)
    got = changed(inputs, name, (0, 20), value).run(target.backend)
    for part in ("dk", "dv"):
        agree(target, got[part][:, 21:], want[part][:, 21:], part)
    others = [r for r in range(90) if r != 20]
    agree(target, got["dq"][:, others], want["dq"][:, others])


@pytest.mark.parametrize("value", [*BAD, 1e30], ids=str)
@pytest.mark.parametrize("options", [
    {"used": (37, 64), "seqlen_q": 20, "causal": True},
    {"used": (37, 64), "seqlen_q": 2},
    {"used": (0, 1), "seqlen_q": 70, "window": (9, 4)},
    {"used": (37, 64), "seqlen_q": 3, "decode": True, "causal": True},
    {"used": (20, 5), "lengths": ((9, 33), (40, 6)), "causal": True},
], ids=["many_rows", "few_rows", "window", "decode", "varlen"])  # fmt: skip
def test_slots_past_the_used_keys(target: Target, value: float, options: dict[str, object]) -> None:
    # check 56; dense_paged 5.2, 7: never read, so bitwise the same; their gradients are 0
    inputs = FlashCase(seqlen_k=65, heads_q=4, heads_k=2, **options).make()  # type: ignore[arg-type]
    used = inputs.options.get("seqused_k", inputs.options.get("cache_seqlens")).tolist()  # type: ignore[union-attr]
    want = inputs.run(target.backend)
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
    got = poisoned.run(target.backend)
    assert_same(got, want, exact=target.exact)
    assert_same(
        poisoned.forward(target.backend), inputs.forward(target.backend), exact=target.exact
    )
    for b in range(2):
        for name in ("dk", "dv"):
            assert not tail(got[name], b).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [2, 40])
def test_infinity_in_a_visible_value(target: Target, dtype: torch.dtype, rows: int) -> None:
    # check 17: +-inf in V reaches that column of every row and no other column
    inputs = FlashCase(
        batch=1, seqlen_q=rows, seqlen_k=30, heads_q=1, heads_k=1, dtype=dtype
    ).make()
    want = inputs.forward(target.backend)
    for value in (math.inf, -math.inf):
        got = changed(inputs, "v", (0, 17, 0, 5), value).forward(target.backend)
        assert (got["out"][..., 5] == value).all()
        keep = [c for c in range(16) if c != 5]
        agree(target, got["out"][..., keep], want["out"][..., keep])
        agree(target, got["lse"], want["lse"])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [2, 40])
def test_infinity_in_a_visible_key(target: Target, dtype: torch.dtype, rows: int) -> None:
    # check 17: a logit of +inf makes the row NaN, one of -inf takes the key out
    inputs = FlashCase(
        batch=1, seqlen_q=rows, seqlen_k=30, heads_q=1, heads_k=1, dtype=dtype
    ).make()
    with_inf = changed(inputs, "k", (0, 17, 0, 5), math.inf)
    got = with_inf.forward(target.backend)
    up = inputs.q[0, :, 0, 5] > 0
    assert got["out"][0, up].isnan().all()
    assert not got["lse"][0, 0, up].isfinite().any()
    rest = [j for j in range(30) if j != 17]
    without = inputs.with_(k=inputs.k[:, rest], v=inputs.v[:, rest]).truth(grad=False)
    error = (got["out"].double() - without.values["out"]).abs()[0, ~up]
    assert (error <= 2 * without.bounds["out"][0, ~up]).all()


@pytest.mark.parametrize("rows", [2, 40])
def test_infinity_in_a_query(target: Target, rows: int) -> None:
    # check 17: logits of both signs of infinity; that row is NaN and no other
    inputs = FlashCase(batch=1, seqlen_q=rows, seqlen_k=30, heads_q=1, heads_k=1).make()
    want = inputs.forward(target.backend)
    got = changed(inputs, "q", (0, 1, 0, 5), math.inf).forward(target.backend)
    assert got["out"][0, 1].isnan().all()
    others = [r for r in range(rows) if r != 1]
    agree(target, got["out"][:, others], want["out"][:, others])
