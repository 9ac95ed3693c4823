"""Numerics: exact cases, extreme logits, exp at its edges, metamorphic relations."""

from __future__ import annotations

import math

import pytest
import torch

import attnforge
from attnforge.testing.cases import FlashCase, FlashInputs, Target
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.oracle import unit_roundoff

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]
EXP_POINTS = [0.0, -1e-3, -1.0, -20.0, -87.3, -88.0, -104.0, -1e4, 30.0, 88.8, 1e4, -math.inf]


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("x", EXP_POINTS)
def test_exp_edges(target: Target, x: float, rows: int) -> None:
    # check 6: two keys of logits 0 and x; their weights are 1 / (1 + e^x) and e^x / (1 + e^x)
    q, k = torch.zeros(1, rows, 1, 8), torch.zeros(1, 2, 1, 8)
    q[..., 0] = 1
    k[0, 1, 0, 0] = x
    v = torch.eye(2, 8).view(1, 2, 1, 8)
    out, lse = attnforge.flash_attention(
        q, k, v, softmax_scale=1.0, return_lse=True, backend=target.backend
    )
    want = torch.softmax(torch.tensor([0.0, x], dtype=torch.float64), 0)
    # 20 units of exp and half a unit of the argument, which is |x| in size; below the normal
    # range exp may give 0.
    slack = (20 + (abs(x) if math.isfinite(x) else 0)) * 2**-23
    got = out[0, :, 0, :2].double()
    torch.testing.assert_close(got, want.expand_as(got), rtol=slack, atol=2.0**-125)
    assert (out[..., 2:] == 0).all()
    total = torch.logsumexp(torch.tensor([0.0, x], dtype=torch.float64), 0)
    torch.testing.assert_close(lse.double(), total.expand_as(lse), rtol=1e-6, atol=1e-6)


def test_exp_of_nan(target: Target) -> None:
    # check 6: a NaN logit is not dropped by a maximum
    for position in (0, 1, 39):
        inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=40, heads_q=1, heads_k=1).make()
        inputs.k[0, position, 0, 3] = math.nan
        got = inputs.forward(target.backend)
        assert got["out"].isnan().all()
        assert got["lse"].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [2, 64])
def test_one_hot_rows_are_exact(target: Target, dtype: torch.dtype, rows: int) -> None:
    # check 8: a gap of 4096 in the logits makes P exactly 0 and 1: output rows are rows of V
    g = torch.Generator().manual_seed(1)
    chosen = torch.randint(0, 64, (rows,), generator=g)
    eye = 64 * torch.eye(64, dtype=dtype)
    q, k = eye[chosen].view(1, rows, 1, 64), eye.view(1, 64, 1, 64)
    integers = torch.randint(-2, 3, (1, 64, 1, 24), generator=g)
    v = (integers * (torch.rand(1, 64, 1, 24, generator=g) < 0.2)).to(dtype)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, lse = attnforge.flash_attention(
        q, k, v, softmax_scale=1.0, return_lse=True, backend=target.backend
    )
    assert torch.equal(out[0, :, 0], v[0, chosen, 0])
    assert (lse == 4096).all()
    dout = torch.randint(-2, 3, out.shape, generator=g).to(dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    # P^T dO: exact sums of small integers; dS = P (dP - delta) = 0
    want = torch.zeros(64, 24).index_add_(0, chosen, dout[0, :, 0].float())
    assert torch.equal(dv[0, :, 0].float(), want)
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_uniform_small_integers_are_exact(target: Target, dtype: torch.dtype) -> None:
    # check 8: equal logits over 2^n keys and sparse integers in V: every sum is exact
    g = torch.Generator().manual_seed(2)
    keys = 64
    v = torch.randint(-2, 3, (1, keys, 1, 16), generator=g)
    v = (v * (torch.rand(v.shape, generator=g) < 0.2)).to(dtype)
    q, k = torch.zeros(1, 20, 1, 16, dtype=dtype), torch.ones(1, keys, 1, 16, dtype=dtype)
    out = attnforge.flash_attention(q, k, v, backend=target.backend)
    assert torch.equal(out.double(), (v.double().sum(1, keepdim=True) / keys).expand(out.shape))


def within_twice(inputs: FlashInputs, got: dict[str, torch.Tensor]) -> None:
    compare(got, inputs.truth(), inputs.context).check(limit=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [2, 70])
def test_key_permutation(target: Target, dtype: torch.dtype, rows: int) -> None:
    # check 9
    inputs = FlashCase(seqlen_q=rows, seqlen_k=333, heads_q=4, heads_k=2, dtype=dtype).make()
    order = torch.randperm(333, generator=torch.Generator().manual_seed(0))
    got = inputs.with_(k=inputs.k[:, order], v=inputs.v[:, order]).run(target.backend)
    back = order.argsort()
    got["dk"], got["dv"] = got["dk"][:, back], got["dv"][:, back]
    within_twice(inputs, got)


@pytest.mark.parametrize("shift", [-300.0, 12.0, 1000.0])
@pytest.mark.parametrize("rows", [2, 70])
def test_logit_shift(target: Target, shift: float, rows: int) -> None:
    # check 11: a constant in every logit, through an extra dimension
    inputs = FlashCase(batch=1, seqlen_q=rows, seqlen_k=150, head_dim=24, causal=True,
                       softmax_scale=1.0).make()  # fmt: skip
    inputs.q[..., -1], inputs.k[..., -1] = 0, 0
    plain = inputs.forward(target.backend)
    q, k = inputs.q.clone(), inputs.k.clone()
    q[..., -1], k[..., -1] = 1, shift
    moved = inputs.with_(q=q, k=k)
    got = moved.forward(target.backend)
    compare(got, moved.truth(grad=False), inputs.context).check()
    got["lse"] = (got["lse"].double() - shift).float()
    slack = 16 * 2.0**-24 * (abs(shift) + 20)
    torch.testing.assert_close(got["out"], plain["out"], rtol=0, atol=4 * slack)
    torch.testing.assert_close(got["lse"], plain["lse"], rtol=0, atol=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [2, 70])
def test_duplicated_keys(target: Target, dtype: torch.dtype, rows: int) -> None:
    # check 12: the same output, LSE + ln 2, half the gradient for each copy
    inputs = FlashCase(seqlen_q=rows, seqlen_k=101, dtype=dtype).make()
    twice = inputs.with_(k=inputs.k.repeat(1, 2, 1, 1), v=inputs.v.repeat(1, 2, 1, 1))
    got = twice.run(target.backend)
    got["lse"] = (got["lse"].double() - math.log(2)).float()
    for name in ("dk", "dv"):
        first, second = got[name].float().chunk(2, dim=1)
        got[name] = first + second
    within_twice(inputs, got)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=DTYPE_IDS[:2])  # fp16 has subnormal results
