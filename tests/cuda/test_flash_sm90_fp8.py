"""The fp8 forward for sm_90a, within the bounds of a bf16 call on the dequantised tensors, under
the emulator: Q, K, V and P in e4m3, P as two terms.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge._params import FLOAT8
from attnforge.backends.cuda.flash import FP8_DIMS
from attnforge.testing.cases import LAYOUTS, FlashCase, FlashInputs, Layout
from attnforge.testing.compare import assert_same, compare

pytestmark = pytest.mark.usefixtures("twin")


def make(**options: Any) -> FlashInputs:
    return FlashCase(**{"batch": 1, "heads_q": 1, "heads_k": 1, "dtype": FLOAT8, **options}).make()


def check(inputs: FlashInputs) -> None:
    got = inputs.forward("emulated90")
    compare(got, inputs.truth(False, rounded=True), inputs.context).check()


@pytest.mark.parametrize(("d", "dv"), [*FP8_DIMS, (48, 16), (80, 128), (192, 128), (16, 208)])
def test_every_kernel(d: int, dv: int) -> None:
    # more tiles of keys than stages, edges and tails
    keys = 3 * (64 if max(d, dv) > 128 else 128) + 7
    check(make(seqlen_q=130, seqlen_k=keys, head_dim=d, v_head_dim=dv, causal=True,
               mods=("descale",)))  # fmt: skip


FEATURES: dict[str, dict[str, Any]] = {
    "descale_per_head": {"mods": ("descale:b",)},
    "descale_one": {"mods": ("descale:one",)},
    "descale_of_keys": {"mods": ("descale:kv",), "causal": True},
    "softcap": {"softcap": 15.0, "spread": 3.0, "mods": ("descale",)},
    "alibi_batch": {"alibi": "batch"},
    "sinks_mixed": {"sinks": "mixed", "causal": True, "mods": ("descale",)},
    "negative_scale": {"softmax_scale": -0.25, "causal": True},
    "used": {"used": (0, 141), "causal": True},
    "window": {"window": (20, 5)},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (150, 33), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3, "mods": ("descale",)},
    "v_mean": {"v_mean": 3.0},
    "peaky": {"spread": 8.0},
    "fp16_out": {"mods": ("out:float16",)},
    "fp32_out": {"mods": ("out:float32", "descale")},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    check(make(**{"batch": 2, "seqlen_q": 140, "seqlen_k": 152, "heads_q": 2, "head_dim": 32,
                  **FEATURES[name]}))  # fmt: skip


LENGTHS = [(1, 1), (1, 70), (65, 33), (128, 128), (129, 257), (200, 129)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_lengths(sq: int, sk: int, causal: bool) -> None:
    check(make(seqlen_q=sq, seqlen_k=sk, head_dim=16, causal=causal))


@pytest.mark.parametrize(("hq", "hk"), [(3, 1), (8, 2), (5, 1)])
@pytest.mark.parametrize("rows", [1, 20])
def test_groups_share_tiles(hq: int, hk: int, rows: int) -> None:
    check(make(seqlen_q=rows, seqlen_k=150, heads_q=hq, heads_k=hk, head_dim=64, causal=True,
               alibi="head", sinks="normal", mods=("descale",)))  # fmt: skip


def test_pieces_of_work_follow_each_other() -> None:
    # 2 tiles x 6 pairs on three blocks
    check(make(batch=2, seqlen_q=140, seqlen_k=260, heads_q=3, head_dim=64, causal=True))


VARLEN: dict[str, dict[str, Any]] = {
    "mixed": {"lengths": ((5, 9), (0, 3), (140, 133), (1, 1), (3, 0)), "mods": ("descale",)},
    "all_keys_empty": {"lengths": ((4, 0), (9, 0))},
    "used": {"lengths": ((5, 9), (0, 3), (40, 33)), "used": (9, 0, 20)},
}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen(name: str) -> None:
    check(make(heads_q=2, causal=True, **VARLEN[name]))


@pytest.mark.parametrize("sizes", [
    {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_k": 0, "sinks": "normal"},
], ids=str)  # fmt: skip
def test_nothing_to_attend_to(sizes: dict[str, Any]) -> None:
    check(make(**{"seqlen_q": 5, "seqlen_k": 7, "causal": True, **sizes}))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "offset"])
def test_layouts(layout: Layout) -> None:
    check(make(batch=2, seqlen_q=18, seqlen_k=20, heads_q=2, layout=layout, causal=True))


def code(x: Tensor, place: Any, bits: int) -> Tensor:
    """A copy with a code at a place."""
    bytes_of = x.clone().view(torch.uint8)
    bytes_of[place] = bits
    return bytes_of.view(FLOAT8)


def test_every_code() -> None:
    v = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).view(FLOAT8)
    q = k = torch.zeros(1, 1, 1, 16).to(FLOAT8)
    with torch.no_grad():
        out = attnforge.flash_attention(q, k, v, out_dtype=torch.float32, backend="emulated90")
    assert torch.equal(out.nan_to_num(-1.0), v.float().nan_to_num(-1.0))


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("key", [139, 33])
def test_hidden_future_keys(name: str, key: int) -> None:
    # causal; rows before the bad key are bitwise what they were, the others are NaN
    inputs = make(seqlen_q=140, seqlen_k=140, causal=True, head_dim=32)
    want = inputs.forward("emulated90")
    bad = code(getattr(inputs, name), (0, key), 0xFF)
    got = inputs.with_(**{name: bad}).forward("emulated90")
    assert_same({"x": got["out"][:, :key]}, {"x": want["out"][:, :key]})
    assert_same({"x": got["lse"][..., :key]}, {"x": want["lse"][..., :key]})
    assert got["out"][:, key:].isnan().all()


def test_a_channel_of_nan_stays_in_its_column() -> None:
    inputs = make(seqlen_q=9, seqlen_k=40, head_dim=32, causal=True)
    want = inputs.forward("emulated90")["out"]
    for channel in (0, 1, 7, 18, 31):
        v = code(inputs.v, (0, 36, 0, channel), 0x7F)
        got = inputs.with_(v=v).forward("emulated90")["out"]
        rest = [c for c in range(32) if c != channel]
        assert_same({"x": got[..., rest]}, {"x": want[..., rest]})
        assert_same({"x": got[:, :5]}, {"x": want[:, :5]})  # row 5 stands at key 36
        assert got[:, 5:, :, channel].isnan().all()


def test_slots_past_the_used_keys() -> None:
    # loaded with their tiles, and still bitwise nothing
    inputs = make(batch=2, seqlen_q=20, seqlen_k=165, used=(37, 164), causal=True)
    want = inputs.forward("emulated90")
    k, v = inputs.k, inputs.v
    for b, used in enumerate((37, 164)):
        k, v = (code(x, (b, slice(used, None)), 0x7F) for x in (k, v))
    assert_same(inputs.with_(k=k, v=v).forward("emulated90"), want)


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    inputs = make(lengths=((33, 40), (130, 170)), heads_q=2, causal=True)
    whole = inputs.forward("emulated90")
    alone = inputs.with_(
        q=inputs.q[:33], k=inputs.k[:40], v=inputs.v[:40],
        cu_seqlens_q=torch.tensor([0, 33], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 40], dtype=torch.int32),
    ).forward("emulated90")  # fmt: skip
    assert_same(alone, {"out": whole["out"][:33], "lse": whole["lse"][:, :33]})


def test_small_weights_count() -> None:
    # 256 keys of weight 2^-8 beside one of weight 1: half of the output is theirs
    keys = 257
    q = torch.ones(1, 1, 1, 16).to(FLOAT8)
    k = torch.zeros(1, keys, 1, 16)
    k[0, 0] = math.log(256.0) / 16
    k = k.to(FLOAT8)
    v = torch.zeros(1, keys, 1, 16)
    v[0, 1:] = 1.0
    inputs = make(seqlen_q=1, seqlen_k=keys, softmax_scale=1.0).with_(q=q, k=k, v=v.to(FLOAT8))
    check(inputs)
    assert inputs.forward("emulated90")["out"].mean() > 0.4


def test_what_it_cannot_serve_goes_elsewhere() -> None:
    def why(**options: Any) -> str:
        inputs = make(head_dim=32, **options)
        with pytest.raises(ValueError, match="emulated90") as error:
            inputs.forward("emulated90")
        return str(error.value)

    assert "q is wider than k and v" in why(q_dtype=torch.bfloat16)
    assert "key_bias" in why(mods=("key_bias",))
    assert "head_dim 24 is not served" in str(
        attnforge.explain(attnforge.flash_attention, *[(1, 9, 1, 24)] * 3, dtype="fp8",
                          device="cuda:sm_90")
    )  # fmt: skip
