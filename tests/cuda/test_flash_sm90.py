"""The forward for sm_90a within the bounds of the float64 truth, under the emulator.

The emulated device has three multiprocessors, so blocks are persistent here too, and every launch
has another random schedule.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnforge._params import FlashParams
from attnforge.backends.cuda import flash
from attnforge.backends.cuda.flash import HEAD_DIMS
from attnforge.testing.cases import LAYOUTS, FlashCase, Layout
from attnforge.testing.compare import assert_same

pytestmark = pytest.mark.usefixtures("twin")

BF16, FP16 = torch.bfloat16, torch.float16
SM90: dict[str, Any] = {"grad": False, "backend": "emulated90"}


@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("d", "dv"), HEAD_DIMS)
def test_every_kernel(check: Any, d: int, dv: int, dtype: torch.dtype, features: bool) -> None:
    # four tiles of keys at least: stages are used again, turns taken, edges and tails seen
    more: dict[str, Any] = {"softcap": 8.0, "alibi": "head"} if features else {}
    check(FlashCase(batch=1, seqlen_q=70, seqlen_k=3 * 128 + 7, heads_q=1, heads_k=1, head_dim=d,
                    v_head_dim=dv, causal=True, dtype=dtype, **more), **SM90)  # fmt: skip


LENGTHS = [(1, 1), (1, 70), (65, 33), (128, 128), (129, 257), (300, 129), (150, 47)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_lengths(check: Any, sq: int, sk: int, causal: bool) -> None:
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=1, heads_k=1, head_dim=24,
                    causal=causal, dtype=(BF16, FP16)[(sq + causal) % 2]), **SM90)  # fmt: skip


def test_pieces_of_work_follow_each_other(check: Any) -> None:
    # 3 tiles x 6 pairs on three blocks: six pieces each, some longer than others
    check(FlashCase(batch=2, seqlen_q=260, seqlen_k=260, heads_q=3, heads_k=1, head_dim=64,
                    causal=True, dtype=BF16), **SM90)  # fmt: skip


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "alibi_batch": {"alibi": "batch"},
    "sinks_mixed": {"sinks": "mixed", "causal": True},
    "negative_scale": {"softmax_scale": -0.25, "causal": True},
    "zero_scale": {"softmax_scale": 0.0, "causal": True},
    "used": {"used": (0, 141), "causal": True},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (150, 33), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3},
    "v_mean": {"v_mean": 3.0},
    "peaky": {"spread": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(check: Any, name: str) -> None:
    check(FlashCase(**{"seqlen_q": 140, "seqlen_k": 152, "heads_q": 2, "heads_k": 1,
                       "head_dim": 24, "dtype": BF16, **FEATURES[name]}), **SM90)  # fmt: skip


WINDOWS = [(0, 0), (20, 0), (1023, 0), (-1, 17), (130, 5), (0, -1), (1 << 40, 2)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}_{w[1]}")
def test_windows(check: Any, window: tuple[int, int]) -> None:
    check(FlashCase(batch=1, seqlen_q=200, seqlen_k=400, heads_q=1, heads_k=1, window=window,
                    dtype=BF16), **SM90)  # fmt: skip


@pytest.mark.parametrize(("hq", "hk"), [(2, 1), (3, 1), (8, 2), (16, 1)])
@pytest.mark.parametrize("rows", [1, 20])
def test_groups_share_tiles(check: Any, hq: int, hk: int, rows: int) -> None:
    check(FlashCase(batch=1, seqlen_q=rows, seqlen_k=150, heads_q=hq, heads_k=hk, causal=True,
                    alibi="head", sinks="normal", dtype=BF16), **SM90)  # fmt: skip


@pytest.mark.parametrize(("group", "rows", "d"), [(5, 60, 128), (7, 20, 64), (5, 90, 64)])
def test_groups_that_do_not_divide_a_tile(check: Any, group: int, rows: int, d: int) -> None:
    # 125 of 128 rows, 189 and 190 of 192: what is left over is in no head, and no bit differs
    case = FlashCase(batch=1, seqlen_q=rows, seqlen_k=150, heads_q=group, heads_k=1, head_dim=d,
                     causal=True, dtype=BF16)  # fmt: skip
    check(case, **SM90)
    inputs = case.make()
    whole = inputs.forward("emulated90")
    for head in (0, group - 1):
        alone = inputs.with_(q=inputs.q[:, :, head : head + 1]).forward("emulated90")
        assert_same(alone, {"out": whole["out"][:, :, head : head + 1],
                            "lse": whole["lse"][:, head : head + 1]})  # fmt: skip


VARLEN: dict[str, dict[str, Any]] = {
    "mixed": {"lengths": ((5, 9), (0, 3), (140, 133), (1, 1), (3, 0))},
    "all_keys_empty": {"lengths": ((4, 0), (9, 0))},
    "all_empty": {"lengths": ((0, 0), (0, 0))},
    "used": {"lengths": ((5, 9), (0, 3), (40, 33)), "used": (9, 0, 20)},
    "features": {"lengths": ((133, 140), (17, 170)), "window": (9, 4), "alibi": "batch",
                 "sinks": "normal", "softcap": 6.0},
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", VARLEN)
def test_varlen(check: Any, name: str, causal: bool) -> None:
    check(FlashCase(heads_q=2, heads_k=1, causal=causal, dtype=(BF16, FP16)[causal],
                    **VARLEN[name]), **SM90)  # fmt: skip


@pytest.mark.parametrize("sizes", [
    {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0},
    {"seqlen_k": 0, "sinks": "normal"}, {"used": (0, 0), "sinks": "mixed"},
], ids=str)  # fmt: skip
def test_nothing_to_attend_to(check: Any, sizes: dict[str, Any]) -> None:
    check(FlashCase(**{"seqlen_q": 5, "seqlen_k": 7, "causal": True, "dtype": BF16, **sizes}),
          **SM90)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(check: Any, layout: Layout) -> None:
    check(FlashCase(batch=2, seqlen_q=18, seqlen_k=20, heads_q=2, heads_k=1, layout=layout,
                    dtype=BF16, causal=True), **SM90)  # fmt: skip
    check(FlashCase(lengths=((9, 20), (20, 3)), heads_q=2, heads_k=1, layout=layout, dtype=FP16),
          **SM90)  # fmt: skip


@pytest.mark.parametrize("dim", ["batch", "heads", "rows"])
def test_broadcast_tensors(dim: str) -> None:
    inputs = FlashCase(batch=2, seqlen_q=150, seqlen_k=140, heads_q=2, heads_k=2, dtype=BF16).make()
    axis = {"batch": 0, "rows": 1, "heads": 2}[dim]
    parts = {n: getattr(inputs, n).narrow(axis, 0, 1).expand_as(getattr(inputs, n)) for n in "qkv"}
    whole = {n: x.contiguous() for n, x in parts.items()}
    assert_same(inputs.with_(**parts).forward("emulated90"),
                inputs.with_(**whole).forward("emulated90"))  # fmt: skip


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    # 33 rows alone are packed with the other head, beside 200 rows they are not
    inputs = FlashCase(lengths=((33, 40), (200, 170), (20, 20)), heads_q=2, heads_k=1, causal=True,
                       dtype=BF16).make()  # fmt: skip
    whole = inputs.forward("emulated90")
    alone = inputs.with_(
        q=inputs.q[:33], k=inputs.k[:40], v=inputs.v[:40],
        cu_seqlens_q=torch.tensor([0, 33], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 40], dtype=torch.int32),
    ).forward("emulated90")  # fmt: skip
    assert_same(alone, {"out": whole["out"][:33], "lse": whole["lse"][:, :33]})


def test_low_part_of_the_output() -> None:
    # zero logits: P is exact, so out + out_lo is the fp32 output to u16^2
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=24, dtype=BF16).make()
    q, v = torch.zeros_like(inputs.q), inputs.v
    out, low = torch.empty_like(q), torch.empty_like(q)
    p = FlashParams(None, None, None, None, None, 20, 24, 1.0, -1, -1, 0.0)
    flash.fwd_sm90(q, inputs.k, v, p, out, torch.empty(1, 2, 20), low)
    want = v.double().mean(1, keepdim=True).expand_as(out)
    assert ((out.double() - want).abs() > 2.0**-14 * want.abs()).any()
    assert ((out.double() + low.double() - want).abs() <= 2.0**-15 * want.abs() + 1e-6).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("key", [269, 33])
def test_hidden_future_keys(name: str, value: float, key: int) -> None:
    # causal; rows before the bad key are bitwise what they were, the others get what IEEE says
    inputs = FlashCase(batch=1, seqlen_q=270, seqlen_k=270, heads_q=1, heads_k=1, causal=True,
                       dtype=(BF16, FP16)[name == "k"]).make()  # fmt: skip
    want = inputs.forward("emulated90")
    bad = getattr(inputs, name).clone()
    bad[0, key] = value
    got = inputs.with_(**{name: bad}).forward("emulated90")
    assert_same({"x": got["out"][:, :key]}, {"x": want["out"][:, :key]})
    assert_same({"x": got["lse"][..., :key]}, {"x": want["lse"][..., :key]})
    if math.isnan(value):
        assert got["out"][:, key:].isnan().all()
    elif name == "v":
        assert (got["out"][:, key:] == value).all()


@pytest.mark.parametrize("options", [
    {"used": (37, 164), "seqlen_q": 20, "causal": True},
    {"used": (0, 131), "seqlen_q": 140, "window": (9, 4)},
    {"used": (20, 5), "lengths": ((9, 133), (40, 6)), "causal": True},
], ids=["rows", "window", "varlen"])  # fmt: skip
def test_slots_past_the_used_keys(options: dict[str, Any]) -> None:
    # loaded with their tiles, and still bitwise nothing
    inputs = FlashCase(seqlen_k=165, heads_q=2, heads_k=1, dtype=BF16, **options).make()
    used = inputs.options["seqused_k"].tolist()  # type: ignore[union-attr]
    want = inputs.forward("emulated90")
    k, v = inputs.k.clone(), inputs.v.clone()
    for x in (k, v):
        for b in range(2):
            if x.dim() == 4:
                x[b, used[b] :] = math.nan
            else:
                start, stop = inputs.options["cu_seqlens_k"].tolist()[b : b + 2]
                x[start + used[b] : stop] = math.nan
    assert_same(inputs.with_(k=k, v=v).forward("emulated90"), want)


def test_huge_finite_logits() -> None:
    inputs = FlashCase(batch=1, seqlen_q=9, seqlen_k=140, spread=1e18, causal=True,
                       dtype=BF16).make()  # fmt: skip
    got = inputs.with_(k=inputs.k * 1e18).forward("emulated90")
    assert got["out"].isfinite().all()
    assert got["lse"].isfinite().all()
