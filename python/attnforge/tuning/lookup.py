"""Results at a call: user cache, its nearest bucket, shipped table; else the kernel's default.

A result of the user's cache may depend on all sizes and on the number of threads: who tunes asks
for it. A row of the package is there without being asked for, and must not take a promise away:
the bits of a sequence depend neither on what stands beside it in a call nor on the threads. So
rows of the package know no lengths and no batch, serve packed sequences as they serve dense ones,
and hold for machines with so many processors, however many of them are in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from attnforge.registry.space import Config, Scalar
from attnforge.registry.spec import KernelSpec, Request, list_kernels
from attnforge.registry.tuned import Found
from attnforge.tuning import store
from attnforge.tuning.device import (
    device_name,
    environment,
    shipped_environment,
    source_digest,
)
from attnforge.tuning.entry import Entry, Problem

__all__ = ["Tables", "foreign", "shipped", "stale"]

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
        """Whether results for ``op`` on the request's device depend on sizes.

        Those of the package do where they name heads: other calls go on without a look at sizes.
        """
        rows = self._read(op, request)
        return any(row.entry.problem.bucket or not row.shipped for row in rows)

    def find(self, spec: KernelSpec, request: Request) -> Found | None:
        """The result for ``spec`` that is closest to the request's bucket."""
        rows = self._read(spec.op, request)
        if not rows:
            return None
        ranked = sorted(_usable(rows, spec, request), key=lambda found: found[0])
        for (distance, _), row in ranked:
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
            shipped = (row for row in store.read(own, shipped=True) if not stale(row))
            rows = (*(_Row(row, False) for row in user), *(_Row(row, True) for row in shipped))
            self._rows = {**self._rows, (op, device): rows}
        return rows


def shipped() -> list[tuple[Entry, str]]:
    """Rows of the package for this machine's devices, and why each is not used ("" if it is)."""
    machine = (device_name(Request("", device, "", torch.float32)) for device in ("cpu", "cuda"))
    devices = [name for name in machine if name is not None]
    ops = {spec.op for spec in list_kernels()}
    files = [store.file_of(store.tables_directory(), op, name) for op in ops for name in devices]
    rows = (row for path in sorted(files) for row in store.read(path, shipped=True))
    return [(row, _not_used(row)) for row in rows]


def _not_used(entry: Entry) -> str:
    spec = next((spec for spec in list_kernels() if spec.id == entry.spec), None)
    if spec is None:
        return "there is no such kernel"
    other = foreign(entry, shipped_environment(spec))
    return ", ".join(f"{name} {values}" for name, values in other.items())


def stale(entry: Entry) -> bool:
    """Whether the kernel's source is another one: such a row is of no use in this process."""
    spec = next((spec for spec in list_kernels() if spec.id == entry.spec), None)
    return spec is None or source_digest(spec) != entry.environment.get("source")


def foreign(entry: Entry, now: Mapping[str, Scalar]) -> dict[str, str]:
    """What the entry was measured with that is not so now: name -> ``"then, now ..."``."""
    then = entry.environment
    return {
        name: f"{then.get(name, 'none')}, now {now.get(name, 'none')}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    }


def _usable(
    rows: tuple[_Row, ...], spec: KernelSpec, request: Request
) -> Iterator[tuple[tuple[float, str], _Row]]:
    """Rows for this kernel, environment and request, with what orders them."""
    now, anywhere = environment(spec), shipped_environment(spec)
    if now["source"] == "unknown":  # then nothing says that the kernel is the same
        return
    problem, alone = Problem.of(request), Problem.alone(request)
    for row in rows:
        entry = row.entry
        if entry.spec != spec.id or foreign(entry, anywhere if row.shipped else now):
            continue
        if row.shipped:
            if entry.problem == alone:
                yield (math.inf, ""), row
        elif request.sizes and entry.problem.same_but_sizes(problem):
            distances = [
                abs(math.log2(max(size, 1) / max(entry.problem.bucket[name], 1)))
                for name, size in problem.bucket.items()
            ]
            if max(distances, default=0.0) <= _NEAR:
                yield (sum(distances), str(entry.problem)), row


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
    near = distance > 0.0 and not row.shipped
    return ", ".join(
        [
            "shipped table" if row.shipped else "user cache",
            f"{'nearest bucket' if near else 'bucket'} {row.entry.problem}".rstrip(),
            str(measured["date"]),
            "the default won" if gain == 1.0 else f"x{gain:.2f} over default",
        ]
    )
