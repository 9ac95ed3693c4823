"""CUDA kernels within the bounds of the float64 truth: forward, LSE, decode, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge._params import FlashParams
from attnforge.backends.cuda import flash
from attnforge.backends.cuda.flash import HEAD_DIMS
from attnforge.testing.cases import LAYOUTS, FlashCase, Layout
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.oracle import merged_truth

pytestmark = pytest.mark.usefixtures("twin")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32, BF16, FP16 = DTYPES
NAMES = ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("d", "dv"), HEAD_DIMS)
def test_every_kernel(check: Any, d: int, dv: int, dtype: torch.dtype, features: bool) -> None:
    # 71 keys and rows of two heads: whole tiles, edges and tails for every tile size
    more: dict[str, Any] = {"softcap": 8.0, "alibi": "head"} if features else {}
    check(FlashCase(batch=1, seqlen_q=37, seqlen_k=71, heads_q=2, heads_k=1, head_dim=d,
                    v_head_dim=dv, causal=True, dtype=dtype, **more))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("d", "dv"), HEAD_DIMS)
def test_every_decode_kernel(check: Any, d: int, dv: int, dtype: torch.dtype) -> None:
    check(FlashCase(batch=1, seqlen_q=2, seqlen_k=150, heads_q=3, heads_k=1, head_dim=d,
                    v_head_dim=dv, causal=True, dtype=dtype, decode=True), False,
          num_splits=2)  # fmt: skip


LENGTHS = [(1, 1), (1, 70), (65, 33), (64, 64), (130, 200), (150, 47)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_lengths(check: Any, sq: int, sk: int, causal: bool) -> None:
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=1, heads_k=1, head_dim=24,
                    causal=causal, dtype=DTYPES[(sq + causal) % 3]))  # fmt: skip


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "softcap_saturated": {"softcap": 1.5, "spread": 30.0},
    "alibi": {"alibi": "head", "causal": True},
    "alibi_batch": {"alibi": "batch"},
    "sinks": {"sinks": "normal"},
    "sinks_mixed": {"sinks": "mixed", "causal": True},
    "scale": {"softmax_scale": 0.37},
    "negative_scale": {"softmax_scale": -0.25, "causal": True},
    "zero_scale": {"softmax_scale": 0.0, "causal": True},
    "used": {"used": (0, 41), "causal": True},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (50, 33), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3},
    "v_mean": {"v_mean": 3.0},
    "peaky": {"spread": 8.0},
    "no_lse_gradient": {"lse_grad": False},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(check: Any, name: str, dtype: torch.dtype) -> None:
    check(FlashCase(**{"seqlen_q": 40, "seqlen_k": 52, "heads_q": 4, "heads_k": 2, "head_dim": 24,
                       "dtype": dtype, **FEATURES[name]}))  # fmt: skip


@pytest.mark.parametrize("rows", [2, 9], ids=["by warp", "by block"])
@pytest.mark.parametrize("name", FEATURES)
def test_decode_features(check: Any, name: str, rows: int) -> None:
    # two query heads per KV head: at most 16 rows go to the decode kernel, more to packed tiles
    check(FlashCase(**{"seqlen_q": rows, "seqlen_k": 190, "heads_q": 4, "heads_k": 2,
                       "head_dim": 24, "dtype": BF16, "decode": True, **FEATURES[name]}),
          grad=False, num_splits=3 if rows == 2 else 2)  # fmt: skip


WINDOWS = [(0, 0), (20, 0), (1023, 0), (-1, 17), (3, 5), (0, -1), (1 << 40, 2)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}_{w[1]}")
@pytest.mark.parametrize(("sq", "sk"), [(65, 130), (90, 20)])
def test_windows(check: Any, window: tuple[int, int], sq: int, sk: int) -> None:
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=1, heads_k=1, window=window,
                    dtype=BF16))  # fmt: skip


@pytest.mark.parametrize(("hq", "hk"), [(3, 1), (5, 1), (9, 3), (16, 1)])
@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
def test_group_sizes(check: Any, hq: int, hk: int, decode: bool) -> None:
    check(FlashCase(batch=1, seqlen_q=1 if decode else 20, seqlen_k=35, heads_q=hq, heads_k=hk,
                    causal=True, alibi="head", sinks="normal", dtype=BF16, decode=decode),
          grad=not decode)  # fmt: skip


VARLEN: dict[str, dict[str, Any]] = {
    "mixed": {"lengths": ((5, 9), (0, 3), (40, 33), (1, 1), (3, 0))},
    "all_keys_empty": {"lengths": ((4, 0), (9, 0))},
    "all_empty": {"lengths": ((0, 0), (0, 0))},
    "used": {"lengths": ((5, 9), (0, 3), (40, 33)), "used": (9, 0, 20)},
    "features": {"lengths": ((133, 40), (17, 170)), "window": (9, 4), "alibi": "batch",
                 "sinks": "normal", "softcap": 6.0},
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", VARLEN)
def test_varlen(check: Any, name: str, causal: bool) -> None:
    check(FlashCase(heads_q=2, heads_k=1, causal=causal, dtype=DTYPES[causal], **VARLEN[name]))


@pytest.mark.parametrize("sizes", [
    {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0},
    {"seqlen_k": 0, "sinks": "normal"}, {"used": (0, 0), "sinks": "mixed"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("decode", [False, True], ids=["attention", "decode"])
def test_nothing_to_attend_to(check: Any, sizes: dict[str, Any], decode: bool) -> None:
    check(FlashCase(**{"seqlen_q": 5, "seqlen_k": 7, "causal": True, **sizes}, decode=decode),
          grad=not decode)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(check: Any, layout: Layout) -> None:
    check(FlashCase(batch=2, seqlen_q=18, seqlen_k=20, heads_q=2, heads_k=1, layout=layout,
                    grad_layout=layout, dtype=BF16, causal=True))  # fmt: skip
    check(FlashCase(lengths=((9, 20), (20, 3)), heads_q=2, heads_k=1, layout=layout,
                    grad_layout=layout))  # fmt: skip


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    # 33 rows alone are packed with the other head, beside 200 rows they are not
    inputs = FlashCase(lengths=((33, 40), (200, 70), (20, 20)), heads_q=2, heads_k=1, causal=True,
                       dtype=BF16).make()  # fmt: skip
    whole = inputs.run("emulated")
    alone = inputs.with_(
        q=inputs.q[:33], k=inputs.k[:40], v=inputs.v[:40], dout=inputs.dout[:33],
        dlse=inputs.dlse[:, :33] if inputs.dlse is not None else None,
        cu_seqlens_q=torch.tensor([0, 33], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 40], dtype=torch.int32),
    ).run("emulated")  # fmt: skip
    part = {n: whole[n][:33] for n in ("out", "dq")} | {n: whole[n][:40] for n in ("dk", "dv")}
    assert_same(alone, {**part, "lse": whole["lse"][:, :33]})


def test_default_splits_of_a_decode(check: Any) -> None:
    check(FlashCase(batch=1, seqlen_q=1, seqlen_k=2100, heads_q=2, heads_k=1, head_dim=16,
                    dtype=BF16, sinks="normal", decode=True), grad=False)  # fmt: skip


def test_rows_behind_the_last_sequence() -> None:
    # packed tensors longer than their prefix sums: zeros, -inf, zero gradients
    inputs = FlashCase(lengths=((5, 9), (7, 6)), heads_q=2, heads_k=1).make()

    def longer(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return torch.cat([x, x.narrow(dim, 0, 3)], dim)

    assert inputs.dlse is not None
    more = inputs.with_(q=longer(inputs.q), k=longer(inputs.k), v=longer(inputs.v),
                        dout=longer(inputs.dout), dlse=longer(inputs.dlse, 1))  # fmt: skip
    got, want = more.run("emulated"), inputs.run("emulated")
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(got[name][:-3], want[name]), name
        assert not got[name][-3:].any(), name
    assert (got["lse"][:, -3:] == -torch.inf).all()


def test_low_part_of_the_output() -> None:
    # zero logits: P is exact, so out + out_lo is the fp32 output to u16^2
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=24, dtype=BF16).make()
    q, v = torch.zeros_like(inputs.q), inputs.v
    out, low = torch.empty_like(q), torch.empty_like(q)
    p = FlashParams(None, None, None, None, None, 20, 24, 1.0, -1, -1, 0.0)
    flash.fwd(q, inputs.k, v, p, out, torch.empty(1, 2, 20), low)
    want = v.double().mean(1, keepdim=True).expand_as(out)
    assert ((out.double() - want).abs() > 2.0**-14 * want.abs()).any()
    assert ((out.double() + low.double() - want).abs() <= 2.0**-15 * want.abs() + 1e-6).all()


def test_gradient_of_lse_alone_leaves_v() -> None:
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=45, causal=True, dtype=BF16).make()
    got = inputs.with_(dout=torch.zeros_like(inputs.dout)).run("emulated")
    assert not got["dv"].any()
    assert got["dq"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merge(dtype: torch.dtype, parts: int) -> None:
    g = torch.Generator().manual_seed(parts)
    outs = [torch.randn(2, 3, 2, 20, generator=g).to(dtype) for _ in range(parts)]
    lses = [torch.randn(2, 2, 3, generator=g) * 4 for _ in range(parts)]
    lses[0][0, 1] = -torch.inf
    lses[-1][1, 0, 1] = torch.inf
    outs[0][0, :, 1] = torch.nan  # an empty part is not read
    outs[-1][1, 1, 0] = torch.nan
    out, lse = attnforge.merge_states(outs, lses, backend="emulated")
    compare({"out": out, "lse": lse}, merged_truth(outs, lses)).check()
