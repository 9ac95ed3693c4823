"""Arguments that do not fit are named, with what is wanted and the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnforge

Q, V = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 4, 6)
STATE = torch.zeros(2, 4, 8, 6)


def linear(**more: Any) -> Any:
    return attnforge.linear_attention(**{"q": Q, "k": Q, "v": V, **more})


def gla(*gates: Any, **more: Any) -> Any:
    return attnforge.gla(Q, Q, V, *gates, **more)


def step(**more: Any) -> Any:
    operands = {"q": Q[:, 0], "k": Q[:, 0], "v": V[:, 0], "state": STATE.clone()}
    return attnforge.linear_step(**{**operands, **more})


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: linear(q=Q[0]), "q has 3 dims"),
    (lambda: linear(q=Q.double()), "dtypes differ"),
    (lambda: linear(v=V[:, :4]), "differ in batch or time"),
    (lambda: linear(k=Q[..., :4]), "q and k differ in heads or head_dim"),
    (lambda: linear(v=V[:, :, :3]), "value heads are no multiple"),
    (lambda: linear(scale=float("inf")), "scale is inf"),
    (lambda: linear(initial_state=STATE[:1]), "initial_state has shape"),
    (lambda: linear(initial_state=STATE, normalize=True), "must be a pair"),
    (lambda: linear(normalize="max"), "normalize is 'max'"),
    (lambda: linear(normalize=True, eps=-1.0), "eps is -1.0"),
    (lambda: linear(cu_seqlens=torch.tensor([0, 5])), "comes with a batch of 2"),
    (lambda: linear(q=Q[:1], k=Q[:1], v=V[:1], cu_seqlens=torch.tensor([0, 6])),
     r"cu_seqlens\[1\] is 6"),
    (lambda: linear(q=Q[:1], k=Q[:1], v=V[:1], cu_seqlens=torch.tensor([0, 4, 3])),
     r"cu_seqlens\[2\] is 3"),
    (lambda: linear(q=Q[:1], k=Q[:1], v=V[:1], cu_seqlens=torch.tensor([1, 4])),
     r"cu_seqlens\[0\] is 1"),
    (lambda: linear(q=Q[:1], k=Q[:1], v=V[:1], cu_seqlens=torch.tensor([0.0, 4.0])),
     "want int32 or int64"),
    (lambda: attnforge.simple_gla(Q, Q, V, torch.zeros(2, 5, 3)), "g has shape"),
    (lambda: gla(), "no gate given"),
    (lambda: gla(torch.zeros(2, 5, 4, 8), gv=V), "both gates given"),
    (lambda: gla(torch.zeros(2, 5, 4, 6)), "gk has shape"),
    (lambda: gla(gv=V, normalize=True), "normalize is on"),
    (lambda: attnforge.retention(Q, Q, V, decay=torch.zeros(4, requires_grad=True)),
     "decay requires grad"),
    (lambda: attnforge.lightning_attention(Q, Q, V, layer_idx=3, num_layers=3), "layer_idx is 3"),
    (lambda: step(state=STATE.double()), "want a contiguous torch.float32 pool"),
    (lambda: step(state=STATE.transpose(2, 3)), "state is"),
    (lambda: step(state=STATE[:1].clone()), "state has 1 slots"),
    (lambda: step(state_indices=torch.tensor([1, 1], dtype=torch.int32)), "state_indices is"),
    (lambda: step(state_indices=torch.tensor([0, 2], dtype=torch.int32)), "state_indices is"),
    (lambda: step(g=torch.zeros(2, 4), gk=torch.zeros(2, 4, 8)), "2 gates given"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_sentences(call: Callable[[], Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text) as error:
        call()
    sentence = str(error.value)
    assert sentence.startswith("attnforge.")
    assert "want" in sentence


def test_bidirectional_calls_have_no_gate_and_say_which_kernel() -> None:
    found = attnforge.explain(attnforge.linear_attention, Q, Q, V, causal=False)
    assert all("bidirectional" in d.request.features for d in found.decisions)
    assert found.chosen is not None
