"""`PagedKVCache` against lists of dense keys and values.

Every sequence of the cache is shadowed by its own K and V in contiguous tensors. Whatever is done
to the cache, attention over it equals `flash_attention` over the shadow: in fp32 and bf16 the
pages hold the very values, so both run the same arithmetic up to the order of sums.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import attnforge
from attnforge import PagedKVCache

HK, HQ, D, DV = 2, 4, 8, 6
Dense = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _checks() -> Iterator[None]:
    """Freed pages are filled with NaN in every test here."""
    with attnforge.debug(checks=True):
        yield


def make(**options: Any) -> PagedKVCache:
    defaults = {"num_pages": 24, "page_size": 4, "dtype": torch.float32, "v_head_dim": DV}
    return PagedKVCache(num_kv_heads=HK, head_dim=D, **{**defaults, **options})


def tokens(n: int, dtype: torch.dtype = torch.float32) -> Dense:
    """k [n, Hk, D] and v of n new tokens."""
    return torch.randn(n, HK, D).to(dtype), torch.randn(n, HK, DV).to(dtype)


def join(a: Dense, b: Dense) -> Dense:
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])


def write(cache: PagedKVCache, names: list[int], new: list[Dense], layer: int = 0) -> Any:
    step = cache.begin(names, [k.shape[0] for k, _ in new])
    step.append(torch.cat([k for k, _ in new]), torch.cat([v for _, v in new]), layer=layer)
    return step


def dense(q: Tensor, kv: Dense, **options: Any) -> Tensor:
    """q [S, Hq, D] over one sequence."""
    k, v = kv
    out: Tensor = attnforge.flash_attention(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), causal=True, **options
    )
    return out[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_prefill_decode_and_mixed_steps(kv_layout: str, page_size: int) -> None:
    cache = make(num_pages=60, page_size=page_size, kv_layout=kv_layout)
    names = [cache.allocate() for _ in range(3)]
    shadow = [tokens(0) for _ in names]
    for rows in ([5, 1, 9], [1, 1, 1], [0, 7, 1], [2, 2, 2]):
        new = [tokens(n) for n in rows]
        step = write(cache, names, new)
        shadow = [join(a, b) for a, b in zip(shadow, new, strict=True)]
        q = torch.randn(sum(rows), HQ, D)
        out = step.attention(q)
        for part, own, kv in zip(out.split(rows), q.split(rows), shadow, strict=True):
            close(part, dense(own, kv))
    assert cache.cache_seqlens(names).tolist() == [8, 11, 13]
    q = torch.randn(3, 2, HQ, D)
    close(cache.attention(q, names), step.attention(q))
    masked = cache.attention(q, names, window_size=(3, 0), softcap=2.0)
    for i, kv in enumerate(shadow):
        close(masked[i], dense(q[i], kv, window_size=(3, 0), softcap=2.0))


def test_forks_do_not_see_each_other() -> None:
    """Copy-on-write: a beam's two branches diverge inside a shared page, in every layer."""
    cache = make(num_layers=2)
    a = cache.allocate()
    first = [tokens(6), tokens(6)]
    step = cache.begin([a], [6])
    for layer, (k, v) in enumerate(first):
        step.append(k, v, layer=layer)
    b = cache.fork(a)
    assert cache.stats().used_pages == 2
    new = [[tokens(1), tokens(2)] for _ in range(2)]  # of each layer, for a and b
    step = cache.begin([a, b], [1, 2])
    q = torch.randn(3, HQ, D)
    for layer in range(2):
        step.append(*(torch.cat(x) for x in zip(*new[layer], strict=True)), layer=layer)
    for layer in range(2):
        out = step.attention(q, layer=layer)
        close(out[:1], dense(q[:1], join(first[layer], new[layer][0])))
        close(out[1:], dense(q[1:], join(first[layer], new[layer][1])))
    assert cache.stats()[-2:] == (1, 0)  # one page copied


def test_prefixes_are_found_and_shared() -> None:
    cache = make()
    prompt = list(range(11))
    a = cache.allocate(prompt[:-1])
    assert cache.length(a) == 0
    kv = tokens(11)
    write(cache, [a], [kv])
    cache.commit(a, prompt)
    other = [*range(9), 99, 98]
    assert cache.match_prefix(torch.tensor(other)) == 8
    assert cache.match_prefix(other, space=1) == 0
    b = cache.allocate(other[:-1])
    assert cache.length(b) == 8
    rest = tokens(3)
    step = write(cache, [b], [rest])
    q = torch.randn(3, HQ, D)
    close(step.attention(q), dense(q, join((kv[0][:8], kv[1][:8]), rest)))
    assert cache.block_table([a, b])[:, :2].unique(dim=0).shape[0] == 1
    s = cache.stats()
    assert (s.prompt_tokens, s.prefix_tokens, s.prefix_pages, s.used_pages) == (20, 8, 2, 4)


