"""``trace_shapes``: record what a program asks of attnforge's operators, as input for tuning.

One JSON line per distinct call, with a count: operator, device, dtype, dims, features, sizes. No
values of any tensor are looked at.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from attnforge.registry import tuned
from attnforge.registry.explain import dtype_of
from attnforge.registry.predicates import dtype_name
from attnforge.registry.spec import Request
from attnforge.tuning.store import write_text

__all__ = ["read_trace", "request_of", "row_of", "trace_shapes"]


class trace_shapes:
    """``with attnforge.trace_shapes(path): ...`` writes every distinct operator call to ``path``.

    The file (JSON lines, the most frequent call first) is written when the block ends, in one
    step, in place of an older one. It covers all threads, and compiled functions too, as
    operators select their kernel when they run. One trace may be open at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: dict[Hashable, tuple[Request, int]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> trace_shapes:
        if tuned.recorder is not None:
            raise RuntimeError(
                "attnforge.trace_shapes: another trace is open; leave its block first"
            )
        tuned.recorder = self._record
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tuned.recorder = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = sorted(self._seen.values(), key=lambda row: -row[1])
        write_text(self.path, "".join(_line(*row) for row in rows))

    def _record(
        self,
        op: str,
        metadata: tuple[Any, ...],
        describe: Callable[..., Request],
        call: tuple[Any, ...],
    ) -> None:
        sizes = tuned.call_sizes(op, call)
        key = (op, metadata, sizes)
        with self._lock:
            if key in self._seen:
                request, count = self._seen[key]
            else:
                request, count = replace(describe(op, metadata), sizes=sizes), 0
            self._seen[key] = (request, count + 1)


def _line(request: Request, count: int) -> str:
    return json.dumps({**row_of(request), "count": count}) + "\n"


def row_of(request: Request) -> dict[str, Any]:
    """Plain data of a request."""
    return {
        "op": request.op,
        "device": request.device,
        "arch": request.arch,
        "dtype": dtype_name(request.dtype),
        "dims": dict(request.dims),
        "features": sorted(request.features),
        "sizes": dict(request.sizes),
    }


def request_of(row: Any) -> Request:
    """The request of ``row_of``; ValueError, KeyError, TypeError, AttributeError otherwise."""
    return Request(
        str(row["op"]),
        str(row["device"]),
        str(row["arch"]),
        dtype_of(str(row["dtype"])),
        tuple((str(k), int(v)) for k, v in row["dims"].items()),
        frozenset(map(str, row["features"])),
        sizes=tuple((str(k), int(v)) for k, v in row["sizes"].items()),
    )


def read_trace(path: str | Path) -> list[tuple[Request, int]]:
    """Requests of a trace with their counts; ValueError names the first line that is none."""
    found: list[tuple[Request, int]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.append((request_of(row), int(row["count"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"attnforge.tune: line {number} of {path} is no record of trace_shapes "
                f"({type(error).__name__}: {error})"
            ) from None
    return found
