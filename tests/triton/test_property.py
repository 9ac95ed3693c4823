"""Random small problems over shapes, features, layouts and dtypes; each failure prints its repr."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnforge.testing.cases import LAYOUTS, FlashCase
from attnforge.testing.compare import compare

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HEAD_DIMS = st.sampled_from([8, 16, 24, 40])
LENGTHS = st.integers(0, 50)


@st.composite
def cases(draw: st.DrawFn, kind: str) -> FlashCase:
    group, heads_k = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    edges = st.one_of(st.just(-1), st.integers(0, 40), st.just(1000))
    fields: dict[str, Any] = {
        "heads_q": group * heads_k,
        "heads_k": heads_k,
        "head_dim": draw(HEAD_DIMS),
        "v_head_dim": draw(st.one_of(st.none(), HEAD_DIMS)),
        "dtype": draw(DTYPES),
        "causal": draw(st.booleans()),
        "window": (draw(edges), draw(edges)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        "alibi": draw(st.sampled_from(["", "", "head", "batch"])),
        "sinks": draw(st.sampled_from(["", "", "normal", "mixed"])),
        "softmax_scale": draw(st.sampled_from([None, 0.05, 1.0, -0.3])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "grad_layout": draw(st.sampled_from(LAYOUTS)),
        "lse_grad": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }
    if kind == "varlen":
        pairs = draw(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=3))
        fields["lengths"] = tuple(pairs)
        if draw(st.booleans()):
            fields["used"] = tuple(draw(st.integers(0, keys)) for _, keys in pairs)
        return FlashCase(**fields)
    batch, keys = draw(st.integers(1, 2)), draw(LENGTHS)
    rows = draw(st.integers(1, 6) if kind == "decode" else LENGTHS)
    fields |= {"batch": batch, "seqlen_q": rows, "seqlen_k": keys, "decode": kind == "decode"}
    if kind == "decode" or draw(st.booleans()):
        fields["used"] = tuple(draw(st.integers(0, keys)) for _ in range(batch))
    return FlashCase(**fields)


few = settings(max_examples=12, suppress_health_check=list(settings().suppress_health_check))


@few
@given(case=cases("dense"))
def test_dense(case: FlashCase) -> None:
    inputs = case.make()
    compare(inputs.run("triton"), inputs.truth(rounded=True), inputs.context).check()


@few
@given(case=cases("varlen"))
def test_varlen(case: FlashCase) -> None:
    inputs = case.make()
    compare(inputs.run("triton"), inputs.truth(rounded=True), inputs.context).check()


@few
@given(case=cases("decode"), num_splits=st.sampled_from([0, 1, 2, 5, 64]))
def test_decode(case: FlashCase, num_splits: int) -> None:
    inputs = case.make()
    got = inputs.forward("triton", num_splits=num_splits)
    compare(got, inputs.truth(grad=False, rounded=True), inputs.context).check()
