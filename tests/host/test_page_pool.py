"""The page pool by example: what is shared, what is evicted, what is refused, and threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

from attnforge import _host


def table(buffer: Any) -> list[int]:
    return list(memoryview(buffer).cast("i"))


def filled(pool: Any, tokens: list[int], space: int = 0) -> int:
    """A sequence that holds `tokens`, committed."""
    name, found = pool.create(tokens, space)
    try:
        pool.extend([name], [len(tokens) - found])
    except _host.OutOfPages:
        pool.free(name)
        raise
    pool.commit(name, tokens, space)
    return int(name)


def test_a_common_prefix_is_stored_once() -> None:
    pool = _host.PagePool(16, 4)
    a = filled(pool, [1] * 8 + [2] * 3)
    b = filled(pool, [1] * 8 + [3] * 5)
    assert pool.pages(a)[:2] == pool.pages(b)[:2]
    assert set(pool.pages(a)[2:]).isdisjoint(pool.pages(b)[2:])
    assert pool.match_prefix([1] * 8 + [3] * 4 + [9]) == 12
    assert pool.match_prefix([1] * 7) == 4  # whole pages only
    assert pool.match_prefix([1] * 8, space=1) == 0


def test_sequences_computed_apart_share_after_commit() -> None:
    """Two prompts run before either was known: committing the second frees its copy."""
    pool = _host.PagePool(8, 2)
    a, b = pool.create()[0], pool.create()[0]
    pool.extend([a, b], [5, 4])
    own = pool.pages(b)
    assert pool.commit(a, [7] * 5) == []
    assert sorted(pool.commit(b, [7] * 4)) == sorted(own)
    assert pool.pages(b) == pool.pages(a)[:2]


def test_prefixes_branch_inside_a_run() -> None:
    pool = _host.PagePool(32, 1)
    filled(pool, [1, 2, 3, 4])
    filled(pool, [1, 2, 5])
    filled(pool, [1, 2, 3, 4, 6])
    for tokens, found in (([1, 2, 5], 3), ([1, 2, 3, 9], 3), ([1, 2, 3, 4, 6, 7], 5), ([2], 0)):
        assert pool.match_prefix(tokens) == found


def test_least_recently_used_ends_go_first() -> None:
    pool = _host.PagePool(6, 1)
    names = [filled(pool, tokens) for tokens in ([1, 2, 3], [1, 4], [5])]
    assert pool.state()["evictable_pages"] == 0  # all in use
    last = pool.pages(names[1])[-1]
    for name in names:
        pool.free(name)
    pool.match_prefix([1, 2, 3])
    assert pool.evict(1) == [last]
    pool.match_prefix([5])
    pool.evict(1)  # the end of [1, 2, 3]: its beginning stays
    assert [pool.match_prefix(t) for t in ([1, 2, 3], [1, 4], [5])] == [2, 1, 1]
    assert len(pool.evict(9)) == 3
    assert pool.state()["free_pages"] == 6


def test_extend_evicts_what_nobody_uses() -> None:
    pool = _host.PagePool(4, 2)
    pool.free(filled(pool, [1] * 6))
    name = pool.create()[0]
    _, _, evicted = pool.extend([name], [5])
    assert len(evicted) == 2
    assert pool.match_prefix([1] * 6) == 2
    with pytest.raises(_host.OutOfPages, match="3 pages are needed; 0 of 4 are free and 1 more"):
        pool.extend([pool.create()[0]], [6])


def test_the_last_holder_of_a_shared_page_writes_in_place() -> None:
    pool = _host.PagePool(4, 4)
    a = pool.create()[0]
    pool.extend([a], [2])
    b = pool.fork(a)
    (page,) = pool.pages(a)
    assert pool.need_copy(page)
    source, target, _ = pool.extend([a, b], [1, 1])
    assert (source, pool.pages(b)) == ([page], [page])
    assert pool.pages(a) == target
    assert table(pool.block_table([a, b], 2)) == [target[0], -1, page, -1]


def test_sinks_and_recent_tokens_outlive_compaction() -> None:
    pool = _host.PagePool(4, 2)
    name = pool.create()[0]
    pool.extend([name], [8])
    pages = pool.pages(name)
    moves, freed = pool.compact(name, [0, 0, 5, 5, -math.inf, 9, 0, 0], 4, 1, 1)
    # kept: 0 (sink), 2 (a tie: the earlier), 5 (best), 7 (recent)
    assert table(moves) == [pages[1], 0, pages[0], 1, -1, pages[2], 1, pages[1], 0, -1,
                            pages[3], 1, pages[1], 1, -1]  # fmt: skip
    assert freed == pages[2:]


def test_compaction_leaves_shared_pages_alone() -> None:
    """The first page changes behind its first token: it is replaced, with what it keeps."""
    pool = _host.PagePool(5, 2)
    name = pool.create()[0]
    pool.extend([name], [4])
    twin, old = pool.fork(name), pool.pages(name)
    moves, freed = pool.compact(name, [1, 0, 1, 1], 2)
    (new,) = pool.pages(name)
    assert table(moves) == [old[0], 0, new, 0, -1, old[1], 0, new, 1, -1]
    assert (new in old, freed, pool.pages(twin)) == (False, [], old)


def test_lanes_of_different_lengths() -> None:
    """They lie in the same pages, grow together and write in different places."""
    pool = _host.PagePool(9, 2, lanes=3)
    name = pool.create()[0]
    pool.extend([name], [5])
    pages = pool.pages(name)
    assert table(pool.lane_lengths([name])) == []
    moves, freed = pool.compact(name, [0, 1, 0, 1, 0] * 3, [5, 2, 0])
    assert table(moves) == [pages[0], 1, pages[0], 0, 1, pages[1], 1, pages[0], 1, 1]
    assert freed == []
    assert table(pool.lane_lengths([name])) == [5, 2, 0]
    assert table(pool.lengths([name])) == [5]
    twin = pool.fork(name)
    source, target, _ = pool.extend([twin], [1])  # slots 5, 2 and 0: all three pages
    assert (source, pool.pages(twin)) == (pages, target)
    assert pool.extend([name], [1])[0] == []  # the last holder writes in place
    with pytest.raises(ValueError, match=r"whose lane 2 holds 1; lanes .* truncate to 5 or more"):
        pool.truncate(name, 4)
    pool.truncate(name, 5)
    assert table(pool.lane_lengths([name, twin])) == [5, 2, 0, 6, 3, 1]
    moves, freed = pool.compact(name, [], [2, 2, 0])  # equals: the first tokens
    assert (table(moves), freed) == ([], pages[1:])
    pool.compact(name, [], [0, 0, 0])
    assert table(pool.lane_lengths([name])) == []  # alike again


def test_a_page_in_use_protects_what_lies_before_it() -> None:
    pool = _host.PagePool(4, 1)
    names = [filled(pool, [1, 2]), filled(pool, [1, 3])]
    last = pool.pages(names[0])[1]
    pool.share([last])  # somebody with a table of their own
    for name in names:
        pool.free(name)
    assert pool.state()["evictable_pages"] == 1
    with pytest.raises(_host.OutOfPages, match="1 of 4 are free and 1 more"):
        pool.extend([pool.create()[0]], [3])
    assert len(pool.evict(4)) == 1
    assert pool.match_prefix([1, 2]) == 2
    assert pool.release([last]) == []
    assert len(pool.evict(4)) == 2


def seq(pool: Any) -> int:
    name = pool.create()[0]
    pool.extend([name], [3])
    return int(name)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no pages": (lambda p: _host.PagePool(0, 4), "num_pages 0 is not in 1"),
    "page size": (lambda p: _host.PagePool(4, 0), "page_size 0 is not at least 1"),
    "foreign page": (lambda p: p.release([9]), "page 9 is not of this pool"),
    "negative page": (lambda p: p.share([-1]), "page -1 is not of this pool"),
    "free page shared": (lambda p: p.share([2]), "page 2 is free"),
    "double release": (lambda p: p.release(p.allocate(1) * 2), "released more often"),
    "foreign sequence": (lambda p: p.fork(7), "sequence 7 is not of this pool"),
    "negative count": (lambda p: p.extend([seq(p)], [-1]), "count -1 of sequence 1"),
    "counts": (lambda p: p.extend([seq(p)], [1, 1]), "1 sequences and 2 counts"),
    "named twice": (lambda p: p.extend([seq(p)] * 2, [1, 1]), "sequence 1 is named twice"),
    "length": (lambda p: p.truncate(seq(p), 4), r"length 4 of sequence 1 is not in 0\.\.3"),
    "commit": (lambda p: p.commit(seq(p), [1] * 4), "4 tokens for sequence 1, which holds 3"),
    "columns": (lambda p: p.block_table([seq(p)], 1), "1 columns, but a sequence has 2 pages"),
    "scores": (lambda p: p.compact(seq(p), [1.0], 1), "1 scores for sequence 1 of 3 tokens"),
    "NaN": (lambda p: p.compact(seq(p), [1, math.nan, 1], 1), "score of token 1 is NaN"),
    "lanes": (lambda p: p.compact(seq(p), [1.0] * 6, [1, 1]), "keep has 2 entries; pass one for"),
    "budget": (lambda p: p.compact(seq(p), [1, 1, 1], 1, 1, 1), "keep 2 tokens already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    pool = _host.PagePool(4, 2)
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(pool)
    if case == "double release":
        assert pool.references(0) == 1  # nothing was taken


def test_threads_share_a_pool() -> None:
    """More demand than pages: threads see OutOfPages, and everything is there again at the end."""
    pool = _host.PagePool(64, 4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(200):
                tokens = [seed % 2] * 8 + [seed, i]
                try:
                    name = filled(pool, tokens)
                except _host.OutOfPages:
                    continue
                twin = pool.fork(name)
                try:
                    pool.extend([name, twin], [3, 5])
                    assert set(pool.pages(name)[2:]).isdisjoint(pool.pages(twin)[2:])
                except _host.OutOfPages:
                    pass
                pool.free(name)
                pool.free(twin)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    pool.evict(64)
    assert pool.state()["sequences"] == 0
    assert pool.state()["free_pages"] == 64