@pytest.mark.parametrize("rows", [1, 3])
def test_shared_prefixes_are_read_once(rows: int) -> None:
    """Cascade over a batch with two groups and two loners equals plain attention."""
    cache = make(num_pages=60)
    names, plan = [], ([1] * 9, [2] * 4 + [3] * 7, [1] * 14, [1] * 9, [1] * 12, [4])
    for ids in (plan[0], plan[1], plan[2], plan[3], plan[1], plan[4], plan[5]):
        name = cache.allocate(ids)
        write(cache, [name], [tokens(len(ids) - cache.length(name))])
        cache.commit(name, ids)
        names.append(name)
    order = [names[i] for i in (5, 1, 4, 0, 2, 3, 6)]
    step = cache.begin(order, rows)
    step.append(torch.randn(7, rows, HK, D), torch.randn(7, rows, HK, DV))
    groups, prefixes = step.groups()
    assert groups.tolist() == [0, 1, 3, 6, 7]
    assert prefixes.tolist() == [0, 8, 8, 0]
    q = torch.randn(7, rows, HQ, D)
    close(step.attention(q, cascade=True), step.attention(q))


def test_truncated_tokens_are_gone() -> None:
    cache = make()
    a = cache.allocate()
    kv, wrong, right = tokens(5), tokens(6), tokens(2)
    write(cache, [a], [kv])
    write(cache, [a], [wrong])
    cache.truncate(a, 5)
    step = write(cache, [a], [right])
    q = torch.randn(2, HQ, D)
    close(step.attention(q), dense(q, join(kv, right)))


