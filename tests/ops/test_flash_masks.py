"""What each query may see: alignment, windows, empty rows, empty problems, used lengths."""

from __future__ import annotations

import math

import pytest
import torch

import attnforge
from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.oracle import visible

INF = math.inf


def seen_keys(target: Target, sq: int, sk: int, rows: int = 0, **options: object) -> torch.Tensor:
    """[sq, sk] bool as the kernel has it: equal logits, and V one-hot over the keys.

    Column j of the output is 1 / (number of visible keys) where j is visible and exactly 0
    where it is not.
    """
    width = -(-sk // 8) * 8
    q, k = torch.zeros(1, sq, 1, 8), torch.zeros(1, sk, 1, 8)
    v = torch.eye(sk, width).view(1, sk, 1, width)
    out = attnforge.flash_attention(q, k, v, backend=target.backend, **options)
    mask = out[0, :, 0, :sk] != 0
    share = mask.sum(-1, keepdim=True).clamp_min(1).reciprocal() * mask
    torch.testing.assert_close(out[0, :, 0, :sk], share, rtol=2e-6, atol=0)
    return mask


@pytest.mark.parametrize(("sq", "sk"), [(5, 2), (2, 5), (70, 70), (30, 130), (130, 30), (1, 9)])
def test_causal_alignment(target: Target, sq: int, sk: int) -> None:
    # check 27: bottom-right, exactly
    assert torch.equal(seen_keys(target, sq, sk, causal=True), visible(sq, sk, True, (-1, -1)))


@pytest.mark.parametrize("window", [(0, 0), (1, 0), (0, 1), (5, -1), (-1, 7), (33, 2), (200, 200)])
@pytest.mark.parametrize(("sq", "sk"), [(2, 90), (60, 60), (100, 40), (40, 100)])
def test_windows_exactly(target: Target, window: tuple[int, int], sq: int, sk: int) -> None:
    # check 28
    mask = seen_keys(target, sq, sk, window_size=window)
    assert torch.equal(mask, visible(sq, sk, False, window))


def test_torch_agrees_on_the_alignment(target: Target) -> None:
    # check 27: against another library's lower-right causal mask
    from torch.nn.attention.bias import causal_lower_right

    for sq, sk in ((20, 50), (50, 50)):
        inputs = FlashCase(seqlen_q=sq, seqlen_k=sk, causal=True).make()
        out = inputs.forward(target.backend)["out"]
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        mask = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
        assert torch.equal(mask, causal_lower_right(sq, sk)._materialize(torch.device("cpu")))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wide_window_is_causal_bitwise(target: Target, dtype: torch.dtype) -> None:
    # check 28: window >= S equals causal
    inputs = FlashCase(seqlen_q=77, seqlen_k=140, heads_q=4, dtype=dtype, causal=True).make()
    want = inputs.run(target.backend)
    for window in ((140, 0), (1 << 30, 0), (200, 5), (1 << 30, 1 << 30)):
        assert_same(
            inputs.with_(window_size=window).run(target.backend),
            want,
            str(window),
            exact=target.exact,
        )
    plain = inputs.with_(causal=False)
    assert_same(plain.with_(window_size=(-1, 0)).run(target.backend), want, exact=target.exact)
    assert_same(
        plain.with_(window_size=(140, 140)).run(target.backend),
        plain.run(target.backend),
        exact=target.exact,
    )


@pytest.mark.parametrize("sinks", ["", "normal", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {"seqlen_q": 40, "seqlen_k": 9, "causal": True},
        {"seqlen_q": 150, "seqlen_k": 70, "causal": True},
        {"seqlen_q": 12, "seqlen_k": 30, "window": (-1, -1), "used": (0, 0)},
        {"seqlen_q": 50, "seqlen_k": 20, "window": (3, 2)},
        {"lengths": ((7, 0), (5, 3), (0, 4), (9, 0)), "causal": True},
    ],
    ids=["few", "tiles", "used_0", "window", "varlen"],
)
def test_rows_that_see_nothing(target: Target, options: dict[str, object], sinks: str) -> None:
    # check 20: O = 0, LSE = -inf (or the sink), gradients exactly 0
    case = FlashCase(heads_q=4, heads_k=2, sinks=sinks, **options)  # type: ignore[arg-type]
    inputs = case.make()
    got = inputs.run(target.backend)
    want = inputs.truth()
    compare(got, want, inputs.context).check()
    stat = want.values["lse"]
    level = torch.full_like(stat, -INF)
    if sinks:
        level = inputs.options["sinks"].double().view(-1, 1).expand_as(stat)
    dead = stat == level
    assert dead.any()
    rows = dead.transpose(-1, -2)
    assert (got["lse"][stat == -INF] == -INF).all()
    assert not got["out"][rows].any()
    assert not got["dq"][rows].any()


@pytest.mark.parametrize("backend_rows", [1, 40])
def test_sink_limits(target: Target, backend_rows: int) -> None:
    # dense_paged 5.2, 17: -inf is no sink, bitwise; +inf takes everything; finite dsinks
    inputs = FlashCase(seqlen_q=backend_rows, seqlen_k=50, heads_q=2).make()
    none = inputs.run(target.backend)
    off = inputs.with_(sinks=torch.full((2,), -INF)).run(target.backend)
    assert not off.pop("dsinks").any()
    assert_same(off, none, exact=target.exact)
    full = inputs.with_(sinks=torch.full((2,), INF)).run(target.backend)
    assert not full["out"].any()
    assert (full["lse"] == INF).all()
    for name in ("dq", "dk", "dv"):
        assert not full[name].any(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_sinks_of_other_dtypes(target: Target, dtype: torch.dtype) -> None:
    inputs = FlashCase(seqlen_q=9, heads_q=4, heads_k=1, sinks="normal").make()
    sinks = inputs.options["sinks"].to(dtype).requires_grad_()
    out = inputs.call(inputs.q, inputs.k, inputs.v, sinks=sinks, backend=target.backend)
    out.sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.dtype == dtype
    same = inputs.with_(sinks=sinks.detach().float()).forward(target.backend)["out"]
    assert torch.equal(out.detach(), same)


def test_first_tile_masked_then_valid(target: Target) -> None:
    # check 21: rows whose first key tiles lie left of the window; no NaN from -inf - (-inf)
    inputs = FlashCase(batch=1, seqlen_q=700, seqlen_k=700, window=(10, 0)).make()
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


def test_whole_tiles_masked_by_alibi(target: Target) -> None:
    # check 22: logits of far tiles are so low that their weights underflow to 0
    inputs = FlashCase(batch=1, seqlen_q=40, seqlen_k=600, alibi="head").make()
    inputs = inputs.with_(alibi_slopes=torch.tensor([4.0, 1e4]))
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"seqlen_k": 0},
        {"seqlen_q": 0},
        {"batch": 0},
        {"heads_q": 0, "heads_k": 1},
        {"seqlen_q": 0, "seqlen_k": 0},
        {"seqlen_k": 0, "sinks": "normal"},
        {"seqlen_k": 0, "causal": True, "seqlen_q": 3},
        {"lengths": ((0, 0),)},
        {"lengths": ((5, 0), (3, 0))},
        {"lengths": ((0, 5), (0, 3))},
        {"seqlen_k": 0, "decode": True, "seqlen_q": 2},
        {"batch": 0, "decode": True},
    ],
    ids=lambda s: "_".join(map(str, s)),
)
def test_empty_problems(target: Target, sizes: dict[str, object], dtype: torch.dtype) -> None:
    # check 23
    inputs = FlashCase(dtype=dtype, **sizes).make()  # type: ignore[arg-type]
    got, want = inputs.run(target.backend), inputs.truth()
    compare(got, want, inputs.context).check()
    for name in ("dk", "dv"):
        assert not got[name].any()


def test_no_sequences(target: Target) -> None:
    # check 23: a varlen batch of none, with and without rows that belong to nobody
    zero = torch.zeros(1, dtype=torch.int32)
    for rows in (0, 3):
        q = torch.randn(rows, 2, 8, requires_grad=True)
        out, lse = attnforge.flash_attention_varlen(
            q, q, q, cu_seqlens_q=zero, cu_seqlens_k=zero, return_lse=True, backend=target.backend
        )
        assert not out.any()
        assert (lse == -INF).all()
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert not grad.any()


def test_negative_or_too_large_used(target: Target) -> None:
    # checks 40, 41
    inputs = FlashCase(seqlen_k=30).make()
    for bad in (-1, 31, -(2**31), 2**31 - 1):
        used = torch.tensor([5, bad], dtype=torch.int32)
        for call, name in (
            (attnforge.flash_attention, "seqused_k"),
            (attnforge.flash_decode, "cache_seqlens"),
        ):
            with pytest.raises(ValueError, match=rf"attnforge\.{call.__name__}: {name}\[1\]"):
                call(inputs.q, inputs.k, inputs.v, backend=target.backend, **{name: used})
