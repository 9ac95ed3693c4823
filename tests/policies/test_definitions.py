"""Policies against what their papers define, written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import policies


def tensors(keys: int = 120, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, keys, 2 * heads, 16, generator=g)
    return q, *(torch.randn(2, keys, heads, 16, generator=g) for _ in range(2))


def listed(lists: policies.Lists, keys: int) -> Tensor:
    """bool [B, H, keys]: which keys stand in the lists."""
    seen = torch.zeros(*lists.ids.shape[:2], keys + 1, dtype=torch.bool)
    ids = lists.ids.long()
    if lists.lens is not None:
        ids = ids.where(torch.arange(ids.shape[-1]) < lists.lens.unsqueeze(-1), keys)
    return seen.scatter_(-1, ids.where((ids >= 0) & (ids < keys), keys), True)[..., :keys]


@pytest.fixture(autouse=True)
def sparse_from_the_budget_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts here are far shorter than where a sparse step pays."""
    monkeypatch.setattr(policies.Policy, "crossover", 0)


# ---- HiP ----


def hip(q: Tensor, k: Tensor, lo: int, hi: int, branches: int, leaf: int) -> set[int]:
    """The tree search of one KV head, q [G, D], k [S, D], one branch after the other."""
    cut = [lo + i * (hi - lo) // branches for i in range(branches + 1)]
    spans = list(itertools.pairwise(cut))
    widest = math.ceil((hi - lo) / branches)
    while widest > leaf:
        halves = [h for b, e in spans for h in ((b, (b + e + 1) // 2), ((b + e + 1) // 2, e))]
        score = {(b, e): float((q @ k[(b + e) // 2]).max()) for b, e in halves if b < e}
        spans = sorted(score, key=lambda s: -score[s])[:branches]
        widest = math.ceil(widest / 2)
    return {i for b, e in spans for i in range(b, e)}


@pytest.mark.parametrize("keys", [119, 120, 500])
def test_hip_is_its_tree_search(keys: int) -> None:
    q, k, v = tensors(keys)
    policy = policies.HiP(40, leaf=2, sinks=4, window=8)
    seen = listed(policy.select(q[:, -1:], k, v), keys)
    for b in range(2):
        for h in range(2):
            want = hip(q[b, -1, 2 * h : 2 * h + 2], k[b, :, h], 4, keys - 8, 14, 2)
            want |= {*range(4), *range(keys - 8, keys)}
            assert set(seen[b, h].nonzero().flatten().tolist()) == want


def test_hip_finds_a_hill() -> None:
    """Where neighbours are alike, which is what the search assumes, the best keys are found."""
    at = torch.arange(1000.0)
    k = torch.zeros(1, 1000, 1, 16)
    k[0, :, 0, 0] = -(at - 333).abs()
    q = torch.zeros(1, 1, 2, 16)
    q[..., 0] = 1.0
    seen = listed(policies.HiP(64, leaf=2, sinks=0, window=0).select(q, k, k), 1000)
    assert seen[0, 0, 333]
    assert int(seen[0, 0, 325:342].sum()) >= 12


# ---- LServe ----


def test_lserve_pages_are_as_good_as_their_best_part() -> None:
    q, k, v = tensors(118)
    policy = policies.LServe(40, page_size=8, part=4, every=1)
    policy.codes = False
    seen = listed(policy.select(q[:, -1:], k, v), 118)
    part = [k[:, i : i + 4] for i in range(0, 118, 4)]
    row = q[:, -1].view(2, 2, 2, 16)
    bound = torch.stack([
        torch.maximum(row * x.amin(1).unsqueeze(2), row * x.amax(1).unsqueeze(2)).sum(-1).amax(2)
        for x in part
    ], -1)  # fmt: skip
    best = bound.view(2, 2, 15, 2).amax(-1)
    best[..., 0] = best[..., -1] = torch.inf
    pages = torch.zeros(2, 2, 15, dtype=torch.bool).scatter_(-1, best.topk(5).indices, True)
    assert torch.equal(seen, pages.repeat_interleave(8, -1)[..., :118])


def test_lserve_reuses_a_choice_and_adds_new_pages() -> None:
    q, k, v = tensors(130)
    policy = policies.LServe(40, page_size=8, part=4, every=4)
    first = listed(policy.select(q[:, 118:119], k[:, :119], v[:, :119]), 119)
    again = listed(policy.select(q[:, 121:122], k[:, :122], v[:, :122]), 122)
    assert torch.equal(first[..., :112], again[..., :112])
    assert again[..., 112:].all()  # the last page and the one that came
    other = listed(policy.select(q[:, 122:123], k[:, :123], v[:, :123]), 123)
    assert not torch.equal(first[..., :112], other[..., :112])


def test_lserve_heads_that_stream() -> None:
    q, k, v = tensors(120)
    policy = policies.LServe(64, page_size=8, part=4, streaming={0: (1,)}, local=2)
    seen = listed(policy.select(q[:, -1:], k, v), 120)
    want = torch.zeros(120, dtype=torch.bool)
    want[:8] = want[-16:] = True
    assert torch.equal(seen[:, 1], want.expand(2, -1))
    assert seen[:, 0].sum(-1).tolist() == [64, 64]


# ---- RazorAttention ----


@pytest.mark.parametrize("heads", [{}, {0: (1,)}, {0: (0, 1)}])
def test_razor_is_a_window_a_mean_and_whole_heads(heads: dict[int, Any]) -> None:
    """In float64 over explicit keys; steps one after the other carry the means along."""
    q, k, v = tensors(140)
    policy = policies.RazorAttention(40, heads=heads, sinks=4)
    for n in range(100, 141, 20):
        got, lse = policy.attend(q[:, n - 1 : n], k[:, :n], v[:, :n], return_lse=True)
        for h in range(4):
            row, key, value = (
                x.double() for x in (q[:, n - 1, h], k[:, :n, h // 2], v[:, :n, h // 2])
            )
            bias = torch.zeros(n, dtype=torch.float64)
            if h // 2 not in heads.get(0, ()):
                gone = slice(4, n - 36)
                kept = [*range(4), *range(n - 36, n)]
                key, value = (torch.cat([x[:, kept], x[:, gone].mean(1, keepdim=True)], 1)
                              for x in (key, value))  # fmt: skip
                bias = torch.zeros(41, dtype=torch.float64)
                bias[-1] = math.log(n - 40)
            s = torch.einsum("bd,bnd->bn", row, key) / 4 + bias
            want = torch.einsum("bn,bnd->bd", s.softmax(-1), value)
            torch.testing.assert_close(got[:, 0, h].double(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[:, h, 0].double(), s.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_head_typing_finds_heads_that_look_back() -> None:
    """Of random heads one echoes and one inducts: each is found, in its layer."""
    n, g = 40, torch.Generator().manual_seed(0)
    once = 3 * torch.randn(1, n, 2, 16, generator=g)
    keys = torch.cat([once, once], 1)
    typing = policies.HeadTyping(n)
    for layer in range(4):
        q, k = torch.randn(1, 2 * n, 4, 16, generator=g), torch.randn(1, 2 * n, 2, 16, generator=g)
        if layer == 1:  # a query like the key of its own token
            q[:, :, 1], k[:, :, 0] = keys[:, :, 0], keys[:, :, 0]
        if layer == 3:  # a query like the key that follows
            q[:, :, 2], k[:, :, 1] = keys[:, :, 0].roll(-1, 1), keys[:, :, 0]
        typing.observe(q, k, k, layer=layer)
        p = q.double().transpose(1, 2) @ k.double().repeat_interleave(2, 2).permute(0, 2, 3, 1) / 4
        p = p.masked_fill(~torch.ones(2 * n, 2 * n).tril().bool(), -torch.inf).softmax(-1)
        own = [
            p.diagonal(-d, 2, 3)[..., n - d :].mean((0, 2)).view(2, 2).amax(1) for d in (n, n - 1)
        ]
        torch.testing.assert_close(
            typing.state[layer].double(), torch.stack(own), rtol=1e-4, atol=1e-6
        )
    assert typing.retrieval_heads(echo=0.125, induction=0.125) == {0: (), 1: (0,), 2: (), 3: (1,)}


# ---- indices as policies ----


def test_magicpig_is_lsh_attention() -> None:
    q, k, v = tensors(700)
    policy = policies.MagicPIG(num_bits=4, num_tables=16, window=32, seed=3)
    policy.observe(q[:, :600], k[:, :600], v[:, :600], layer=2)
    got = policy.attend(q[:, 699:], k, v, layer=2)
    index = attnforge.LSHIndex(k[:, :600], v[:, :600], num_bits=4, num_tables=16, window=32, seed=5)
    index.append(k[:, 600:], v[:, 600:])
    want = attnforge.lsh_attention(q[:, 699:], index)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    dense = attnforge.flash_attention(q[:, 699:], k, v, causal=True)
    assert (got - dense).abs().max() > 1e-3
    everything = policies.MagicPIG(num_bits=0, window=32).attend(q[:, 699:], k, v)
    torch.testing.assert_close(everything, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
def test_squeezed_follows_growth(calibrated: bool) -> None:
    """New keys are seen at once; the share of the clustered ones follows the budget."""
    q, k, v = tensors(400)
    policy = policies.Squeezed(120, calibrated=calibrated, num_centroids=40, window=16)
    policy.observe(q[:, :300], k[:, :300], v[:, :300])
    seen: list[policies.Lists] = []
    policy.watch = seen.append
    for n in range(301, 400, 7):
        got = policy.attend(q[:, n - 1 : n], k[:, :n], v[:, :n])
        index = policy.state[0]
        assert n - index.length < 64
        new = (k[:, index.length : n], v[:, index.length : n])
        merged = attnforge.centroid_attention(
            q[:, n - 1 : n], index, new=new if new[0].shape[1] else None,
            budget=None if calibrated else (120 - n + index.clustered) / index.clustered,
        )  # fmt: skip
        assert torch.equal(got, merged)
        if not calibrated:
            lens = seen[-1].lens
            assert lens is not None
            assert int(lens.max()) + n - index.length in (120, 121)


# ---- a prompt in chunks ----

CHUNKED = {
    "streaming": policies.StreamingLLM(24),
    "quest": policies.Quest(24, page_size=4),
    "hip": policies.HiP(24, leaf=2, window=8),
    "tokenselect": policies.TokenSelect(24, initial=2, local=8, reuse=2.0),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_a_prompt_in_chunks_sees_what_each_chunk_selects(name: str) -> None:
    q, k, v = tensors(100)
    policy = CHUNKED[name]
    policy.reset()
    got = policy.prefill(q[:, 10:], k, v, chunk=20)
    policy.reset()
    mask = torch.zeros(2, 4, 90, 100, dtype=torch.bool)
    for a in range(10, 100, 20):
        end = min(a + 20, 100)
        mask[:, :, a - 10 : end - 10, a:end] = torch.ones(end - a, end - a).tril().bool()
        if a <= 24:
            mask[:, :, a - 10 : end - 10, :a] = True
            continue
        mean = q[:, a:end].mean(1, keepdim=True)
        seen = listed(policy.select(mean, k[:, :a], v[:, :a]), a)
        assert int(seen.sum(-1).max()) <= 24
        wide = seen.repeat_interleave(4 // seen.shape[1], 1)
        mask[:, :, a - 10 : end - 10, :a] = wide.unsqueeze(2)
    k4, v4 = (x.double().repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    s = (q[:, 10:].double().transpose(1, 2) @ k4.mT / 4).masked_fill(~mask, -torch.inf)
    want = (s.softmax(-1) @ v4).transpose(1, 2)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_who_does_not_choose_for_chunks_says_so() -> None:
    q, k, v = tensors(100)
    with pytest.raises(ValueError, match="SnapKV: it does not choose keys for a chunk"):
        policies.SnapKV(24).prefill(q, k, v)


def test_h2o_sums_over_chunks() -> None:
    q, k, v = tensors(100)
    whole, parts = policies.H2O(20), policies.H2O(20)
    whole.observe(q, k, v)
    parts.observe(q[:, :60], k[:, :60], v[:, :60])
    parts.observe(q[:, 60:], k, v)
    torch.testing.assert_close(parts.state[0], whole.state[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policies.HiP(8, leaf=9), "HiP: leaf is 9"),
        (lambda: policies.LServe(64, page_size=60), "LServe: page_size is 60"),
        (lambda: policies.HeadTyping(30).observe(*tensors(50)), "HeadTyping: got 50 queries"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
