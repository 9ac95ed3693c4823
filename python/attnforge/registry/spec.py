"""``KernelSpec``, ``Request`` and the table of known kernels.

A kernel is a spec plus a function; ``register(spec)`` is all it takes to add one:

    def launch(q, k, v, params, out, lse, out_lo): ...

    attnforge.register(KernelSpec(id="toy.flash.fwd", op="flash_fwd", backend="toy",
                                  launch=launch, requires=(Device("cpu"),)))

Packages announce kernels by an entry point of the group ``attnforge.kernels`` that names a
``KernelSpec``, an iterable of them, or a function returning either. Built-in backends are found
the same way, through ``add_source``. Sources are read at the first selection, not at import.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from attnforge.registry.space import Config, SearchSpace

__all__ = [
    "ENTRY_POINTS",
    "KernelSpec",
    "Predicate",
    "Request",
    "add_source",
    "backends",
    "epoch",
    "list_kernels",
    "named",
    "register",
    "specs_for",
    "unregister",
]

ENTRY_POINTS = "attnforge.kernels"


@dataclass(frozen=True, slots=True)
class Request:
    """What a call asks of a kernel: metadata only, so that it also fits absent devices.

    dims holds the sizes that decide (``head_dim``, ``v_head_dim``, ``group``), features the
    names of what is used (``window``, ``softcap``, ...). arch is ``sm_90`` and the like, or "".
    sizes are how large the problem is (``seqlen_q``, ...): requirements do not look at them, tuned
    results are found by them.
    """

    op: str
    device: str
    arch: str
    dtype: torch.dtype
    dims: tuple[tuple[str, int], ...] = ()
    features: frozenset[str] = frozenset()
    deterministic: bool = False
    sizes: tuple[tuple[str, int], ...] = ()

    def dim(self, name: str) -> int | None:
        """The size called ``name``, or None if the operator has no such size."""
        return next((value for key, value in self.dims if key == name), None)


class Predicate(Protocol):
    """One requirement of a kernel: None if the request meets it, else the reason as a phrase."""

    def __call__(self, request: Request, /) -> str | None: ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class KernelSpec:
    """A kernel as the registry sees it.

    id: ``<backend>.<family>.<op>[.<variant>]``, also its test and bench id.
    op: the operator it implements, such as ``flash_fwd``.
    backend: the name that ``backend=`` takes.
    launch: the launcher, or ``"module:function"``, imported at first use.
    requires: predicates that all must hold.
    score: the highest among those that can serve wins; ties go to the smaller id.
    space: the tuning search space, if it has one; the launcher then gets ``config=``.
    deterministic: False makes ``torch.use_deterministic_algorithms(True)`` reject it.
    notes: one sentence for ``attnforge list``.
    """

    id: str
    op: str
    backend: str
    launch: str | Callable[..., Any]
    requires: tuple[Predicate, ...] = ()
    score: float = 0.0
    space: SearchSpace | None = None
    deterministic: bool = True
    notes: str = ""

    def reasons(self, request: Request) -> tuple[str, ...]:
        """Why this kernel cannot serve ``request``; empty if it can."""
        found = [reason for need in self.requires if (reason := need(request)) is not None]
        if request.deterministic and not self.deterministic:
            found.append("is not deterministic, and torch.use_deterministic_algorithms is on")
        return tuple(found)

    def resolve(self, config: Config | None = None) -> Callable[..., Any]:
        """The launcher function, imported if it was given by name, bound to ``config`` if any."""
        launch = self.launch
        found = named(launch) if isinstance(launch, str) else launch
        return found if config is None else partial(found, config=config)

    def describe(self) -> dict[str, Any]:
        """The spec as plain data, for ``attnforge list --json``."""
        launch = self.launch
        if not isinstance(launch, str):
            launch = f"{launch.__module__}:{launch.__qualname__}"
        return {
            "id": self.id,
            "op": self.op,
            "backend": self.backend,
            "requires": [str(need) for need in self.requires],
            "score": self.score,
            "deterministic": self.deterministic,
            "space": None if self.space is None else self.space.describe(),
            "launch": launch,
            "notes": self.notes,
        }


Found = KernelSpec | Iterable[KernelSpec]


@dataclass
class _Table:
    specs: dict[str, KernelSpec] = field(default_factory=dict)
    sources: list[Callable[[], Found]] = field(default_factory=list)
    epoch: int = 0  # part of every memo key: a registration makes all of them stale
    plugins_read: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)


_TABLE = _Table()


def named(path: str) -> Callable[..., Any]:
    """The function that ``"module:function"`` names, imported now."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def epoch() -> int:
    """A number that changes whenever a registration may change a choice."""
    return _TABLE.epoch


def add_source(source: Callable[[], Found]) -> None:
    """Add a function that gives specs; it is called at the first selection after this."""
    with _TABLE.lock:
        _TABLE.sources.append(source)
        _TABLE.epoch += 1


def register(spec: KernelSpec, *, replace: bool = False) -> KernelSpec:
    """Add a kernel. It takes part in the very next call.

    Raises TypeError if ``spec`` is not a KernelSpec and ValueError if its id is taken, unless
    ``replace=True``. Returns the spec.
    """
    if not isinstance(spec, KernelSpec):
        raise TypeError(f"attnforge.register: want a KernelSpec; got {type(spec).__name__}")
    _load()
    _add(spec, replace)
    return spec


def unregister(spec_id: str) -> None:
    """Remove a kernel again; ValueError if there is none of that id."""
    _load()
    with _TABLE.lock:
        if _TABLE.specs.pop(spec_id, None) is None:
            raise ValueError(f"attnforge.unregister: no kernel has the id {spec_id!r}")
        _TABLE.epoch += 1


def list_kernels(op: str | None = None) -> tuple[KernelSpec, ...]:
    """All known kernels, or those of one operator, ordered by operator and falling score."""
    _load()
    found = [s for s in list(_TABLE.specs.values()) if op is None or s.op == op]
    return tuple(sorted(found, key=lambda s: (s.op, -s.score, s.id)))


def specs_for(op: str) -> tuple[KernelSpec, ...]:
    """Kernels of ``op``, best score first."""
    return list_kernels(op)


def backends() -> tuple[str, ...]:
    """Names of the backends that have at least one kernel."""
    return tuple(sorted({spec.backend for spec in list_kernels()}))


def _add(spec: KernelSpec, replace: bool) -> None:
    with _TABLE.lock:
        if spec.id in _TABLE.specs and not replace:
            raise ValueError(
                f"attnforge.register: the id {spec.id!r} is taken; "
                "pass replace=True to put this kernel in its place"
            )
        _TABLE.specs[spec.id] = spec
        _TABLE.epoch += 1


def _load() -> None:
    if not _TABLE.sources and _TABLE.plugins_read:
        return
    with _TABLE.lock:
        while _TABLE.sources:
            for spec in _as_specs(_TABLE.sources.pop(0)()):
                _add(spec, replace=False)
        if not _TABLE.plugins_read:
            _TABLE.plugins_read = True
            _load_plugins()


def _as_specs(found: Any) -> list[KernelSpec]:
    if callable(found):
        found = found()
    return [found] if isinstance(found, KernelSpec) else list(found)


def _load_plugins() -> None:
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINTS):
        try:
            for spec in _as_specs(point.load()):
                if not isinstance(spec, KernelSpec):
                    raise TypeError(f"want KernelSpec, got {type(spec).__name__}")
                _add(spec, replace=False)
        except Exception as error:  # a broken plugin must not take the library with it
            warnings.warn(
                f"attnforge: kernels of the entry point {point.name!r} ({point.value}) are not "
                f"available: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
