"""Results at a call: user cache, shipped table, nearest bucket; else the kernel's default."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnforge.registry.space import Config, Scalar
from attnforge.registry.spec import KernelSpec, Request, list_kernels
from attnforge.registry.tuned import Found
from attnforge.tuning import store
from attnforge.tuning.device import VERSIONS, device_name, environment, source_digest
from attnforge.tuning.entry import Entry, Problem

__all__ = ["Tables", "foreign"]

# A tile that suits 2048 keys says something about 8192 and nothing about 131072.
_NEAR = 2.0  # largest distance of one size, in doublings


@dataclass(frozen=True)
class _Row:
    entry: Entry
    shipped: bool


class Tables:
    """Results for this machine, read from files at the first question about an operator."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], tuple[_Row, ...]] = {}

    def clear(self) -> None:
        """Read the files again at the next question."""
        self._rows = {}

    def has(self, op: str, request: Request) -> bool:
        """Whether there is any well-formed result for ``op`` on the request's device."""
        return bool(self._read(op, request))

    def find(self, spec: KernelSpec, request: Request) -> Found | None:
        """The result for ``spec`` that is closest to the request's bucket."""
        rows = self._read(spec.op, request)
        if not rows:
            return None
        problem = Problem.of(request)
        now = environment(spec)
        ranked = sorted(_usable(rows, spec, problem, now), key=lambda found: found[0])
        for (distance, *_), row in ranked:
            config = _config(spec, request, row.entry)
            if config is not None:
                return Found(config, _origin(row, distance), _preferred(row.entry))
        return None

    def _read(self, op: str, request: Request) -> tuple[_Row, ...]:
        device = device_name(request)
        if device is None:
            return ()
        rows = self._rows.get((op, device))
        if rows is None:
            user = store.read(store.file_of(store.directory(), op, device))
            own = store.file_of(store.tables_directory(), op, device)
            rows = (
                *(_Row(entry, False) for entry in user),
                *(_Row(entry, True) for entry in store.read(own, shipped=True)),
            )
            self._rows = {**self._rows, (op, device): rows}
        return rows


def foreign(entry: Entry, now: Mapping[str, Scalar]) -> dict[str, str]:
    """What the entry was measured with that is not so now: name -> ``"then, now ..."``."""
    then = entry.environment
    return {
        name: f"{then.get(name, 'none')}, now {now.get(name, 'none')}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    }


def _usable(
    rows: tuple[_Row, ...], spec: KernelSpec, problem: Problem, now: dict[str, Scalar]
) -> Iterator[tuple[tuple[float, bool, str], _Row]]:
    """Rows for this kernel, environment and problem, with what orders them."""
    for row in rows:
        entry = row.entry
        if entry.spec != spec.id or not entry.problem.same_but_sizes(problem):
            continue
        if now["source"] == "unknown":  # then nothing says that the kernel is the same
            return
        # A shipped table stands beside the source it was measured with.
        if set(foreign(entry, now)) - set(VERSIONS if row.shipped else ()):
            continue
        distances = [
            abs(math.log2(max(size, 1) / max(entry.problem.bucket[name], 1)))
            for name, size in problem.bucket.items()
        ]
        if max(distances, default=0.0) <= _NEAR:
            yield (sum(distances), row.shipped, str(entry.problem)), row


def _config(spec: KernelSpec, request: Request, entry: Entry) -> Config | None:
    """The entry's config, or None if this kernel cannot take it (any more)."""
    if spec.space is None:
        return None if entry.config else Config({})
    try:
        config = spec.space.config(entry.config)
    except ValueError:
        return None
    return None if spec.space.reasons(config, request) else config


def _preferred(entry: Entry) -> bool:
    """Whether the kernels it beat are what they were."""
    known = {spec.id: spec for spec in list_kernels()}
    return bool(entry.over) and all(
        rival in known and source_digest(known[rival]) == digest
        for rival, digest in entry.over.items()
    )


def _origin(row: _Row, distance: float) -> str:
    measured = row.entry.measured
    gain = float(measured["gain"])
    return ", ".join(
        [
            "shipped table" if row.shipped else "user cache",
            f"{'nearest bucket' if distance else 'bucket'} {row.entry.problem}",
            str(measured["date"]),
            "the default won" if gain == 1.0 else f"x{gain:.2f} over default",
        ]
    )