@pytest.mark.parametrize("dtype", ["fp32", "fp8", "int8", "int4"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_compaction_keeps_the_best_tokens(dtype: str, kv_layout: str) -> None:
    cache = make(dtype=dtype, kv_layout=kv_layout, page_bounds=True, num_layers=2)
    a = cache.allocate()
    step = cache.begin([a], [11])
    kv = tokens(11)
    for layer in range(2):
        step.append(*kv, layer=layer)
    twin = cache.fork(a)
    q = torch.randn(1, 1, HQ, D)
    before = cache.attention(q, [twin], layer=1)
    scores = torch.tensor([0, 9, 0, 0, 8, 0, 7, 0, -torch.inf, 0, 0])
    cache.compact(a, scores, 5, sink=1, recent=1)
    kept = [0, 1, 4, 6, 10]
    assert cache.length(a) == 5
    b = cache.allocate()  # the same tokens, written one after another
    step = cache.begin([b], [5])
    for layer in range(2):
        step.append(kv[0][kept], kv[1][kept], layer=layer)
    for layer in range(2):
        assert torch.equal(*(cache.attention(q, [x], layer=layer) for x in (a, b)))
    assert torch.equal(cache.attention(q, [twin], layer=1), before)
    bounds = cache.storage.layer(1).bounds
    assert bounds is not None
    for name, exact in ((a, b), (b, b)):
        own, page = cache.block_table([name])[0].long(), cache.block_table([exact])[0].long()
        assert bool((bounds[0][own] <= bounds[0][page]).all())
        assert bool((bounds[1][own] >= bounds[1][page]).all())


# Rounding of one element against its token's largest: half a step of the code.
STEP = {"fp8": 2.0**-4, "int8": 1 / 254, "int4": 1 / 15}


@pytest.mark.parametrize("dtype", STEP)
def test_codes_are_within_half_a_step(dtype: str) -> None:
    """One token attends to itself alone: the output is its value as stored."""
    cache = make(dtype=dtype)
    names = [cache.allocate() for _ in range(5)]
    k, v = (
        torch.randn(5, 1, HK, D),
        torch.randn(5, 1, HK, DV) * torch.logspace(-3, 1, 5).view(5, 1, 1, 1),
    )
    v[1, 0, 0] = 0.0
    v[2, 0, 1] = 3.0  # a token without a range
    cache.append(k, v, names)
    out = cache.attention(torch.randn(5, 1, HQ, D), names)
    error = (out.view(5, 1, HK, -1, DV) - v.unsqueeze(3)).abs()
    if dtype == "fp8":
        limit = v.abs().unsqueeze(3) * STEP[dtype] + 2.0**-10  # subnormal codes
    else:
        limit = v.abs().amax(-1, keepdim=True).unsqueeze(3) * STEP[dtype] * 1.001
    assert bool((error <= limit).all())
    assert not out[1, 0, :2].any()


def test_page_bounds_follow_the_keys() -> None:
    cache = make(page_bounds=True)
    a = cache.allocate()
    kv = tokens(7)
    for part in (slice(0, 3), slice(3, 7)):
        write(cache, [a], [(kv[0][part], kv[1][part])])
    bounds = cache.storage.layer(0).bounds
    assert bounds is not None
    pages = cache.block_table([a])[0].long()
    for page, rows in zip(pages, (kv[0][:4], kv[0][4:]), strict=True):
        assert torch.equal(bounds[0][page], rows.amin(0))
        assert torch.equal(bounds[1][page], rows.amax(0))


# ---- isolation ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "int8", "int4"])
def test_freed_pages_reach_nobody(dtype: str) -> None:
    """Bitwise: a request on pages full of another's data, of NaN, or fresh gives one answer."""
    q, kv, secret = torch.randn(1, 1, HQ, D), tokens(6), tokens(24)
    if dtype == "bf16":
        q, kv, secret = (
            q.bfloat16(),
            (kv[0].bfloat16(), kv[1].bfloat16()),
            (secret[0].bfloat16() * 1e30, secret[1].bfloat16() * 1e30),
        )
    outs = []
    for checks, used in ((False, False), (False, True), (True, True)):
        with attnforge.debug(checks=checks):
            cache = make(num_pages=6, dtype=dtype)
            if used:
                old = cache.allocate()
                write(cache, [old], [secret])
                assert cache.stats().free_pages == 0
                cache.free(old)
            name = cache.allocate()
            write(cache, [name], [kv])
            outs.append(cache.attention(q, [name]))
    assert bool(outs[0].isfinite().all())
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_freed_pages_are_poisoned_with_checks_on() -> None:
    """Who reads a page after freeing it reads NaN, in every storage and by every way of freeing."""
    for dtype in ("fp32", "fp8", "int8", "int4"):
        cache = make(dtype=dtype)
        a = cache.allocate()
        step = write(cache, [a], [tokens(9)])
        q = torch.randn(9, HQ, D)
        assert bool(step.attention(q).isfinite().all())
        cache.truncate(a, 4)
        assert bool(step.attention(q)[4:].isnan().all())  # rows that see the pages given up
        cache.commit(a, [1] * 4)
        cache.free(a)
        assert cache.stats().evictable_pages == 1
        cache.evict(1)
        assert bool(step.attention(q).isnan().all())


@pytest.mark.parametrize("page", [-1, 24, -(2**31), 2**31 - 1])
def test_foreign_page_ids(page: int) -> None:
    """Behind a length any id may stand; within it, it is named. Other rows are bitwise the same."""
    cache = make()
    names = [cache.allocate(), cache.allocate()]
    step = write(cache, names, [tokens(5), tokens(9)])
    q = torch.randn(14, HQ, D)
    good = step.attention(q)
    step.block_table[0, 2] = page
    assert torch.equal(step.attention(q), good)
    step.block_table[0, 1] = page
    with pytest.raises(ValueError, match=r"block_table\[0, 1\] is"):
        step.attention(q)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    cache = make(num_pages=60)
    names = [cache.allocate() for _ in range(4)]
    write(cache, names, [tokens(n) for n in (9, 1, 30, 4)])
    q = torch.randn(4, 1, HQ, D)
    together = cache.attention(q, names)
    for i, name in enumerate(names):
        assert torch.equal(cache.attention(q[i : i + 1], [name])[0], together[i])


# ---- exhaustion, errors, threads ----


def test_a_full_pool_changes_nothing() -> None:
    cache = make(num_pages=3)
    a, b = cache.allocate(), cache.allocate()
    write(cache, [a, b], [tokens(4), tokens(3)])
    before = cache.stats(), cache.cache_seqlens([a, b]).tolist()
    with pytest.raises(attnforge.paged_cache.OutOfPages, match="2 pages are needed; 1 of 3"):
        cache.begin([a, b], [1, 2])
    assert (cache.stats(), cache.cache_seqlens([a, b]).tolist()) == before
    cache.free(b)
    cache.begin([a], 5)
    assert issubclass(attnforge.paged_cache.OutOfPages, RuntimeError)


def test_what_is_refused() -> None:
    cache = make()
    a = cache.allocate()
    gone = cache.allocate()
    cache.free(gone)
    k, v = tokens(3)
    calls = [
        (lambda: cache.append(k, v, [a]), "without rows"),
        (lambda: cache.append(k, v, [a], rows=[2]), "this step gives"),
        (lambda: cache.append(k[None], v[None], [gone]), "was freed already"),
        (lambda: cache.free(99), "sequence 99 is not of this pool"),
        (lambda: make(dtype="fp7"), "want one of fp32"),
        (lambda: make(dtype=torch.int16), "want one of fp32"),
        (lambda: make(dtype="int4", v_head_dim=3), "want even ones"),
        (lambda: make(kv_layout="DNH"), "kv_layout is 'DNH'"),
        (lambda: make(v_head_dim=0), "at least 1 of each"),
        (lambda: make(num_pages=0), "num_pages 0"),
        (lambda: make(num_layers=2).append(k[None], v[None], [1]), "2 layers, which grow together"),
        (lambda: cache.match_prefix(torch.zeros(2, 2)), "ids of one sequence, 1-D"),
        (
            lambda: make(dtype="int8").begin([], []).append(k[:0], v[:0], rope=(k, k)),
            "turn k before append",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_missing_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attnforge._host", None)
    with pytest.raises(ImportError, match=r"_host is not built; .* build_ext --inplace"):
        make()


def test_an_empty_step() -> None:
    cache = make()
    step = cache.begin([], [])
    step.append(*tokens(0))
    assert step.attention(torch.randn(0, HQ, D)).shape == (0, HQ, DV)


def test_memory_is_counted() -> None:
    per_token = HK * (D + DV) * 4
    assert make().memory_bytes() == 24 * 4 * per_token
    assert make(num_layers=3).memory_bytes(2) == 3 * 2 * 4 * per_token
    assert make(dtype="int8").memory_bytes() == 24 * 4 * (HK * (D + DV) + HK * 2 * 4)
    assert make(dtype="int4").memory_bytes() == 24 * 4 * (HK * (D + DV) // 2 + HK * 4 * 4)


def test_threads_share_a_cache() -> None:
    """Requests come and go in threads, on a pool too small for all; none sees another's tokens."""
    cache = make(num_pages=16)
    prefix = tokens(4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(12):
                name = cache.allocate([7] * 4)
                kv = (prefix[0][:0], prefix[1][:0]) if cache.length(name) == 0 else prefix
                if cache.length(name) == 0:
                    new = prefix
                else:
                    n = int(torch.randint(1, 5, (1,), generator=generator))
                    new = (torch.randn(n, HK, D, generator=generator),
                           torch.randn(n, HK, DV, generator=generator))  # fmt: skip
                try:
                    step = write(cache, [name], [new])
                    q = torch.randn(new[0].shape[0], HQ, D, generator=generator)
                    close(step.attention(q), dense(q, join(kv, new)))
                    cache.commit(name, [7] * 4)
                except attnforge.paged_cache.OutOfPages:
                    pass
                cache.free(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cache.stats().sequences == 0


@settings(max_examples=25)
@given(data=st.data())
def test_any_history_reads_back(data: st.DataObject) -> None:
    """Random appends, forks, commits, truncations and frees; then everybody attends."""
    size = data.draw(st.integers(1, 5))
    cache = make(num_pages=40, page_size=size)
    shadow: dict[int, tuple[list[int], Dense]] = {}
    made: dict[tuple[int, ...], Dense] = {}  # a token's K and V depend on all tokens before it

    def values(ids: list[int]) -> Dense:
        parts = [made.setdefault(tuple(ids[: i + 1]), tokens(1)) for i in range(len(ids))]
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

    for _ in range(data.draw(st.integers(1, 14))):
        action = data.draw(st.sampled_from(["new", "new", "append", "fork", "cut", "free"]))
        if action == "new" or not shadow:
            ids = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
            name = cache.allocate(ids)
            found, kv = cache.length(name), values(ids)
            write(cache, [name], [(kv[0][found:], kv[1][found:])])
            cache.commit(name, ids)
            shadow[name] = ids, kv
            continue
        name = data.draw(st.sampled_from(sorted(shadow)))
        ids, kv = shadow[name]
        if action == "append":
            more = [*ids, *data.draw(st.lists(st.integers(0, 1), max_size=4))]
            kv = values(more)
            write(cache, [name], [(kv[0][len(ids) :], kv[1][len(ids) :])])
            shadow[name] = more, kv
        elif action == "fork":
            shadow[cache.fork(name)] = shadow[name]
        elif action == "cut":
            n = data.draw(st.integers(1, len(ids)))
            cache.truncate(name, n)
            shadow[name] = ids[:n], (kv[0][:n], kv[1][:n])
        else:
            cache.free(name)
            del shadow[name]
    if shadow:
        names = list(shadow)
        q = torch.randn(len(names), 1, HQ, D)
        out = cache.attention(q, names)
        for i, name in enumerate(names):
            close(out[i], dense(q[i], shadow[name][1]))
