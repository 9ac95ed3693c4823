"""Random histories of a page pool against plain Python lists of tokens.

The model knows nothing of pages. It writes each token into the memory slot that the pool assigns,
makes the copies and moves that the pool asks for, and poisons what the pool calls free. Then every
sequence must read back as its own list: no lost token, no other sequence's, none from a freed page.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from attnforge import _host

FREE = -1  # poison
NUM_PAGES = 12
TOKENS = st.lists(st.integers(0, 1), max_size=9)  # a tiny alphabet: prefixes meet and branch
SPACE = st.integers(0, 1)


def table(buffer: Any) -> list[int]:
    return list(memoryview(buffer).cast("i"))


class Pool(RuleBasedStateMachine):
    sequences: dict[int, list[int]]
    compacted: set[int]

    @initialize(page_size=st.integers(1, 4))
    def start(self, page_size: int) -> None:
        self.size = page_size
        self.pool = _host.PagePool(NUM_PAGES, page_size)
        self.memory = [[FREE] * page_size for _ in range(NUM_PAGES)]
        self.sequences = {}
        self.compacted = set()
        self.gone: list[int] = []
        self.known: set[tuple[int, tuple[int, ...]]] = set()  # (space, whole pages) ever committed

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.sequences)), label="sequence")

    def poison(self, pages: list[int]) -> None:
        for page in pages:
            assert self.pool.references(page) == 0
            self.memory[page] = [FREE] * self.size

    def slot(self, pages: list[int], token: int) -> tuple[int, int]:
        return pages[token // self.size], token % self.size

    @rule(tokens=TOKENS, space=SPACE)
    def prompt(self, tokens: list[int], space: int) -> None:
        known = self.pool.match_prefix(tokens, space)
        name, found = self.pool.create(tokens, space)
        assert found == known <= len(tokens)
        assert found == 0 or (space, tuple(tokens[:found])) in self.known
        assert name not in self.sequences
        assert name not in self.gone
        self.sequences[name] = tokens[:found]
        self.append([name], [tokens[found:]])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        names = data.draw(
            st.lists(st.sampled_from(sorted(self.sequences)), min_size=1, max_size=3, unique=True)
        )
        self.append(names, [data.draw(st.lists(st.integers(0, 1), max_size=3)) for _ in names])

    def append(self, names: list[int], new: list[list[int]]) -> None:
        before = self.pool.state()
        tables = [self.pool.pages(name) for name in names]
        source: list[int] | None
        try:
            source, target, evicted = self.pool.extend(names, [len(t) for t in new])
        except _host.OutOfPages:
            source = None
        if source is None:
            assert self.pool.state() == before
            assert [self.pool.pages(name) for name in names] == tables
            grown = sum(
                -(-(len(self.sequences[n]) + len(t)) // self.size) - len(p)
                for n, t, p in zip(names, new, tables, strict=True)
            )
            assert grown + len(names) > before["free_pages"] + before["evictable_pages"]
            return
        for page in evicted:
            self.memory[page] = [FREE] * self.size
        assert all(self.pool.references(page) == 1 for page in target)
        for a, b in zip(source, target, strict=True):
            self.memory[b] = list(self.memory[a])
        for name, tokens in zip(names, new, strict=True):
            pages, start = self.pool.pages(name), len(self.sequences[name])
            for i, token in enumerate(tokens, start):
                page, slot = self.slot(pages, i)
                assert not self.pool.need_copy(page)
                self.memory[page][slot] = token
            self.sequences[name] = self.sequences[name] + tokens

    @precondition(lambda self: 0 < len(self.sequences) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name = self.pick(data)
        twin = self.pool.fork(name)
        self.sequences[twin] = list(self.sequences[name])
        self.compacted |= {twin} if name in self.compacted else set()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.poison(self.pool.free(name))
        del self.sequences[name]
        self.gone.append(name)
        with pytest.raises(ValueError, match="was freed already"):
            self.pool.free(data.draw(st.sampled_from(self.gone)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        name = self.pick(data)
        length = data.draw(st.integers(0, len(self.sequences[name])))
        self.poison(self.pool.truncate(name, length))
        self.sequences[name] = self.sequences[name][:length]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), space=SPACE)
    def commit(self, data: st.DataObject, space: int) -> None:
        name = self.pick(data)
        tokens = self.sequences[name]
        tokens = tokens[: data.draw(st.integers(0, len(tokens)))]
        if name in self.compacted:
            with pytest.raises(ValueError, match="was compacted"):
                self.pool.commit(name, tokens, space)
            return
        self.poison(self.pool.commit(name, tokens, space))
        whole = len(tokens) // self.size * self.size
        self.known |= {(space, tuple(tokens[:n])) for n in range(self.size, whole + 1, self.size)}
        assert self.pool.match_prefix(tokens, space) == whole

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        name = self.pick(data)
        tokens = self.sequences[name]
        scores = data.draw(st.lists(st.integers(0, 3), min_size=len(tokens), max_size=len(tokens)))
        keep = data.draw(st.integers(0, len(tokens)))
        sink = data.draw(st.integers(0, keep))
        recent = data.draw(st.integers(0, keep - sink))
        before = self.pool.state()
        try:
            moves, freed = self.pool.compact(name, scores, keep, sink, recent)
        except _host.OutOfPages:  # shared pages must be replaced before the old ones can go
            assert self.pool.state() == before
            return
        rows = table(moves)
        held = [self.memory[page][slot] for page, slot in zip(rows[::4], rows[1::4], strict=True)]
        for value, page, slot in zip(held, rows[2::4], rows[3::4], strict=True):
            assert not self.pool.need_copy(page)
            self.memory[page][slot] = value
        self.poison(freed)
        forced = {*range(sink), *range(len(tokens) - recent, len(tokens))}
        order = sorted(range(len(tokens)), key=lambda i: (i not in forced, -scores[i], i))
        kept = sorted(order[:keep])
        self.compacted |= {name} if keep < len(tokens) else set()
        self.sequences[name] = [tokens[i] for i in kept]

    @precondition(lambda self: self.pool.state()["evictable_pages"])
    @rule(count=st.integers(0, 4))
    def evict(self, count: int) -> None:
        evictable = self.pool.state()["evictable_pages"]
        pages = self.pool.evict(count)
        assert len(pages) == min(count, evictable)
        self.poison(pages)

    @invariant()
    def reads_back(self) -> None:
        names = sorted(self.sequences)
        assert table(self.pool.lengths(names)) == [len(self.sequences[n]) for n in names]
        for name in names:
            pages = self.pool.pages(name)
            assert len(pages) == -(-len(self.sequences[name]) // self.size)
            places = [self.slot(pages, i) for i in range(len(self.sequences[name]))]
            assert [self.memory[page][slot] for page, slot in places] == self.sequences[name]

    @invariant()
    def counts_agree(self) -> None:
        held = [page for name in self.sequences for page in self.pool.pages(name)]
        state = self.pool.state()
        references = [self.pool.references(page) for page in range(NUM_PAGES)]
        assert state["free_pages"] == references.count(0)
        assert sum(references) == len(held) + state["prefix_pages"]
        assert state["evictable_pages"] <= state["prefix_pages"]
        assert all(references[page] >= held.count(page) for page in held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40)
