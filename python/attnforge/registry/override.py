"""Process-wide switches: ``with attnforge.backend(...)`` and ``attnforge.debug(...)``.

The override is a plain module global that public functions read and pass into the operator as
an argument: thread locals go stale and context variables break under ``torch.compile``, while a
global is guarded (a compiled function is compiled again when it changes). It therefore holds for
every thread.
"""

from __future__ import annotations

from types import TracebackType

from attnforge import _settings

__all__ = ["backend", "checks", "current", "debug"]

current: str | None = None  # read by public functions as ``override.current``
checks: bool = _settings.debug()
_open: list[backend] = []  # blocks entered and not left, the innermost last


class backend:
    """Choose the kernels of every call in a block: ``with attnforge.backend("reference"): ...``.

    ``name`` is a backend (``"cpu"``), a kernel id, or a list by operator
    (``"flash_fwd=reference,*=cpu"``). It stands above ``ATTNFORGE_BACKEND`` and below the
    argument ``backend=``; None lifts an outer choice. A choice that cannot serve a call raises
    ValueError at that call. Blocks nest; the choice holds for all threads.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            if not isinstance(name, str):
                raise TypeError(
                    f"attnforge.backend: name must be a string or None; got {type(name).__name__}"
                )
            from attnforge.registry.select import parse_choice

            parse_choice(name, "attnforge.backend")
        self.name = name

    def __enter__(self) -> backend:
        global current
        _open.append(self)
        current = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global current
        # Blocks of other threads may have opened since: leave theirs, take back one's own.
        for n in reversed(range(len(_open))):
            if _open[n] is self:
                del _open[n]
                break
        current = _open[-1].name if _open else None


class debug:
    """Turn full checks on or off: ``attnforge.debug(checks=True)``, also as a ``with`` block.

    Index tensors on the CPU are always checked in full. With checks on those on other devices
    are too, at the price of a device synchronisation per call. ``ATTNFORGE_DEBUG=1`` starts
    with them on.
    """

    def __init__(self, *, checks: bool = True) -> None:
        self._outer = _set_checks(checks)

    def __enter__(self) -> debug:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _set_checks(self._outer)


def _set_checks(value: bool) -> bool:
    global checks
    outer, checks = checks, bool(value)
    return outer
