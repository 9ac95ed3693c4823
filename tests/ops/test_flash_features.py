"""Features of single scores against the float64 truth: each alone, in every form, and together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import compare

pytestmark = pytest.mark.thinned(3)

MASKS = ("windows", "prefix", "segments", "mask", "mask:b", "mask:h", "mask:bh", "mask:tree",
         "mask:treebh")  # fmt: skip
BIASES = ("key_bias", "key_bias:b", "key_bias:h", "key_bias:bh", "bias", "bias:b", "bias:h",
          "bias:bh", "bias:w", "bias:bhw", "rel_bias", "rel_bias:h", "rel_bias:0", "rel_bias:100",
          "rel_bias:400h", "log_forget", "log_forget:h")  # fmt: skip
OTHERS = ("row_scale", "row_scale:b", "row_scale:bh", "dropout", "rope", "rope:interleaved",
          "rope:part", "rope:part-interleaved", "rope:at", "rope:atb", "rope:heads-at")  # fmt: skip
SCORE_FNS = tuple(f"score_fn:{f}" for f in ("sigmoid", "relu", "softplus", "signed_softmax"))
EVERY = (*MASKS, *BIASES, *OTHERS, *SCORE_FNS)
# Packed calls take all but mask and bias; a packed tensor has no batch to broadcast over.
PACKED = tuple(x for x in EVERY if not x.startswith(("mask", "bias")) and x != "rope:atb")


def check(case: FlashCase, target: Target) -> None:
    inputs = case.make()
    if case.decode:
        compare(inputs.forward(target.backend), inputs.truth(grad=False), inputs.context).check()
    else:
        compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


@pytest.mark.parametrize("mod", EVERY)
def test_alone(target: Target, mod: str) -> None:
    check(FlashCase(seqlen_q=70, seqlen_k=131, heads_q=4, heads_k=2, mods=(mod,)), target)


@pytest.mark.parametrize("mod", EVERY)
def test_alone_in_16_bits(level: Target, mod: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        case = FlashCase(seqlen_q=51, seqlen_k=70, heads_q=2, heads_k=1, dtype=dtype, mods=(mod,))
        check(case, level)


@pytest.mark.parametrize("mod", PACKED)
def test_packed(target: Target, mod: str) -> None:
    lengths = ((40, 60), (3, 9), (0, 5), (7, 0), (65, 40))
    check(FlashCase(lengths=lengths, heads_q=4, heads_k=2, mods=(mod,)), target)
    used = (50, 9, 0, 0, 11)
    check(FlashCase(lengths=lengths, heads_q=2, heads_k=2, used=used, mods=(mod,)), target)


@pytest.mark.parametrize("mod", EVERY)
def test_decode(target: Target, mod: str) -> None:
    for rows, dtype in ((1, torch.float32), (3, torch.bfloat16)):
        case = FlashCase(seqlen_q=rows, seqlen_k=150, heads_q=6, heads_k=2, dtype=dtype,
                         used=(150, 37), decode=True, mods=(mod,))  # fmt: skip
        check(case, target)


@pytest.mark.parametrize("mod", EVERY)
def test_tails(level: Target, mod: str) -> None:
    """Every length around a vector, a panel and a tile; also rows few enough for decode."""
    for n in (*range(1, 20), 31, 33, 47, 49, 63, 64, 65, 70):
        check(FlashCase(batch=1, seqlen_q=(n * 7) % 53 + 1, seqlen_k=n, head_dim=8, mods=(mod,)),
              level)  # fmt: skip


@pytest.mark.parametrize(
    "mods",
    [
        ("mask", "segments", "windows"),
        ("key_bias:b", "bias:h", "rel_bias", "log_forget:h", "row_scale"),
        ("rope:heads-at", "row_scale", "dropout", "mask:b", "bias"),
        ("score_fn:signed_softmax", "dropout", "rel_bias", "rope"),
        ("score_fn:softplus", "mask:tree", "key_bias", "row_scale:b"),
        ("score_fn:sigmoid", "segments", "bias:bh", "log_forget"),
        ("score_fn:relu", "dropout", "prefix", "rope:part-interleaved"),
    ],
    ids=lambda m: "+".join(m),
)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_together(target: Target, mods: tuple[str, ...], softcap: float) -> None:
    case = FlashCase(seqlen_q=130, seqlen_k=200, heads_q=4, heads_k=2, alibi="head", mods=mods,
                     softcap=softcap, used=(200, 77))  # fmt: skip
    check(case, target)


def _one_of(names: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.sampled_from(("", *names))


@st.composite
def cases(draw: st.DrawFn, kind: str) -> FlashCase:
    names = EVERY if kind != "packed" else PACKED
    masks = [n for n in MASKS if n in names and n not in ("prefix", "windows")]
    groups = [draw(_one_of(tuple(masks)))]
    for prefix in ("key_bias", "bias", "rel_bias", "log_forget", "row_scale", "rope", "dropout",
                   "score_fn"):  # fmt: skip
        if draw(st.integers(0, 2)) == 0:
            groups.append(draw(_one_of(tuple(n for n in names if n.partition(":")[0] == prefix))))
    groups.append(draw(_one_of(("prefix", "windows"))))
    mods = tuple(dict.fromkeys(n for n in groups if n))
    if "log_forget" in "".join(mods):  # causal: the union with a prefix would look ahead of gates
        mods = tuple(n for n in mods if n not in ("prefix",))
    normal = not any(n.startswith("score_fn") for n in mods)
    heads_k = draw(st.integers(1, 3))
    fields: dict[str, Any] = {
        "heads_k": heads_k,
        "heads_q": heads_k * draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([8, 16, 24, 40, 64])),
        "v_head_dim": draw(st.sampled_from([None, 8, 72])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "alibi": draw(st.sampled_from(["", "", "head"])),
        "sinks": draw(st.sampled_from(["", "normal", "mixed"])) if normal else "",
        "mods": mods,
        "seed": draw(st.integers(0, 99)),
    }
    lengths = st.integers(0, 130)
    if kind == "packed":
        pairs = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
        fields["lengths"] = tuple(pairs)
        if draw(st.booleans()):
            fields["used"] = tuple(draw(st.integers(0, keys)) for _, keys in pairs)
        return FlashCase(**fields)
    keys = draw(lengths)
    batch = draw(st.integers(1, 3))
    rows = draw(st.integers(1, 4)) if kind == "decode" else draw(lengths)
    fields |= {"batch": batch, "seqlen_q": rows, "seqlen_k": keys, "decode": kind == "decode"}
    if kind == "decode" or draw(st.booleans()):
        fields["used"] = tuple(draw(st.integers(0, keys)) for _ in range(batch))
    return FlashCase(**fields)


bounded = settings(max_examples=25, suppress_health_check=list(settings().suppress_health_check))


@bounded
@given(case=cases("dense"))
def _dense(target: Target, case: FlashCase) -> None:
    check(case, target)


@bounded
@given(case=cases("packed"))
def _packed(target: Target, case: FlashCase) -> None:
    check(case, target)


@bounded
@given(case=cases("decode"))
def _decode(target: Target, case: FlashCase) -> None:
    check(case, target)


def test_combinations(target: Target) -> None:
    _dense(target)


def test_packed_combinations(target: Target) -> None:
    _packed(target)


def test_decode_combinations(target: Target) -> None:
    _decode(target)
