"""Where selection meets tuning: problem sizes of operators, the table of results, the recorder.

An operator whose best kernel or config depends on sizes says once how to read them off a call
(``sized``). Selection looks at sizes only while the table holds results for that operator, so
that a call nobody tuned pays one set look-up. The table itself is set from above (``set_table``):
this floor knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from attnforge.registry import spec as _spec
from attnforge.registry.space import Config
from attnforge.registry.spec import KernelSpec, Request

__all__ = [
    "Found",
    "Sized",
    "Table",
    "activate",
    "active",
    "bucket",
    "bucket_alone",
    "call_key",
    "call_sizes",
    "find",
    "operator",
    "operators",
    "refresh",
    "set_table",
    "sized",
]

Sizes = tuple[int, ...]


class Sized(NamedTuple):
    """How an operator shows the sizes of a call.

    names: of the sizes, such as ``("batch", "seqlen_q")``.
    read: what a call hands to ``select.launcher`` behind the backend -> the sizes.
    workload: ``"module:function"``; makes inputs of a request for a tuning run. Like a launcher
        it is named, not imported: it stands with the proof (``testing``), above this floor.
    problems: ``"module:function"``; the requests of an operator that are tuned if nobody names
        any.
    alone: the sizes of a call that each of its sequences has alone too, where the last bits may
        depend on them, such as ``("heads",)``.
    layouts: features that say how sequences lie in a call, such as packed ones, and nothing of
        what is computed for each.
    """

    names: tuple[str, ...]
    read: Callable[..., Sizes]
    workload: str
    problems: str
    alone: tuple[str, ...] = ()
    layouts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """A result of tuning: the config of one kernel for one bucket, and where it came from."""

    config: Config
    origin: str  # "user cache, bucket ..., 2026-01-31, x1.12 over default"
    preferred: bool = False  # this kernel beat the one with the best score


class Table(Protocol):
    """Results of tuning runs."""

    def has(self, op: str, request: Request) -> bool:
        """Whether results for this operator on the request's device may depend on sizes."""

    def find(self, spec: KernelSpec, request: Request) -> Found | None:
        """The result for this kernel and the request's sizes."""

    def clear(self) -> None:
        """Results may have changed: read them again."""


active: frozenset[str] = frozenset()  # operators whose selection looks at sizes
recorder: Callable[[str, tuple[Any, ...], Callable[..., Request], tuple[Any, ...]], None] | None = (
    None  # set while ``trace_shapes`` is open
)
_SIZED: dict[str, Sized] = {}
_PAIRS = frozenset({"batch", "heads"})
_table: Table | None = None
_asked: frozenset[tuple[str, str]] = frozenset()  # (operator, device type) looked up in the table


def sized(op: str, how: Sized) -> None:
    """Declare how sizes are read off a call of ``op``."""
    _SIZED[op] = how


def operator(op: str) -> Sized | None:
    """What ``sized`` was told, or None."""
    return _SIZED.get(op)


def operators() -> tuple[str, ...]:
    """Operators that can be tuned."""
    return tuple(sorted(_SIZED))


def set_table(table: Table) -> None:
    """Set where results come from; nothing is read before the first selection."""
    global _table
    _table = table
    refresh()


def refresh() -> None:
    """Results may have changed: every memoised choice is stale."""
    global active, _asked
    with _spec._TABLE.lock:
        if _table is not None:
            _table.clear()
        active, _asked = frozenset(), frozenset()
        _spec._TABLE.epoch += 1


def activate(op: str, request: Request) -> bool:
    """Ask the table about ``op`` the first time; True if that made selection look at sizes."""
    global active, _asked
    asked = (op, request.device)
    if _table is None or asked in _asked or op not in _SIZED:
        return False
    news = op not in active and _table.has(op, request)
    _asked |= {asked}
    if news:
        active |= {op}
    return news


def find(spec: KernelSpec, request: Request) -> Found | None:
    """The table's result for this kernel, or None."""
    return None if _table is None else _table.find(spec, request)


def bucket(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes rounded up to powers of two; batch and heads count as their product, ``pairs``.

    >>> bucket({"batch": 2, "seqlen_q": 1000, "heads": 3})
    {'seqlen_q': 1024, 'pairs': 8}
    """
    pairs, found = 1, {}
    for name, size in sizes.items():
        if name in _PAIRS:
            pairs *= max(size, 1)
        else:
            found[name] = _round_up(size)
    return {**found, "pairs": _round_up(pairs)}


def bucket_alone(op: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes that every call with the same sequence has, rounded up to powers of two."""
    how = _SIZED.get(op)
    names = how.alone if how is not None else ()
    return {name: _round_up(size) for name, size in sizes.items() if name in names}


def _round_up(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def call_key(op: str, call: tuple[Any, ...]) -> Sizes:
    """What the buckets of a call follow from, as part of a memo key; () if it shows no sizes."""
    if not call:
        return ()
    how = _SIZED[op]
    sizes, pairs = how.read(*call), 1
    for name, size in zip(how.names, sizes, strict=True):
        if name in _PAIRS:
            pairs *= max(size, 1)
    # Exponents of the powers of two, without a mapping: every call comes by here.
    return tuple([max(size - 1, 0).bit_length() for size in (*sizes, pairs)])


def call_sizes(op: str, call: tuple[Any, ...]) -> tuple[tuple[str, int], ...]:
    """The sizes of a call by name; () for an operator that shows none."""
    how = _SIZED.get(op)
    if how is None or not call:
        return ()
    return tuple(zip(how.names, how.read(*call), strict=True))
