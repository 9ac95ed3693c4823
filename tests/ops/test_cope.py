"""Contextual positions against the float64 truth, on the reference and every ISA level."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge.testing.cases import Target
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.cope import CopeCase
from attnforge.testing.poison import guarded

CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False, "seqlen_q": 70, "seqlen_k": 131, "heads_q": 4, "table_heads": None},
    "window": {"window": (150, 0), "seqlen_q": 70, "seqlen_k": 300, "positions": 64,
               "head_dim": 40, "v_head_dim": 24},
    "used": {"used": (300, 13), "seqlen_q": 70, "seqlen_k": 300, "heads_q": 4, "positions": 5},
    "more_rows_than_keys": {"seqlen_q": 60, "seqlen_k": 20},
    "one_position": {"positions": 1, "seqlen_k": 40},
    "two_positions": {"positions": 2, "seqlen_k": 40},
    "open_far": {"batch": 1, "seqlen_q": 40, "seqlen_k": 420, "positions": 400},
    "one_row": {"seqlen_q": 1, "seqlen_k": 200, "heads_q": 4},
    "large_logits": {"spread": 9.0, "seqlen_q": 50, "seqlen_k": 150, "positions": 33},
    "packed": {"lengths": ((40, 60), (3, 9), (0, 5), (7, 0), (65, 140)), "heads_q": 4,
               "table_heads": None},
}  # fmt: skip


def check(case: CopeCase, target: Target) -> None:
    inputs = case.make()
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_formula(target: Target, name: str, dtype: torch.dtype) -> None:
    check(CopeCase(**CASES[name], dtype=dtype), target)


@st.composite
def cases(draw: st.DrawFn) -> CopeCase:
    heads_k = draw(st.integers(1, 2))
    fields: dict[str, Any] = {}
    lengths = st.integers(0, 150)
    if draw(st.booleans()):
        pairs = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=3))
        fields["lengths"] = tuple(pairs)
    return CopeCase(
        batch=draw(st.integers(1, 2)), heads_k=heads_k, heads_q=heads_k * draw(st.integers(1, 3)),
        seqlen_q=draw(lengths), seqlen_k=draw(lengths), head_dim=8 * draw(st.integers(1, 9)),
        positions=draw(st.integers(1, 70)), table_heads=draw(st.sampled_from([1, None])),
        causal=draw(st.booleans()),
        window=(draw(st.sampled_from([-1, 0, 40])), draw(st.sampled_from([-1, 3]))),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])), **fields,
    )  # fmt: skip


@settings(max_examples=25, suppress_health_check=list(settings().suppress_health_check))
@given(case=cases())
def _any_shape(target: Target, case: CopeCase) -> None:
    check(case, target)


def test_any_shape(target: Target) -> None:
    _any_shape(target)


def test_a_flat_table_is_plain_attention(target: Target) -> None:
    """Equal embeddings add one constant per row."""
    inputs = CopeCase(seqlen_q=60, seqlen_k=170).make()
    flat = inputs.emb[..., :1].expand(-1, -1, 9)
    got = inputs.with_(emb=flat).run(target.backend)["out"]
    want = attnforge.flash_attention(inputs.q, inputs.k, inputs.v, causal=True)
    assert torch.allclose(got, want, atol=2e-5)


def test_open_gates_count_tokens(target: Target) -> None:
    """Gates of 1: positions are distances, and the table is a relative bias."""
    n, positions = 70, 20
    q, k = torch.full((1, n, 1, 8), 4.0), torch.full((1, n, 1, 8), 4.0)
    v, emb = torch.randn(1, n, 1, 8), torch.randn(8, positions) / 8
    got = attnforge.cope_attention(q, k, v, emb, causal=True, backend=target.backend)
    table = q[0, 0, 0] @ emb  # of every row: they are equal
    distance = (torch.arange(n).view(-1, 1) - torch.arange(n)).clamp(0)
    full = table[(distance + 1).clamp(max=positions - 1)].view(1, 1, n, n)
    want = attnforge.flash_attention(q, k, v, causal=True, bias=full)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("which", ["k", "v"])
def test_hidden_nan_stays_hidden(target: Target, which: str) -> None:
    """Of a key that the window hides from some rows: those, and their gradients, are clean."""
    inputs = CopeCase(batch=1, seqlen_q=140, seqlen_k=140, window=(60, 0)).make()
    bad = getattr(inputs, which).clone()
    bad[:, 30] = math.nan
    got, want = inputs.with_(**{which: bad}).run(target.backend), inputs.run(target.backend)
    clean = (torch.arange(140) < 30) | (torch.arange(140) > 90)
    for name in ("out", "dq"):
        assert torch.allclose(got[name][:, clean], want[name][:, clean], atol=1e-5)
        assert got[name][:, 30:91].isnan().any(-1).all()


def test_unused_slots_are_not_read(target: Target) -> None:
    inputs = CopeCase(used=(30, 0), seqlen_q=20, seqlen_k=50).make()
    k, v = inputs.k.clone(), inputs.v.clone()
    for x in (k, v):
        x[0, 30:], x[1] = math.nan, math.nan
    got = inputs.with_(k=k, v=v).run(target.backend)
    compare(got, inputs.truth(), inputs.context).check()
    assert not got["dk"][1].any()
    assert (got["lse"][1] == -math.inf).all()


def test_threads_and_batch_change_no_bit(level: Target) -> None:
    inputs = CopeCase(batch=3, seqlen_q=150, seqlen_k=150, heads_q=4, table_heads=None).make()
    want = inputs.run(level.backend)
    torch.set_num_threads(1)
    assert_same(inputs.run(level.backend), want, "threads")
    alone = inputs.with_(
        **{n: getattr(inputs, n)[1:2] for n in ("q", "k", "v", "dout", "dlse")}
    ).run(level.backend)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(alone[name], want[name][1:2]), name


def test_nothing_is_read_behind_a_tensor(level: Target) -> None:
    """Operands end at a page that faults."""
    inputs = CopeCase(batch=1, seqlen_q=37, seqlen_k=61, heads_q=1, heads_k=1, head_dim=24,
                      positions=7).make()  # fmt: skip
    want = inputs.run(level.backend)
    names = ("q", "k", "v", "emb", "dout")
    edge = inputs.with_(**{n: guarded(getattr(inputs, n)) for n in names})
    assert_same(edge.run(level.backend), want, "guarded")