def test_scaling_v_by_a_power_of_two_is_exact(target: Target, dtype: torch.dtype) -> None:
    inputs = FlashCase(seqlen_q=50, seqlen_k=90, dtype=dtype, lse_grad=False).make()
    want = inputs.run(target.backend)
    got = inputs.with_(v=inputs.v * 4).run(target.backend)
    want["out"] = want["out"] * 4
    assert_same(
        {n: got[n] for n in ("out", "lse", "dv")},
        {n: want[n] for n in ("out", "lse", "dv")},
        exact=target.exact,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [2, 50])
def test_large_logits(target: Target, dtype: torch.dtype, rows: int) -> None:
    # check 13: q and k times 100, logits around 1e4: finite, one-hot where the gap says so
    inputs = FlashCase(seqlen_q=rows, seqlen_k=120, head_dim=64, dtype=dtype, spread=100.0).make()
    inputs = inputs.with_(k=inputs.k * 100)
    got = inputs.run(target.backend)
    assert all(x.isfinite().all() for x in got.values())
    logits = torch.einsum("bihd,bjhd->bhij", inputs.q.double(), inputs.k.double()) / 8
    best, second = logits.topk(2).values.unbind(-1)
    sure = best - second > 200  # far above the error of a logit of 1e4 in fp32
    assert sure.float().mean() > 0.5
    rows_of_v = inputs.v.transpose(1, 2).gather(
        2, logits.argmax(-1, keepdim=True).expand(*logits.shape[:-1], 64)
    )
    assert torch.equal(got["out"].transpose(1, 2)[sure], rows_of_v[sure])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 200.0])
def test_equal_logits_give_the_mean(target: Target, dtype: torch.dtype, value: float) -> None:
    # check 14
    inputs = FlashCase(seqlen_q=20, seqlen_k=77, dtype=dtype, softmax_scale=1.0).make()
    inputs = inputs.with_(k=torch.full_like(inputs.k, value), q=torch.ones_like(inputs.q))
    got = inputs.forward(target.backend)["out"]
    mean = inputs.v.double().mean(1, keepdim=True)
    slack = 1.1 * unit_roundoff(dtype) * mean.abs() + 1e-6
    assert ((got.double() - mean).abs() <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [1, 30])
def test_very_negative_logits(target: Target, dtype: torch.dtype, rows: int) -> None:
    # check 15; dense_paged 5.2, 23: all logits -524288; no sentinel stands for -inf
    q = torch.full((1, rows, 2, 128), 64.0, dtype=dtype)
    k, v = torch.full((1, 90, 1, 128), -64.0, dtype=dtype), torch.ones(1, 90, 1, 128, dtype=dtype)
    for options in ({}, {"causal": True}):
        out, lse = attnforge.flash_attention(
            q, k, v, softmax_scale=1.0, return_lse=True, backend=target.backend, **options
        )
        # 1 exactly, or one unit off in fp32 where the sum's reciprocal was rounded
        assert ((out.double() - 1).abs() <= 2.0**-23).all()
        torch.testing.assert_close(
            lse, torch.full_like(lse, -524288 + math.log(90)), atol=7, rtol=0
        )


def test_half_precision_products_beyond_half_range(target: Target) -> None:
    # dense_paged 5.2, 23: logits of 1e9 from fp16 inputs of 3e4 are finite in fp32
    inputs = FlashCase(seqlen_q=9, seqlen_k=40, dtype=torch.float16).make()
    q, k = (x.sign() * 3e4 for x in (inputs.q, inputs.k))
    got = inputs.with_(q=q, k=k).run(target.backend)
    assert got["out"].isfinite().all()
    assert got["lse"].isfinite().all()


@pytest.mark.parametrize("which", ["q", "k", "v", "dout", "all"])
def test_subnormal_inputs(target: Target, which: str) -> None:
    # check 16
    inputs = FlashCase(seqlen_q=20, seqlen_k=50, causal=True).make()
    names = ("q", "k", "v", "dout") if which == "all" else (which,)
    tiny = {n: getattr(inputs, n) * 1e-40 for n in names}
    inputs = inputs.with_(**tiny)
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


@pytest.mark.parametrize("rows", [1, 45])
def test_softcap_limits(target: Target, rows: int) -> None:
    # dense_paged 5.2, 16: saturated on either side; a huge cap is none
    inputs = FlashCase(seqlen_q=rows, seqlen_k=60, spread=200.0, softcap=30.0).make()
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()
    mild = FlashCase(seqlen_q=rows, seqlen_k=60).make()
    capped = mild.with_(softcap=1e4).run(target.backend)
    within_twice(mild, capped)
