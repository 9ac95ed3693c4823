"""KV heads of one sequence with lengths of their own, against dense attention head by head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import attnforge
from attnforge import PagedKVCache

LAYERS, HK, HQ, D, DV = 2, 3, 6, 8, 6
Lane = tuple[Tensor, Tensor]  # k [n, D], v [n, Dv]


@pytest.fixture(autouse=True)
def _checks() -> Iterator[None]:
    """Freed pages are filled with NaN in every test here."""
    with attnforge.debug(checks=True):
        yield


def make(**options: Any) -> PagedKVCache:
    base = {"num_pages": 40, "page_size": 4, "dtype": "fp32", "num_layers": LAYERS}
    return PagedKVCache(num_kv_heads=HK, head_dim=D, v_head_dim=DV, **{**base, **options})


class Shadow:
    """The tokens of one sequence, lane by lane."""

    def __init__(self) -> None:
        self.lanes = [(torch.empty(0, D), torch.empty(0, DV))] * (LAYERS * HK)

    def copy(self) -> Shadow:
        twin = Shadow()
        twin.lanes = list(self.lanes)
        return twin

    def add(self, layer: int, k: Tensor, v: Tensor) -> None:
        for h in range(HK):
            old = self.lanes[layer * HK + h]
            self.lanes[layer * HK + h] = torch.cat([old[0], k[:, h]]), torch.cat([old[1], v[:, h]])

    def keep(self, layer: int, head: int, kept: list[int]) -> None:
        k, v = self.lanes[layer * HK + head]
        self.lanes[layer * HK + head] = k[kept], v[kept]

    def attend(self, layer: int, q: Tensor, **options: Any) -> Tensor:
        """q [S, Hq, D], the last rows of every head."""
        group, outs = HQ // HK, []
        for h in range(HK):
            k, v = self.lanes[layer * HK + h]
            mine = q[:, h * group : (h + 1) * group]
            outs.append(attnforge.flash_attention(
                mine[None], k[None, :, None], v[None, :, None], causal=True, **options
            )[0])  # fmt: skip
        return torch.cat(outs, 1)


def grow(cache: PagedKVCache, shadows: dict[int, Shadow], rows: int) -> Any:
    """New tokens at the ends of all sequences, in all layers."""
    names = list(shadows)
    step = cache.begin(names, rows)
    for layer in range(LAYERS):
        k, v = torch.randn(len(names), rows, HK, D), torch.randn(len(names), rows, HK, DV)
        step.append(k, v, layer=layer)
        for i, name in enumerate(names):
            shadows[name].add(layer, k[i], v[i])
    return step


def check(step: Any, shadows: dict[int, Shadow], rows: int, tol: float = 2e-5) -> None:
    q = torch.randn(len(shadows), rows, HQ, D)
    for layer in range(LAYERS):
        out = step.attention(q, layer=layer)
        for i, shadow in enumerate(shadows.values()):
            torch.testing.assert_close(out[i], shadow.attend(layer, q[i]), rtol=tol, atol=tol)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(("dtype", "tol"), [("fp32", 2e-5), ("int8", 0.1)])
def test_streaming_heads(kv_layout: str, dtype: str, tol: float) -> None:
    """DuoAttention: one head of layer 0 and two of layer 1 keep 2 sinks and 5 recent tokens."""
    cache = make(kv_layout=kv_layout, dtype=dtype)
    streams = torch.tensor([[False, True, False], [True, True, False]])
    shadows = {cache.allocate(): Shadow() for _ in range(2)}
    check(grow(cache, shadows, 21), shadows, 21, tol)
    for _ in range(3):
        for name, shadow in shadows.items():
            cache.stream(name, streams, sink=2, recent=5)
            for layer, head in streams.nonzero().tolist():
                n = shadow.lanes[layer * HK + head][0].shape[0]
                shadow.keep(layer, head, [0, 1, *range(n - 5, n)])
        first = cache.head_seqlens(list(shadows))
        assert first[:, 1].tolist() == [7, 7]
        assert first[:, 0].tolist() == [cache.length(n) for n in shadows]
        for rows in (1, 4):
            step = grow(cache, shadows, rows)
            assert step.ragged
            check(step, shadows, rows, tol)
    assert cache.head_seqlens(list(shadows), layer=1).tolist() == [[12, 12, 36]] * 2
    page, slot = step.places(1)
    assert page.shape == slot.shape == (8, HK)
    assert slot[:, 0].tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("dtype", ["fp32", "fp8", "int8", "int4"])
def test_each_head_keeps_its_own_tokens(dtype: str) -> None:
    """SnapKV by head and layer; what is kept is bitwise what a fresh cache would hold."""
    cache = make(dtype=dtype, page_bounds=True)
    name = cache.allocate()
    kv = [(torch.randn(11, HK, D), torch.randn(11, HK, DV)) for _ in range(LAYERS)]
    step = cache.begin([name], 11)
    for layer in range(LAYERS):
        step.append(*kv[layer], layer=layer)
    twin = cache.fork(name)
    q = torch.randn(1, 1, HQ, D)
    before = [cache.attention(q, [twin], layer=n) for n in range(LAYERS)]
    scores = torch.randn(LAYERS, HK, 11)
    keep = torch.tensor([[5, 2, 0], [3, 6, 2]])
    cache.compact(name, scores, keep)
    assert cache.head_seqlens([name], layer=1).tolist() == [[3, 6, 2]]
    assert (cache.length(name), cache.stats().used_pages) == (6, 5)
    for layer in range(LAYERS):
        assert torch.equal(cache.attention(q, [twin], layer=layer), before[layer])
        out = cache.attention(q, [name], layer=layer)
        low, high = cache.storage.layer(layer).bounds or (q, q)
        table = cache.block_table([name])[0].long()
        for h in range(HK):
            kept = sorted(scores[layer, h].topk(int(keep[layer, h])).indices.tolist())
            fresh = make(dtype=dtype, num_layers=1)
            alone = fresh.allocate()
            fresh.append(*(x[kept][None] for x in kv[layer]), [alone])
            mine = slice(2 * h, 2 * h + 2)
            assert torch.equal(out[:, :, mine], fresh.attention(q, [alone])[:, :, mine])
            for n in range(-(-len(kept) // 4)) if dtype == "fp32" else ():
                rows = kv[layer][0][kept[4 * n : 4 * n + 4], h]
                assert bool((low[table[n], h] <= rows.amin(0)).all())
                assert bool((high[table[n], h] >= rows.amax(0)).all())


def test_scores_for_all_layers_and_one_budget() -> None:
    """[Hk, length] with one budget: tokens differ between heads, lengths do not."""
    cache = make()
    shadows = {cache.allocate(): Shadow()}
    (name, shadow), *_ = shadows.items()
    grow(cache, shadows, 10)
    scores = torch.randn(HK, 10)
    cache.compact(name, scores, 4, sink=1, recent=1)
    for h in range(HK):
        middle = scores[h, 1:9].topk(2).indices + 1
        for layer in range(LAYERS):
            shadow.keep(layer, h, sorted([0, 9, *middle.tolist()]))
    step = grow(cache, shadows, 2)
    assert not step.ragged
    assert step.head_seqlens(0).tolist() == [6]
    check(step, shadows, 2)


def test_forks_of_ragged_sequences_share_prefixes() -> None:
    """Cascade reads what all heads of all layers have in common; each fork has its own end."""
    cache = make(num_pages=60)
    name = cache.allocate()
    shadow = {name: Shadow()}
    grow(cache, shadow, 30)
    cache.stream(name, [0, 2], sink=4, recent=9)
    for layer in range(LAYERS):
        for h in (0, 2):
            shadow[name].keep(layer, h, [*range(4), *range(21, 30)])
    shadows = {name: shadow[name]} | {cache.fork(name): shadow[name].copy() for _ in range(2)}
    step = grow(cache, shadows, 3)
    check(step, shadows, 3)
    groups, prefixes = step.groups()
    assert (groups.tolist(), prefixes.tolist()) == ([0, 3], [12])
    q = torch.randn(3, 3, HQ, D)
    close = step.attention(q, layer=1, cascade=True), step.attention(q, layer=1)
    torch.testing.assert_close(*close, rtol=2e-5, atol=2e-6)


def test_what_is_refused() -> None:
    cache = make()
    name = cache.allocate()
    kv = torch.randn(9, HK, D), torch.randn(9, HK, DV)
    cache.begin([name], 9).append(*kv)
    cache.stream(name, [1], sink=1, recent=2)
    tables = torch.ones(1, 40, 4), torch.zeros(1, 40, 4)
    step = cache.begin([name], 1)
    one = kv[0][:1], kv[1][:1]
    step.append(*one, rope=tables, positions=torch.tensor([9], dtype=torch.int32))
    flat = torch.zeros(10)
    calls = [
        (lambda: step.append(*one, rope=tables), "rope= without positions="),
        (lambda: cache.compact(name, flat, 3), "has lanes of different lengths"),
        (lambda: cache.compact(name, torch.zeros(2, 10), 3), r"scores has shape \(2, 10\); want"),
        (lambda: cache.compact(name, torch.zeros(HK, 9), 3), "scores for sequence 1 of 10 tokens"),
        (lambda: cache.compact(name, flat, torch.zeros(HK)), "keep is torch.float32"),
        (lambda: cache.compact(name, flat, torch.zeros(2, dtype=torch.int64)), "keep has shape"),
        (lambda: cache.stream(name, torch.ones(2).bool(), sink=1, recent=1), "heads has shape"),
        (lambda: cache.stream(name, [0], sink=-1, recent=1), "sink -1 and recent 1"),
        (lambda: cache.truncate(name, 5), "takes 5 tokens off sequence 1, whose lane 1 holds 4"),
        (lambda: cache.commit(name, [0] * 4), "was compacted"),
    ]  # fmt: skip
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    cache.truncate(name, 6)
    assert cache.head_seqlens([name]).tolist() == [[6, 0, 6]]


@settings(max_examples=15)
@given(data=st.data())
def test_any_history_of_heads_reads_back(data: st.DataObject) -> None:
    cache = make(num_pages=60, page_size=data.draw(st.integers(1, 5)))
    shadows: dict[int, Shadow] = {cache.allocate(): Shadow()}
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["grow", "grow", "fork", "compact", "stream"]))
        name = data.draw(st.sampled_from(sorted(shadows)))
        shadow, length = shadows[name], cache.length(name)
        own = [k.shape[0] for k, _ in shadow.lanes]
        if action == "grow":
            grow(cache, shadows, data.draw(st.integers(0, 4)))
        elif action == "fork" and len(shadows) < 4:
            shadows[cache.fork(name)] = shadow.copy()
        elif action == "stream":
            sink, recent = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
            heads = data.draw(st.lists(st.integers(0, HK - 1), unique=True))
            cache.stream(name, heads, sink=sink, recent=recent)
            for layer in range(LAYERS):
                for h in heads:
                    n = own[layer * HK + h]
                    shadow.keep(
                        layer, h, sorted({*range(min(sink, n)), *range(n)[n - min(recent, n) :]})
                    )
        elif action == "compact":
            scores = torch.randn(LAYERS, HK, length)
            keep = [data.draw(st.integers(0, n)) for n in own]
            cache.compact(name, scores, torch.tensor(keep).view(LAYERS, HK))
            for lane, n in enumerate(keep):
                best = scores.flatten(0, 1)[lane, : own[lane]].topk(n).indices
                shadow.keep(*divmod(lane, HK), sorted(best.tolist()))
    check(grow(cache, shadows, 1), shadows, 1)
