"""Forward, LSE and every gradient of the Triton kernels within the bounds of the float64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge._params import FlashParams
from attnforge.backends.triton import flash
from attnforge.testing.cases import LAYOUTS, FlashCase, Layout
from attnforge.testing.compare import assert_same, compare
from attnforge.triton_kernels.flash import config

pytestmark = pytest.mark.thinned(3)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32, BF16, FP16 = DTYPES
LENGTHS = [(1, 1), (1, 70), (17, 33), (32, 32), (33, 64), (31, 130), (65, 16), (70, 47), (130, 49)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_lengths(check: Any, sq: int, sk: int, causal: bool) -> None:
    dtype = DTYPES[(sq + causal) % 3]
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_k=1, head_dim=24, causal=causal,
                    dtype=dtype))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_every_length_has_its_tail(check: Any, dtype: torch.dtype) -> None:
    for n in (*range(1, 20, 3), 31, 32, 33, 63, 65):
        check(FlashCase(batch=1, seqlen_q=n, seqlen_k=(7 * n) % 67 + 1, heads_q=1, heads_k=1,
                        head_dim=8, causal=n % 2 == 0, dtype=dtype))  # fmt: skip


@pytest.mark.parametrize(
    ("d", "dv"),
    [(8, 8), (16, 16), (40, 40), (64, 64), (72, 72), (128, 128), (192, 128), (256, 256), (64, 128),
     (8, 256), (136, 8)],
)  # fmt: skip
def test_head_dims(check: Any, d: int, dv: int) -> None:
    check(FlashCase(batch=1, seqlen_q=34, seqlen_k=40, head_dim=d, v_head_dim=dv, causal=True,
                    dtype=DTYPES[d // 8 % 3]))  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_wide_values(check: Any, dtype: torch.dtype) -> None:
    check(FlashCase(batch=1, seqlen_q=20, seqlen_k=40, heads_q=2, heads_k=1, head_dim=40,
                    v_head_dim=512, causal=True, dtype=dtype), grad=False)  # fmt: skip


DESCRIBED: dict[str, dict[str, Any]] = {
    "tails": {"seqlen_q": 40, "seqlen_k": 53, "head_dim": 24, "window": (30, 3), "causal": True},
    "features": {"seqlen_q": 20, "seqlen_k": 40, "used": (40, 17), "alibi": "head",
                 "sinks": "mixed", "v_head_dim": 40, "layout": "heads_first"},
    "packed": {"lengths": ((5, 9), (0, 3), (40, 33)), "causal": True, "used": (9, 0, 20)},
    "rope": {"seqlen_q": 20, "seqlen_k": 40, "mods": ("rope",), "dtype": FP32},
    "mask": {"seqlen_q": 20, "seqlen_k": 40, "mods": ("mask:b",)},
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIBED)
def test_descriptors_change_no_bit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """K and V by descriptors, also where nothing can be described by them (rope)."""
    inputs = FlashCase(heads_q=4, heads_k=2, **{"dtype": BF16, **DESCRIBED[name]}).make()
    want = inputs.forward("triton")
    compare(want, inputs.truth(grad=False, rounded=True), inputs.context).check()
    choose = config.choose
    monkeypatch.setattr(
        config, "choose", lambda kernel, shape: {**choose(kernel, shape), "USE_TMA": 1}
    )
    assert_same(inputs.forward("triton"), want, name)


def test_what_descriptors_describe() -> None:
    x = torch.empty(2, 9, 3, 24, dtype=torch.bfloat16)
    assert flash._boxed(x, x[:, 1:])
    assert not flash._boxed(x, x[..., 1:])  # base
    assert not flash._boxed(torch.empty(2, 9, 3, 20, dtype=torch.bfloat16))  # strides
    assert not flash._boxed(x[:, :1].expand(2, 9, 3, 24))  # one row for all


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


WINDOWS = [(0, 0), (1, 0), (20, 0), (1023, 0), (-1, 17), (3, 5), (0, -1), (40, 40), (1 << 40, 2)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}_{w[1]}")
@pytest.mark.parametrize(("sq", "sk"), [(65, 65), (20, 90), (90, 20)])
def test_windows(check: Any, window: tuple[int, int], sq: int, sk: int) -> None:
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=1, heads_k=1, window=window))


@pytest.mark.parametrize(("hq", "hk"), [(3, 1), (5, 1), (9, 3), (8, 2)])
def test_group_sizes(check: Any, hq: int, hk: int) -> None:
    check(FlashCase(batch=1, seqlen_q=20, seqlen_k=35, heads_q=hq, heads_k=hk, causal=True,
                    alibi="head", dtype=BF16))  # fmt: skip


VARLEN: dict[str, dict[str, Any]] = {
    "mixed": {"lengths": ((5, 9), (0, 3), (40, 33), (1, 1), (3, 0))},
    "ends_empty": {"lengths": ((0, 0), (20, 20), (0, 7), (7, 0))},
    "all_keys_empty": {"lengths": ((4, 0), (9, 0))},
    "all_empty": {"lengths": ((0, 0), (0, 0))},
    "used": {"lengths": ((5, 9), (0, 3), (40, 33)), "used": (9, 0, 20)},
    "features": {"lengths": ((33, 40), (17, 17)), "window": (9, 4), "alibi": "batch",
                 "sinks": "normal", "softcap": 6.0},
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", VARLEN)
def test_varlen(check: Any, name: str, causal: bool) -> None:
    check(FlashCase(heads_q=2, heads_k=1, causal=causal, dtype=DTYPES[causal], **VARLEN[name]))


def test_rows_behind_the_last_sequence() -> None:
    # packed tensors longer than their prefix sums: zeros, -inf, zero gradients, on poisoned memory
    inputs = FlashCase(lengths=((5, 9), (7, 6)), heads_q=2, heads_k=1).make()

    def longer(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return torch.cat([x, x.narrow(dim, 0, 3)], dim)

    assert inputs.dlse is not None
    more = inputs.with_(q=longer(inputs.q), k=longer(inputs.k), v=longer(inputs.v),
                        dout=longer(inputs.dout), dlse=longer(inputs.dlse, 1))  # fmt: skip
    got, want = more.run("triton"), inputs.run("triton")
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(got[name][:-3], want[name]), name
        assert not got[name][-3:].any(), name
    assert torch.equal(got["lse"][:, :-3], want["lse"])
    assert (got["lse"][:, -3:] == -torch.inf).all()


@pytest.mark.parametrize("sizes", [
    {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0},
    {"seqlen_k": 0, "sinks": "normal"}, {"used": (0, 0), "sinks": "mixed"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("decode", [False, True], ids=["attention", "decode"])
def test_nothing_to_attend_to(check: Any, sizes: dict[str, Any], decode: bool) -> None:
    check(FlashCase(**{"seqlen_q": 5, "seqlen_k": 7, "causal": True, **sizes}, decode=decode))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(check: Any, layout: Layout) -> None:
    check(FlashCase(batch=2, seqlen_q=18, seqlen_k=20, heads_q=2, heads_k=1, layout=layout,
                    grad_layout=layout, dtype=BF16, causal=True))  # fmt: skip
    check(FlashCase(lengths=((9, 20), (20, 3)), heads_q=2, heads_k=1, layout=layout,
                    grad_layout=layout))  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_shipped_tiles(monkeypatch: pytest.MonkeyPatch, check: Any, arch: str) -> None:
    # the tiles that a GPU gets, on a problem that they divide badly
    monkeypatch.undo()
    shipped = config.choose
    monkeypatch.setattr(
        config, "choose", lambda kernel, shape: shipped(kernel, shape._replace(arch=arch))
    )
    check(FlashCase(batch=1, seqlen_q=150, seqlen_k=200, heads_q=1, heads_k=1, head_dim=64,
                    causal=True, window=(130, 0), dtype=FP16))  # fmt: skip


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


def test_delta_comes_from_the_unrounded_output() -> None:
    inputs = FlashCase(batch=1, seqlen_q=96, seqlen_k=96, heads_q=1, heads_k=1, head_dim=64,
                       v_mean=3.0, dtype=BF16, lse_grad=False).make()  # fmt: skip
    got, want = inputs.run("triton"), inputs.truth()
    for name in ("dq", "dk"):
        error = (got[name].double() - want.values[name]).abs().max() / want.values[name].abs().max()
        assert error <= 8e-3, name


def test_gradient_of_lse_alone_leaves_v() -> None:
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=45, causal=True, dtype=BF16).make()
    inputs = inputs.with_(dout=torch.zeros_like(inputs.dout))
    got = inputs.run("triton")
    assert not got["dv"].any()
    assert got["dq"].any()
    compare(got, inputs.truth(rounded=True), inputs.context).check()


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    inputs = FlashCase(lengths=((33, 40), (5, 70), (20, 20)), heads_q=2, heads_k=1, causal=True,
                       dtype=BF16).make()  # fmt: skip
    whole = inputs.run("triton")
    alone = inputs.with_(
        q=inputs.q[33:38], k=inputs.k[40:110], v=inputs.v[40:110], dout=inputs.dout[33:38],
        dlse=inputs.dlse[:, 33:38] if inputs.dlse is not None else None,
        cu_seqlens_q=torch.tensor([0, 5], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 70], dtype=torch.int32),
    ).run("triton")  # fmt: skip
    part = {n: whole[n][33:38] for n in ("out", "dq")} | {n: whole[n][40:110] for n in ("dk", "dv")}
    assert_same(alone, {**part, "lse": whole["lse"][:, 33:38]})


def test_backward_takes_the_forward_of_another_backend() -> None:
    inputs = FlashCase(batch=1, seqlen_q=30, seqlen_k=40, causal=True, dtype=BF16).make()
    with attnforge.backend("flash_fwd=reference,*=triton"):
        got = inputs.run()
    compare(got, inputs.truth(), inputs.context).check()
