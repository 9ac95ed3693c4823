"""Policies: a full budget is dense attention, lists are in range, and each keeps its promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import policies
from attnforge.policies import Policy

MAKE: dict[str, Any] = {
    "streaming": lambda n: policies.StreamingLLM(n),
    "quest": lambda n: policies.Quest(n, page_size=8),
    "quest-grouped": lambda n: policies.Quest(n, page_size=8, grouped=True),
    "tokenselect": lambda n: policies.TokenSelect(n, initial=2, local=8),
    "twilight": lambda n: policies.Twilight(n, p=0.95),
    "sparq": lambda n: policies.SparQ(n, channels=8),
    "snapkv": lambda n: policies.SnapKV(n, observed=8),
    "h2o": lambda n: policies.H2O(n),
    "tidal": lambda n: policies.TidalDecode(n, dense=(), chooses=(0,)),
    "recycled": lambda n: policies.Recycled(n, every=4),
    "squeezed": lambda n: policies.Squeezed(n, num_centroids=20, window=8),
    "hip": lambda n: policies.HiP(n, leaf=2, window=8),
    "lserve": lambda n: policies.LServe(n, page_size=8, part=4, every=3),
    "razor": lambda n: policies.RazorAttention(n),
}
OWN_LISTS = ("recycled", "squeezed")  # of whole contexts at times; of slots of an index


@pytest.fixture(autouse=True)
def sparse_from_the_budget_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts here are far shorter than where a sparse step pays."""
    monkeypatch.setattr(Policy, "crossover", 0)


def tensors(keys: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (2, keys, 2, 16)
    return (torch.randn(2, keys, 4, 16, generator=g), torch.randn(shape, generator=g),
            torch.randn(shape, generator=g))  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_a_budget_of_everything_is_dense(name: str) -> None:
    q, k, v = tensors()
    want = attnforge.flash_attention(q[:, -1:], k, v, causal=True)
    policy: Policy = MAKE[name](120)
    policy.observe(q, k, v)
    torch.testing.assert_close(policy.attend(q[:, -1:], k, v), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_lists_fit_the_budget_and_follow_growth(name: str) -> None:
    q, k, v = tensors(140)
    policy: Policy = MAKE[name](40)
    policy.observe(q[:, :100], k[:, :100], v[:, :100])
    for n in range(101, 141):
        out = policy.attend(q[:, n - 1 : n], k[:, :n], v[:, :n])
        assert out.isfinite().all()
        assert out.shape == (2, 1, 4, 16)
    if name in OWN_LISTS:
        return
    lists = policy.select(q[:, -1:], k, v, layer=1 if name == "tidal" else 0)
    kept = (lists.ids >= 0) & (lists.ids < 140)
    if lists.lens is not None:
        kept &= torch.arange(lists.ids.shape[-1]) < lists.lens.unsqueeze(-1)
    own = 40 if name == "snapkv" else 0  # keys that came after the prompt are kept beside it
    assert (kept.sum(-1) <= 40 + own).all()
    for row, seen in zip(lists.ids.flatten(0, 1), kept.flatten(0, 1), strict=True):
        ids = row[seen].tolist()
        assert len(set(ids)) == len(ids)
        assert 139 in ids  # the query's own key


FINDERS = ("quest", "tokenselect", "twilight", "sparq", "tidal", "recycled", "squeezed", "lserve")


@pytest.mark.parametrize("name", FINDERS)
def test_a_needle_is_found(name: str) -> None:
    """One key that the query is parallel to, in the middle: what looks at queries sees it."""
    q, k, v = tensors()
    q, k = q[:, -1:] * 0.2, k * 0.2
    needle = torch.randn(2, 1, 2, 16)
    k[:, 50:51] = 2 * needle
    q = q + 3 * needle.repeat_interleave(2, 2)
    want = attnforge.flash_attention(q, k, v, causal=True)
    policy: Policy = MAKE[name](32)
    got = policy.attend(q, k, v)
    for _ in range(2):
        got = policy.attend(q, k, v, layer=1 if name == "tidal" else 0)
    if name == "tidal":
        got = policy.attend(q, k, v, layer=1)
    far = policies.StreamingLLM(32).attend(q, k, v)
    assert (got - want).norm() < 0.2 * (far - want).norm()


def test_streaming_is_a_window_with_sinks() -> None:
    q, k, v = tensors()
    seen = torch.zeros(120, dtype=torch.bool)
    seen[:4] = seen[-28:] = True
    want = attnforge.flash_attention(q[:, -1:], k[:, seen], v[:, seen])
    got = policies.StreamingLLM(32).attend(q[:, -1:], k, v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_quest_with_its_bounds_kept_is_quest_anew() -> None:
    q, k, v = tensors()
    kept = policies.Quest(32, page_size=8)
    for n in range(100, 121):
        got = kept.select(q[:, n - 1 : n], k[:, :n], v[:, :n])
        fresh = policies.Quest(32, page_size=8).select(q[:, n - 1 : n], k[:, :n], v[:, :n])
        assert torch.equal(got.ids, fresh.ids)


def test_snapkv_scores_are_windowed_means() -> None:
    q, k, v = tensors()
    policy = policies.SnapKV(20, observed=8, kernel=1)
    policy.observe(q, k, v)
    scores = (q[:, -8:].transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1)) / 4
    hidden = torch.ones(8, 120).triu(113).bool()
    mass = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(2).view(2, 2, 2, 120).mean(2)
    mass[..., -8:] = torch.inf
    want = mass.topk(20).indices.sort(-1).values
    assert torch.equal(policy.state[0][0].long(), want)


def test_pyramid_budgets_average_to_the_budget() -> None:
    policy = policies.PyramidKV(64, layers=8, observed=8)
    own = [policy.layer_budget(n) for n in range(8)]
    assert own == sorted(own, reverse=True)
    assert abs(sum(own) / 8 - 64) <= 1
    assert own[-1] == 8 + round(56 / 20)
    q, k, v = tensors()
    for layer in (0, 7):
        policy.observe(q, k, v, layer=layer)
        assert policy.state[layer][0].shape[-1] == own[layer]


def test_h2o_keeps_heavy_keys() -> None:
    q, k, v = tensors()
    k[:, 30] = 3 * q[:, :, :2].mean(1)
    policy = policies.H2O(20)
    policy.observe(q, k, v)
    heavy = policy.state[0].topk(5).indices
    ids = policy.select(q[:, -1:], k, v).ids
    for b in range(2):
        for h in range(2):
            assert set(heavy[b, h].tolist()) <= set(ids[b, h].tolist())


def test_errors() -> None:
    with pytest.raises(ValueError, match="StreamingLLM: budget is 0"):
        policies.StreamingLLM(0)
    with pytest.raises(ValueError, match="SnapKV: kernel is 4"):
        policies.SnapKV(8, kernel=4)
    with pytest.raises(ValueError, match="Recycled: every is 0"):
        policies.Recycled(8, every=0)
