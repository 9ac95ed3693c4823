"""What must hold between the reductions, and between them and the attention itself."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge import reductions
from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.reductions import reduction_inputs

CASES = {
    "full": FlashCase(seqlen_q=70, seqlen_k=90, heads_q=4, heads_k=2),
    "causal": FlashCase(seqlen_q=90, seqlen_k=90, heads_q=3, heads_k=1, causal=True),
    "softcap": FlashCase(seqlen_q=40, seqlen_k=300, softcap=5.0, alibi="head"),
    "bf16": FlashCase(seqlen_q=40, seqlen_k=300, dtype=torch.bfloat16, window=(30, 0)),
}


def dense(case: FlashCase, backend: str) -> tuple:
    """(inputs, P as the one-key spans give it): an independent way to every element."""
    inputs = reduction_inputs(case)
    ends = torch.arange(case.seqlen_k + 1, dtype=torch.int32)
    prob = reductions.span_mass(inputs.q, inputs.k, inputs.lse, ends, **inputs.options,
                                backend=backend)  # fmt: skip
    return inputs, prob


@pytest.mark.parametrize("name", CASES)
def test_rows_sum_to_one(target: Target, name: str) -> None:
    inputs = reduction_inputs(CASES[name])
    o = {**inputs.options, "backend": target.backend}
    sums = reductions.column_sums(inputs.q, inputs.k, inputs.lse, **o).sum(-1)
    rows = torch.full_like(sums, inputs.q.shape[1])
    torch.testing.assert_close(sums, rows, rtol=2e-6, atol=0)
    whole = torch.tensor([0, inputs.k.shape[1]], dtype=torch.int32)
    mass = reductions.span_mass(inputs.q, inputs.k, inputs.lse, whole, **o)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=4e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_against_each_element(target: Target, name: str) -> None:
    inputs, prob = dense(CASES[name], target.backend)
    q, k, lse, o = inputs.q, inputs.k, inputs.lse, {**inputs.options, "backend": target.backend}
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(reductions.column_sums(q, k, lse, **o), prob.sum(2), **close)
    entropy = torch.special.entr(prob).sum(-1)
    torch.testing.assert_close(reductions.row_entropy(q, k, lse, **o), entropy, **close)
    top = reductions.block_max(q, k, lse, q.shape[1], 1, **o)
    torch.testing.assert_close(top.squeeze(2), prob.amax(2), **close)
    # the same numbers, found once as a list of edges and once as the best keys of a row
    threshold = 0.011
    found = reductions.edges(q, k, lse, threshold, prob.numel(), **o)
    where, value = found.trimmed()
    assert torch.equal(where.long(), (prob > threshold).nonzero())
    torch.testing.assert_close(value, prob[prob > threshold], **close)
    values, keys = reductions.topk_keys(q, k, lse, 3, **o)
    want = prob.topk(3, -1)
    torch.testing.assert_close(values, want.values.where(keys >= 0, 0.0), **close)


def test_parts_of_the_keys_add_up(target: Target) -> None:
    # LSEs of two key ranges merged: the masses of the parts are those of the whole
    q, k, v = torch.randn(2, 30, 4, 16), torch.randn(2, 100, 2, 16), torch.randn(2, 100, 2, 16)
    backend = target.backend
    parts = [attnforge.flash_attention(q, k[:, a:b], v[:, a:b], return_lse=True, backend=backend)
             for a, b in ((0, 33), (33, 100))]  # fmt: skip
    _, lse = attnforge.merge_states(*zip(*parts, strict=True), backend=backend)
    left = reductions.column_sums(q, k[:, :33], lse, backend=backend)
    right = reductions.column_sums(q, k[:, 33:], lse, backend=backend)
    whole = reductions.column_sums(q, k, lse, backend=backend)
    torch.testing.assert_close(torch.cat([left, right], -1), whole, rtol=1e-5, atol=1e-7)
    cut = torch.tensor([0, 33, 100], dtype=torch.int32)
    mass = reductions.span_mass(q, k, lse, cut, backend=backend)
    share = torch.exp(torch.stack([s for _, s in parts], -1) - lse.unsqueeze(-1))
    torch.testing.assert_close(mass, share, rtol=1e-5, atol=1e-7)


def test_last_rows_by_weight_and_by_cut(target: Target) -> None:
    # SnapKV looks through the last 8 rows: zero weights and a cut q are two ways to say so
    case = FlashCase(seqlen_q=60, seqlen_k=60, heads_q=4, heads_k=2, causal=True)
    inputs, backend = reduction_inputs(case), target.backend
    weights = torch.zeros_like(inputs.lse)
    weights[..., -8:] = 1.0
    by_weight = reductions.column_sums(inputs.q, inputs.k, inputs.lse, row_weights=weights,
                                       causal=True, backend=backend)  # fmt: skip
    by_cut = reductions.column_sums(inputs.q[:, -8:], inputs.k, inputs.lse[..., -8:], causal=True,
                                    backend=backend)  # fmt: skip
    torch.testing.assert_close(by_weight, by_cut, rtol=1e-6, atol=1e-7)


def test_span_gradient_through_the_attention(target: Target) -> None:
    # with the LSE of the same graph, q and k get the gradient of softmax: compare to autograd
    q, k = torch.randn(1, 20, 4, 16), torch.randn(1, 50, 2, 16)
    cut = torch.tensor([5, 20, 45], dtype=torch.int32)
    weight = torch.randn(1, 4, 20, 2)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    _, lse = attnforge.flash_attention(*leaves, leaves[1], causal=True, return_lse=True,
                                       backend=target.backend)  # fmt: skip
    mass = reductions.span_mass(*leaves, lse, cut, causal=True, backend=target.backend)
    got = torch.autograd.grad(mass, leaves, weight)
    plain = [x.double().requires_grad_() for x in (q, k)]
    keys = plain[1].repeat_interleave(2, 2)
    s = torch.einsum("bihd,bjhd->bhij", plain[0], keys) / 4
    s = s.masked_fill(torch.arange(50) > torch.arange(20).unsqueeze(1) + 30, float("-inf"))
    prob = s.softmax(-1)
    want_mass = torch.stack([prob[..., 5:20].sum(-1), prob[..., 20:45].sum(-1)], -1)
    want = torch.autograd.grad(want_mass, plain, weight.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-6)


def test_head_gradient_is_the_derivative_by_a_gate(target: Target) -> None:
    gate = torch.ones(2, 4, requires_grad=True)
    out = torch.randn(2, 9, 4, 16)
    weight = torch.randn_like(out)
    (want,) = torch.autograd.grad((out * gate[:, None, :, None] * weight).sum(), gate)
    got = reductions.head_gradient(weight, out, backend=target.backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
