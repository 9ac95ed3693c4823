"""Random problems over shapes, features, layouts and dtypes; each failure prints its repr."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnforge.testing.cases import LAYOUTS, FlashCase, Target
from attnforge.testing.compare import compare
from attnforge.testing.reductions import check_edges, check_topk, reduction_inputs

LENGTHS = st.one_of(st.integers(0, 20), st.integers(20, 140))


@st.composite
def cases(draw: st.DrawFn) -> FlashCase:
    group, heads_k = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    edges = st.one_of(st.just(-1), st.integers(0, 40), st.just(1000))
    batch, keys = draw(st.integers(1, 3)), draw(LENGTHS)
    used = st.tuples(*[st.integers(0, keys)] * batch)
    fields: dict[str, Any] = {
        "batch": batch,
        "seqlen_q": draw(LENGTHS),
        "seqlen_k": keys,
        "heads_q": group * heads_k,
        "heads_k": heads_k,
        "head_dim": draw(st.sampled_from([8, 16, 24, 40, 64, 72, 128])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "causal": draw(st.booleans()),
        "window": (draw(edges), draw(edges)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        "alibi": draw(st.sampled_from(["", "", "head", "batch"])),
        "sinks": draw(st.sampled_from(["", "", "normal", "mixed"])),
        "softmax_scale": draw(st.sampled_from([None, 0.05, 1.0])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "used": draw(st.one_of(st.none(), used)),
        "seed": draw(st.integers(0, 99)),
    }
    return FlashCase(**fields)


# Fixtures hold for all examples of a test, which is meant: the ISA level does not change.
bounded = settings(max_examples=60, suppress_health_check=list(settings().suppress_health_check))


@bounded
@given(
    case=cases(),
    blocks=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    topk=st.integers(1, 40),
    room=st.integers(1, 200),
)
def _anything(
    target: Target, case: FlashCase, blocks: tuple[int, int], topk: int, room: int
) -> None:
    inputs = reduction_inputs(case, blocks=blocks, topk=topk)
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()
    check_topk(inputs, target.backend, with_lse=True)
    check_edges(inputs, target.backend, room)


def test_anything(target: Target) -> None:
    _anything(target)
