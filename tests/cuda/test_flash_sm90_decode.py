"""The decode for sm_90a within the bounds of the float64 truth, under the emulator.

Every launch has another random schedule. Tiles have 64 rows, and 64 or 32 keys.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnforge.backends.cuda.flash import DECODE_DIMS
from attnforge.testing.cases import LAYOUTS, FlashCase, FlashInputs, Layout
from attnforge.testing.compare import assert_same, compare

pytestmark = pytest.mark.usefixtures("twin")

BF16, FP16 = torch.bfloat16, torch.float16
LATENT = DECODE_DIMS[-1]


def decode(**options: Any) -> FlashInputs:
    options = {"batch": 1, "seqlen_q": 1, "causal": True, "dtype": BF16, **options}
    return FlashCase(decode=True, **options).make()


def latent(**options: Any) -> FlashInputs:
    """V is the first channels of K."""
    d, dv = LATENT
    inputs = decode(**{"head_dim": d, "v_head_dim": dv, "heads_k": 1, **options})
    return inputs.with_(v=inputs.k[..., : inputs.v.shape[-1]])


def check(inputs: FlashInputs, **more: Any) -> None:
    got = inputs.forward("emulated90", **more)
    compare(got, inputs.truth(False, rounded=True), inputs.context).check()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("d", "dv"), DECODE_DIMS)
def test_every_kernel(d: int, dv: int, dtype: torch.dtype) -> None:
    # more tiles of keys than stages
    keys = {64: 7, 128: 4, 192: 3}.get(d, 3 if d == 256 else 2) * 64 + 7
    check(decode(seqlen_q=2, seqlen_k=keys, heads_q=5, heads_k=1, head_dim=d, v_head_dim=dv,
                 dtype=dtype, softcap=9.0, alibi="head"))  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_latent(dtype: torch.dtype, rows: int) -> None:
    # two tiles of rows where there are three queries
    check(latent(seqlen_q=rows, seqlen_k=3 * 64 + 9, heads_q=24, dtype=dtype))


@pytest.mark.parametrize("d", [(512, 512), (320, 256), (256, 264), (64, 320)], ids=str)
def test_long_rows(d: tuple[int, int]) -> None:
    check(decode(seqlen_q=2, seqlen_k=70, heads_q=3, heads_k=1, head_dim=d[0], v_head_dim=d[1]))


def test_a_latent_of_other_widths() -> None:
    check(latent(seqlen_k=70, heads_q=3, head_dim=320, v_head_dim=256))


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "alibi_batch": {"alibi": "batch"},
    "sinks_mixed": {"sinks": "mixed"},
    "window": {"window": (20, 0)},
    "full": {"causal": False},
    "window_both": {"causal": False, "window": (5, 3)},
    "zero_scale": {"softmax_scale": 0.0},
    "negative_scale": {"softmax_scale": -0.25},
    "used": {"used": (0, 141)},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (150, 33),
            "window": (20, 0), "softmax_scale": 0.3},
    "peaky": {"spread": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, splits: int) -> None:
    check(decode(**{"batch": 2, "seqlen_q": 3, "seqlen_k": 152, "heads_q": 6, "heads_k": 2,
                    "head_dim": 24, **FEATURES[name]}), num_splits=splits)  # fmt: skip


@pytest.mark.parametrize(("hq", "hk"), [(1, 1), (3, 1), (5, 1), (14, 2), (71, 1)])
@pytest.mark.parametrize("rows", [1, 13])
def test_groups_share_tiles(hq: int, hk: int, rows: int) -> None:
    # odd groups; tiles that begin and end inside of a query's heads
    check(decode(seqlen_q=rows, seqlen_k=70, heads_q=hq, heads_k=hk, alibi="head", sinks="normal"))


@pytest.mark.parametrize("splits", [1, 3, 4])
def test_splits(splits: int) -> None:
    # of 200 keys in tiles of 64: an empty last split, and sequences that end before some
    check(decode(batch=4, seqlen_q=2, seqlen_k=200, heads_q=4, heads_k=1, head_dim=64,
                 used=(0, 1, 65, 200), sinks="normal"), num_splits=splits)  # fmt: skip


def test_default_splits() -> None:
    check(decode(seqlen_k=2048 + 70, heads_q=3, heads_k=1, sinks="normal"))


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128])
def test_ends_of_tiles(keys: int) -> None:
    check(decode(seqlen_q=1, seqlen_k=keys, heads_q=2, heads_k=1, head_dim=96))


@pytest.mark.parametrize("sizes", [
    {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_k": 0, "sinks": "normal"},
    {"batch": 2, "used": (0, 0), "sinks": "mixed"},
], ids=str)  # fmt: skip
def test_nothing_to_attend_to(sizes: dict[str, Any]) -> None:
    check(decode(**{"seqlen_q": 2, "seqlen_k": 7, **sizes}))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(0, 2), st.lists(st.integers(0, 130),
    min_size=1, max_size=3), st.sampled_from([8, 40, 72]), st.integers(-1, 80), st.booleans(),
)  # fmt: skip
def test_shapes(
    rows: int, group: int, splits: int, used: list[int], d: int, left: int, causal: bool
) -> None:
    inputs = decode(batch=len(used), seqlen_q=rows, seqlen_k=130, heads_q=2 * group, heads_k=2,
                    head_dim=d, used=tuple(used), window=(left, -1), causal=causal)  # fmt: skip
    check(inputs, num_splits=splits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Layout) -> None:
    check(decode(batch=2, seqlen_q=2, seqlen_k=70, heads_q=4, heads_k=2, layout=layout))


@pytest.mark.parametrize("layout", ["heads_first", "offset", "last_stride_2", "expanded"])
def test_layouts_of_a_latent(layout: Layout) -> None:
    # a copy keeps V inside K
    check(latent(batch=2, seqlen_k=40, heads_q=3, layout=layout))


@pytest.mark.parametrize("dim", ["batch", "heads", "rows"])
def test_broadcast_tensors(dim: str) -> None:
    inputs = decode(batch=2, seqlen_q=2, seqlen_k=70, heads_q=2, heads_k=2)
    axis = {"batch": 0, "rows": 1, "heads": 2}[dim]
    parts = {n: getattr(inputs, n).narrow(axis, 0, 1).expand_as(getattr(inputs, n)) for n in "qkv"}
    whole = {n: x.contiguous() for n, x in parts.items()}
    assert_same(inputs.with_(**parts).forward("emulated90"),
                inputs.with_(**whole).forward("emulated90"))  # fmt: skip


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    # the same splits and tiles, whatever its neighbours and the cache's size
    inputs = decode(batch=3, seqlen_q=2, seqlen_k=2300, heads_q=3, heads_k=1,
                    used=(2150, 40, 700))  # fmt: skip
    whole = inputs.forward("emulated90")
    for b, used in enumerate((2150, 40, 700)):
        alone = inputs.with_(
            **{n: getattr(inputs, n)[b : b + 1] for n in "qkv"},
            cache_seqlens=torch.tensor([used], dtype=torch.int32),
        )
        assert_same(alone.forward("emulated90"), {n: x[b : b + 1] for n, x in whole.items()})


def test_schedules_change_no_bit() -> None:
    inputs = decode(batch=2, seqlen_q=2, seqlen_k=150, heads_q=3, heads_k=1, used=(150, 77))
    want = inputs.forward("emulated90", num_splits=2)
    for _ in range(3):
        assert_same(inputs.forward("emulated90", num_splits=2), want)


def poisoned(x: Tensor, used: list[int]) -> Tensor:
    x = x.clone()
    for b, n in enumerate(used):
        x[b, n:] = math.nan
    return x


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", ["apart", "latent"])
def test_slots_past_the_used_keys(kind: str, splits: int) -> None:
    # loaded with their tiles, and still bitwise nothing
    used, shape = [37, 164], {"batch": 2, "seqlen_q": 2, "seqlen_k": 200, "heads_q": 3}
    make = latent if kind == "latent" else decode
    inputs = make(**shape, heads_k=1, used=tuple(used))
    want = inputs.forward("emulated90", num_splits=splits)
    k = poisoned(inputs.k, used)
    v = k[..., : inputs.v.shape[-1]] if kind == "latent" else poisoned(inputs.v, used)
    assert_same(inputs.with_(k=k, v=v).forward("emulated90", num_splits=splits), want)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("d", [(64, 64), (320, 320)], ids=str)
def test_hidden_future_values(d: tuple[int, int], value: float) -> None:
    # causal: the last row alone sees the last key
    inputs = decode(seqlen_q=2, seqlen_k=70, heads_q=1, heads_k=1, head_dim=d[0],
                    v_head_dim=d[1])  # fmt: skip
    want = inputs.forward("emulated90")
    v = inputs.v.clone()
    v[0, 69] = value
    got = inputs.with_(v=v).forward("emulated90")
    assert_same({"x": got["out"][:, :1]}, {"x": want["out"][:, :1]})
    assert_same({"x": got["lse"]}, {"x": want["lse"]})
    seen = got["out"][:, 1:]
    assert seen.isnan().all() if math.isnan(value) else (seen == value).all()


def test_hidden_future_keys_of_a_latent() -> None:
    inputs = latent(seqlen_q=2, seqlen_k=70, heads_q=2)
    want = inputs.forward("emulated90")
    k = inputs.k.clone()
    k[0, 69, :, 100] = math.nan
    got = inputs.with_(k=k, v=k[..., :512]).forward("emulated90")
    assert_same({n: x[:, :1] for n, x in got.items() if n == "out"}, {"out": want["out"][:, :1]})
    assert got["out"][:, 1:].isnan().all()


def test_a_latent_and_v_apart() -> None:
    # kernels of their own, whose tiles differ
    inputs = latent(seqlen_k=100, heads_q=4)
    apart = inputs.with_(v=inputs.v.clone())
    check(apart)
    check(inputs)


def test_huge_finite_logits() -> None:
    inputs = decode(seqlen_q=2, seqlen_k=140, heads_q=2, heads_k=1, spread=1e18)
    got = inputs.with_(k=inputs.k * 1e18).forward("emulated90")
    assert got["out"].isfinite().all()
    assert got["lse"].isfinite().all()
