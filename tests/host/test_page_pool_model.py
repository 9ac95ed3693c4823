"""Random histories of a page pool against plain Python lists of tokens, one per lane.

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
    sequences: dict[int, list[list[int]]]  # tokens of each lane
    compacted: set[int]

    @initialize(page_size=st.integers(1, 4), lanes=st.integers(1, 3))
    def start(self, page_size: int, lanes: int) -> None:
        self.size, self.lanes = page_size, lanes
        self.pool = _host.PagePool(NUM_PAGES, page_size, lanes)
        self.memory = [self.blank() for _ in range(NUM_PAGES)]
        self.sequences = {}
        self.compacted = set()
        self.gone: list[int] = []
        self.known: set[tuple[int, tuple[int, ...]]] = set()  # (space, whole pages) ever committed

    def blank(self) -> list[list[int]]:
        """A page without content, [slot][lane]."""
        return [[FREE] * self.lanes for _ in range(self.size)]

    def length(self, name: int) -> int:
        return max(map(len, self.sequences[name]))

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.sequences)), label="sequence")

    def poison(self, pages: list[int]) -> None:
        for page in pages:
            assert self.pool.references(page) == 0
            self.memory[page] = self.blank()

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
        self.sequences[name] = [tokens[:found]] * self.lanes
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
                -(-(self.length(n) + len(t)) // self.size) - len(p)
                for n, t, p in zip(names, new, tables, strict=True)
            )
            # A token of each lane may meet a shared page, and several tokens several of them.
            copies = sum(self.lanes * min(len(t), 2 + len(t) // self.size) for t in new)
            assert grown + copies > before["free_pages"] + before["evictable_pages"]
            return
        for page in evicted:
            self.memory[page] = self.blank()
        assert all(self.pool.references(page) == 1 for page in target)
        for a, b in zip(source, target, strict=True):
            self.memory[b] = [list(slot) for slot in self.memory[a]]
        for name, tokens in zip(names, new, strict=True):
            pages = self.pool.pages(name)
            for lane, own in enumerate(self.sequences[name]):
                for i, token in enumerate(tokens, len(own)):
                    page, slot = self.slot(pages, i)
                    assert not self.pool.need_copy(page)
                    self.memory[page][slot][lane] = token
            self.sequences[name] = [own + tokens for own in self.sequences[name]]

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
        length = data.draw(st.integers(0, self.length(name)))
        gone = self.length(name) - length
        if gone > min(map(len, self.sequences[name])):
            with pytest.raises(ValueError, match="lanes of different lengths lose as many"):
                self.pool.truncate(name, length)
            return
        self.poison(self.pool.truncate(name, length))
        self.sequences[name] = [own[: len(own) - gone] for own in self.sequences[name]]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), space=SPACE)
    def commit(self, data: st.DataObject, space: int) -> None:
        name = self.pick(data)
        tokens = self.sequences[name][0]
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
        lanes, length = self.sequences[name], self.length(name)
        each = len({len(own) for own in lanes}) > 1 or (self.lanes > 1 and data.draw(st.booleans()))
        lists = lanes if each else lanes[:1]
        scores = [data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
                  for _ in lists]  # fmt: skip
        budgets = [data.draw(st.integers(0, len(own))) for own in lists]
        sink = data.draw(st.integers(0, min(budgets)))
        recent = data.draw(st.integers(0, min(budgets) - sink))
        before = self.pool.state()
        try:
            moves, freed = self.pool.compact(
                name,
                [x for row in scores for x in row],
                budgets if each else budgets[0],
                sink,
                recent,
            )
        except _host.OutOfPages:  # shared pages must be replaced before the old ones can go
            assert self.pool.state() == before
            return
        rows = table(moves)
        rows = [tuple(rows[n : n + 5]) for n in range(0, len(rows), 5)]
        held = [list(self.memory[page][slot]) for page, slot, *_ in rows]
        for values, (_, _, page, slot, lane) in zip(held, rows, strict=True):
            assert not self.pool.need_copy(page)
            assert (lane >= 0) == (len(lists) > 1)
            for one in range(self.lanes) if lane < 0 else [lane]:
                self.memory[page][slot][one] = values[one]
        self.poison(freed)
        found = []
        for own, keep, points in zip(lists, budgets, scores, strict=True):
            forced = {*range(sink), *range(len(own) - recent, len(own))}
            order = sorted(range(len(own)), key=lambda i: (i not in forced, -points[i], i))
            self.compacted |= {name} if keep < len(own) else set()
            found.append(sorted(order[:keep]))
        self.sequences[name] = [
            [own[i] for i in kept]
            for own, kept in zip(lanes, found if each else found * self.lanes, strict=True)
        ]

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
        assert table(self.pool.lengths(names)) == [self.length(n) for n in names]
        lengths = [[len(own) for own in self.sequences[n]] for n in names]
        flat = (
            [n for own in lengths for n in own] if any(len(set(own)) > 1 for own in lengths) else []
        )
        assert table(self.pool.lane_lengths(names)) == flat
        for name in names:
            pages = self.pool.pages(name)
            assert len(pages) == -(-self.length(name) // self.size)
            for lane, own in enumerate(self.sequences[name]):
                places = [self.slot(pages, i) for i in range(len(own))]
                assert [self.memory[page][slot][lane] for page, slot in places] == own

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
