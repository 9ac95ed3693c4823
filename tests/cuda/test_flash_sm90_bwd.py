"""The backward for sm_90a within the bounds of the float64 truth, under the emulator.

Every launch has another random schedule.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge.registry import Request
from attnforge.registry.select import decide
from attnforge.testing.cases import LAYOUTS, FlashCase, FlashInputs, Layout
from attnforge.testing.compare import assert_same

pytestmark = pytest.mark.usefixtures("twin")

BF16, FP16 = torch.bfloat16, torch.float16
SM90: dict[str, Any] = {"backend": "emulated90"}


def run(inputs: FlashInputs) -> dict[str, Tensor]:
    return inputs.run("emulated90")


@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("d", [64, 128])
def test_every_kernel(check: Any, d: int, dtype: torch.dtype, features: bool) -> None:
    # more tiles of rows and of keys than there are stages; edges and tails of both
    more: dict[str, Any] = {"softcap": 8.0, "alibi": "head"} if features else {}
    check(FlashCase(batch=1, seqlen_q=100, seqlen_k=3 * 128 + 7, heads_q=2, heads_k=1, head_dim=d,
                    causal=True, dtype=dtype, **more), **SM90)  # fmt: skip


@pytest.mark.parametrize(("d", "dv"), [(8, 8), (24, 56), (64, 72), (96, 96), (128, 40)])
def test_head_dims_are_padded(check: Any, d: int, dv: int) -> None:
    check(FlashCase(batch=1, seqlen_q=70, seqlen_k=90, heads_q=1, heads_k=1, head_dim=d,
                    v_head_dim=dv, causal=True, dtype=BF16), **SM90)  # fmt: skip


LENGTHS = [(1, 1), (1, 70), (65, 33), (96, 128), (129, 257), (150, 47)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_lengths(check: Any, sq: int, sk: int, causal: bool) -> None:
    # causal with more rows than keys: the first rows see nothing
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=1, heads_k=1, head_dim=24,
                    causal=causal, dtype=(BF16, FP16)[(sq + causal) % 2]), **SM90)  # fmt: skip


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "alibi_batch": {"alibi": "batch"},
    "sinks_mixed": {"sinks": "mixed", "causal": True},
    "negative_scale": {"softmax_scale": -0.25, "causal": True},
    "zero_scale": {"softmax_scale": 0.0, "causal": True},
    "used": {"used": (0, 141), "causal": True},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (150, 33), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3},
    "out_gradient_alone": {"lse_grad": False},
    "peaky": {"spread": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(check: Any, name: str) -> None:
    check(FlashCase(**{"seqlen_q": 90, "seqlen_k": 152, "heads_q": 2, "heads_k": 1,
                       "head_dim": 24, "dtype": BF16, **FEATURES[name]}), **SM90)  # fmt: skip


WINDOWS = [(0, 0), (20, 0), (1023, 0), (-1, 17), (130, 5), (0, -1), (1 << 40, 2)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}_{w[1]}")
def test_windows(check: Any, window: tuple[int, int]) -> None:
    check(FlashCase(batch=1, seqlen_q=130, seqlen_k=260, heads_q=1, heads_k=1, window=window,
                    dtype=BF16), **SM90)  # fmt: skip


@pytest.mark.parametrize(("hq", "hk"), [(3, 1), (6, 2), (5, 5), (8, 1)])
def test_groups(check: Any, hq: int, hk: int) -> None:
    # stages go on from head to head of a group
    check(FlashCase(batch=1, seqlen_q=40, seqlen_k=60, heads_q=hq, heads_k=hk, causal=True,
                    alibi="head", sinks="normal", dtype=BF16), **SM90)  # fmt: skip


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
                    grad_layout=layout, dtype=BF16, causal=True), **SM90)  # fmt: skip
    check(FlashCase(lengths=((9, 20), (20, 3)), heads_q=2, heads_k=1, layout=layout,
                    grad_layout=layout, dtype=FP16), **SM90)  # fmt: skip


@pytest.mark.parametrize("dim", ["batch", "rows", "heads", "all"])
def test_broadcast_tensors(dim: str) -> None:
    inputs = FlashCase(batch=2, seqlen_q=50, seqlen_k=40, heads_q=2, heads_k=2, dtype=BF16).make()
    axes = {"batch": [0], "rows": [1], "heads": [2], "all": [0, 1, 2]}[dim]
    parts = {}
    for name in ("q", "k", "v", "dout"):
        whole = part = getattr(inputs, name)
        for axis in axes:
            part = part.narrow(axis, 0, 1)
        parts[name] = part.expand_as(whole)
    copies = {name: x.contiguous() for name, x in parts.items()}
    assert_same(run(inputs.with_(**parts)), run(inputs.with_(**copies)))


@pytest.mark.parametrize("d", [64, 128])
def test_same_bits_under_every_schedule(d: int) -> None:
    inputs = FlashCase(batch=1, seqlen_q=100, seqlen_k=140, heads_q=2, heads_k=1, head_dim=d,
                       causal=True, dtype=BF16).make()  # fmt: skip
    first = run(inputs)
    for _ in range(2):
        assert_same(run(inputs), first)


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    inputs = FlashCase(lengths=((33, 40), (200, 170), (20, 20)), heads_q=2, heads_k=1, causal=True,
                       lse_grad=False, dtype=BF16).make()  # fmt: skip
    whole = run(inputs)
    alone = run(inputs.with_(
        q=inputs.q[:33], k=inputs.k[:40], v=inputs.v[:40], dout=inputs.dout[:33],
        cu_seqlens_q=torch.tensor([0, 33], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 40], dtype=torch.int32),
    ))  # fmt: skip
    part = {n: whole[n][:33] for n in ("out", "dq")} | {n: whole[n][:40] for n in ("dk", "dv")}
    assert_same(alone, {**part, "lse": whole["lse"][:, :33]})


def changed(inputs: FlashInputs, name: str, place: object, value: float) -> FlashInputs:
    x = getattr(inputs, name).clone()
    x[place] = value
    return inputs.with_(**{name: x})


@pytest.mark.parametrize(("name", "key", "value"), [
    ("k", 149, math.nan), ("k", 33, math.inf), ("v", 149, math.inf), ("v", 33, math.nan),
])  # fmt: skip
def test_rows_that_do_not_see_a_bad_key(name: str, key: int, value: float) -> None:
    # causal; rows before the bad key have bitwise the same dQ
    inputs = FlashCase(batch=1, seqlen_q=150, seqlen_k=150, heads_q=1, heads_k=1, causal=True,
                       dtype=(BF16, FP16)[name == "k"]).make()  # fmt: skip
    want, got = run(inputs), run(changed(inputs, name, (0, key), value))
    assert_same({"dq": got["dq"][:, :key]}, {"dq": want["dq"][:, :key]})
    assert got["dq"][:, key:].isnan().any(-1).all()


@pytest.mark.parametrize(("name", "row", "value"), [
    ("q", 20, math.nan), ("q", 130, math.inf), ("dout", 20, math.inf), ("dout", 130, math.nan),
])  # fmt: skip
def test_keys_that_a_bad_row_does_not_see(name: str, row: int, value: float) -> None:
    # a bad row of a causal call reaches keys up to its own place
    inputs = FlashCase(batch=1, seqlen_q=150, seqlen_k=150, heads_q=2, heads_k=1, causal=True,
                       dtype=BF16).make()  # fmt: skip
    want, got = run(inputs), run(changed(inputs, name, (0, row, 1), value))
    for part in ("dk", "dv"):
        assert_same({part: got[part][:, row + 1 :]}, {part: want[part][:, row + 1 :]})
        assert not got[part][:, : row + 1].isfinite().all(-1).any(), part
    others = [r for r in range(150) if r != row]
    assert_same({"dq": got["dq"][:, others]}, {"dq": want["dq"][:, others]})
    assert_same({"dq": got["dq"][:, :, 0]}, {"dq": want["dq"][:, :, 0]})


def test_infinity_in_a_visible_gradient() -> None:
    # a partly hidden tile adds back what it set to 0: column 5 of dV, of keys that the row sees
    inputs = FlashCase(batch=1, seqlen_q=70, seqlen_k=70, heads_q=1, heads_k=1, causal=True,
                       lse_grad=False, dtype=BF16).make()  # fmt: skip
    want, got = run(inputs), run(changed(inputs, "dout", (0, 40, 0, 5), math.inf))
    assert (got["dv"][:, :41, :, 5] == math.inf).all()
    rest = [c for c in range(16) if c != 5]
    assert_same({"dv": got["dv"][..., rest]}, {"dv": want["dv"][..., rest]})


@pytest.mark.parametrize("options", [
    {"used": (37, 164), "seqlen_q": 20, "causal": True},
    {"used": (0, 131), "seqlen_q": 140, "window": (9, 4)},
    {"used": (20, 5), "lengths": ((9, 133), (40, 6)), "causal": True},
], ids=["rows", "window", "varlen"])  # fmt: skip
def test_slots_past_the_used_keys(options: dict[str, Any]) -> None:
    # loaded with their tiles, and still bitwise nothing; their own gradients are 0
    inputs = FlashCase(seqlen_k=165, heads_q=2, heads_k=1, dtype=BF16, **options).make()
    used = inputs.options["seqused_k"].tolist()  # type: ignore[union-attr]

    def tail(x: Tensor, b: int) -> Tensor:
        if x.dim() == 4:
            return x[b, used[b] :]
        start, stop = inputs.options["cu_seqlens_k"].tolist()[b : b + 2]
        return x[start + used[b] : stop]

    k, v = inputs.k.clone(), inputs.v.clone()
    for b in range(2):
        tail(k, b).fill_(math.nan)
        tail(v, b).fill_(math.nan)
    want, got = run(inputs), run(inputs.with_(k=k, v=v))
    assert_same(got, want)
    assert not any(tail(got[name], b).any() for b in range(2) for name in ("dk", "dv"))


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (8, 128), (136, 128), (64, 192), (12, 64)])
def test_who_serves_a_call(d: int, dv: int) -> None:
    request = Request("flash_bwd", "cpu", "", BF16, (("head_dim", d), ("v_head_dim", dv)))
    decision = decide(request, "emulated90")
    if d % 8 == 0 and max(d, dv) <= 128:
        assert decision.chosen is not None
    else:
        assert decision.chosen is None
        reasons = [" ".join(why) for spec, why in decision.rejected if spec.id.endswith(".sm90")]
        assert any("head_dim" in why and "8..128" in why for why in reasons), reasons
