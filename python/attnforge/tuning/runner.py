"""``attnforge.tune``: measure configs on this machine and keep the winners. Never implicit."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attnforge.registry import tuned
from attnforge.registry.explain import explain
from attnforge.registry.predicates import dtype_name
from attnforge.registry.space import Config
from attnforge.registry.spec import KernelSpec, Request, named, specs_for
from attnforge.tuning import store
from attnforge.tuning.confirm import elsewhere
from attnforge.tuning.device import device_name, environment, source_digest
from attnforge.tuning.entry import Entry, Problem
from attnforge.tuning.race import MARGIN, REPEATS, Race, Workload, race, rivals
from attnforge.tuning.trace import read_trace

__all__ = ["Outcome", "Report", "tune"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one kernel in one bucket.

    status: ``"tuned"``, ``"default"`` (nothing beat it by more than the noise), ``"kept"`` (there
    was a result), ``"unfinished"`` (the budget ended; nothing was written), ``"skipped"`` (the
    family makes no such inputs; ``wrong`` says which).
    """

    request: Request
    spec: str
    status: str
    config: Config
    gain: float = 1.0
    low: float = 1.0
    high: float = 1.0
    preferred: bool = False
    tried: int = 0
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        r = self.request
        problem = Problem.of(r)
        dims = " ".join(f"{k}={v}" for k, v in problem.dims.items())
        head = f"{self.spec} {dtype_name(r.dtype)} {dims} {'+'.join(problem.features)} [{problem}]"
        tail = {
            "tuned": f"x{self.gain:.3f} ({self.low:.3f}..{self.high:.3f}) with {self.config}",
            "default": f"default stays ({self.tried} tried, best x{self.gain:.3f})",
            "kept": f"kept: {self.config}",
            "unfinished": "not finished within the budget",
            "skipped": "skipped",
        }[self.status]
        return f"{head}: {tail}{' preferred' if self.preferred else ''}"


@dataclass(frozen=True)
class Report:
    """All outcomes of a run; ``print`` it."""

    outcomes: tuple[Outcome, ...]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        lines = [str(outcome) for outcome in self.outcomes]
        for outcome in self.outcomes:
            lines += [f"rejected {outcome.spec} {why}" for why in outcome.wrong]
        counts = {s: sum(o.status == s for o in self.outcomes) for s in _STATUS}
        lines.append(", ".join(f"{n} {s}" for s, n in counts.items() if n) or "nothing to tune")
        return "\n".join([*lines, *(f"results in {path}" for path in self.files)])


_STATUS = ("tuned", "default", "kept", "unfinished", "skipped")


def _refuse_inside() -> None:
    """RuntimeError where timing is impossible or would become part of a graph."""
    where = None
    if torch.compiler.is_compiling() or _in_compiled_call():
        where = "under torch.compile or torch.export"
    elif torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        where = "on fake tensors"
    elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        where = "while a CUDA graph is captured"
    if where is not None:
        raise RuntimeError(
            f"attnforge.tune: cannot measure {where}; tune before, results are found then too"
        )


def _in_compiled_call() -> bool:
    """Whether a compiled function is running: Dynamo runs what it cannot trace as plain Python."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    return callable(get_eval_frame_callback())


def tune(
    what: str | Callable[..., Any],
    shapes: Iterable[Sequence[Any]] | None = None,
    *,
    trace: str | Path | None = None,
    budget: float = 60.0,
    force: bool = False,
    confirm: int = 0,
    progress: Progress | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Report:
    """Measure kernel configs and write those that win into the user's cache.

    what: a family (``"flash"``), an operator (``"flash_fwd"``), or a public function such as
        ``attnforge.flash_attention``, which stands for the operators it runs.
    shapes: for a function: its positional arguments, once per problem, as shapes or tensors;
        ``dtype``, ``device`` and keyword ``options`` go with all of them, as in ``explain``.
        Without shapes and trace a family tunes a few common problems.
    trace: a file of ``trace_shapes``; the most frequent problems come first.
    budget: seconds for everything. Each problem gets an equal share of what is left.
    confirm: fresh processes in each of which a winner must win again, by the same margin.
    force: measure again what has a result for this machine, kernel source and versions.
    progress: called as ``progress(what, done, total)`` before each problem and at the end.

    Each finished bucket is written at once, so a run that is stopped is resumed by the next.
    Results are used from the next call on, in this process too.

    Returns a Report. Raises RuntimeError under ``torch.compile``, on fake tensors and during CUDA
    graph capture, and ValueError if nothing is known by that name.
    """
    _refuse_inside()
    call = {"dtype": dtype, "device": device, **options}
    problems = _distinct(_requests(what, shapes, trace, call))
    outcomes: list[Outcome] = []
    files: dict[Path, None] = {}
    end = time.monotonic() + budget
    for done, request in enumerate(problems):
        if progress is not None:
            progress(f"{request.op} {Problem.of(request)}", done, len(problems))
        now = time.monotonic()
        deadline = now + max(end - now, 0.0) / (len(problems) - done)
        outcomes += _tune_bucket(request, deadline, force, confirm, files)
    if progress is not None:
        progress("done", len(problems), len(problems))
    return Report(tuple(outcomes), tuple(files))


def _requests(
    what: str | Callable[..., Any],
    shapes: Iterable[Sequence[Any]] | None,
    trace: str | Path | None,
    call: dict[str, Any],
) -> list[Request]:
    ops = tuned.operators()
    if callable(what):
        if shapes is None:
            name = getattr(what, "__name__", repr(what))
            raise ValueError(
                f"attnforge.tune: {name} without shapes; pass shapes=[(q, k, v), ...] as tensors "
                "or tuples, or name a family"
            )
        decisions = [d for args in shapes for d in explain(what, *args, **call).decisions]
        return [d.request for d in decisions if d.request.op in ops]
    wanted = [op for op in ops if op == what or op.startswith(f"{what}_")]
    if not wanted:
        families = sorted({op.split("_")[0] for op in ops})
        raise ValueError(
            f"attnforge.tune: nothing tunable is called {what!r}; want a family of "
            f"{', '.join(families)}, an operator of {', '.join(ops)}, or a function"
        )
    if trace is not None:
        rows = sorted(read_trace(trace), key=lambda row: -row[1])
        return [request for request, _ in rows if request.op in wanted]
    return [request for op in wanted for request in _usual(op)]


def _usual(op: str) -> list[Request]:
    """The problems of an operator that are tuned if nobody names any."""
    how = tuned.operator(op)
    assert how is not None
    found: list[Request] = named(how.problems)(op)
    return found


def _distinct(requests: list[Request]) -> list[Request]:
    """The first request of each bucket."""
    seen: dict[str, Request] = {}
    for request in requests:
        problem = Problem.of(request)
        seen.setdefault(f"{request.op} {request.device} {request.arch} {problem!r}", request)
    return list(seen.values())


def _tune_bucket(
    request: Request, deadline: float, force: bool, confirm: int, files: dict[Path, None]
) -> list[Outcome]:
    device = device_name(request)
    if device is None:
        raise ValueError(
            f"attnforge.tune: {request.op}: device {request.device} {request.arch} is not in this "
            "machine; tune where it is and copy the file of `attnforge cache path`"
        )
    serving = [spec for spec in specs_for(request.op) if not spec.reasons(request)]
    specs = [spec for n, spec in enumerate(serving) if spec.space is not None or n == 0]
    if not any(spec.space is not None for spec in specs):
        return []
    path = store.file_of(store.directory(), request.op, device)
    there = {} if force else {entry.key: entry for entry in store.read(path)}
    work: Workload | None = None
    done: list[tuple[KernelSpec, Config]] = []
    outcomes: list[Outcome] = []
    for spec in specs:
        entry = _entry(spec, request, Config({}))
        old = there.get(entry.key)
        if old is not None:
            outcomes.append(Outcome(request, spec.id, "kept", Config(old.config)))
            done.append((spec, Config(old.config)))
            continue
        if work is None:
            try:
                work = _workload(request)
            except ValueError as error:
                return [Outcome(request, spec.id, "skipped", Config({}), wrong=(str(error),))]
        found = _confirmed(race(work, spec, request, deadline), spec, request, confirm, deadline)
        if not found.finished:
            outcomes.append(_outcome(request, spec, found, "unfinished"))
            continue
        beaten = _beaten(done[:1], (spec, found.config), request, work, deadline)
        entry = replace(_entry(spec, request, found.config, found), over=beaten)
        done.append((spec, found.config))
        files[store.merge(request.op, device, [entry])] = None
        tuned.refresh()
        outcome = _outcome(request, spec, found, "tuned" if found.won else "default")
        outcomes.append(replace(outcome, preferred=bool(beaten)))
    return outcomes


def _confirmed(
    found: Race, spec: KernelSpec, request: Request, processes: int, deadline: float
) -> Race:
    """``found``, or the default where its winner does not win in every one of fresh processes."""
    for _ in range(processes if found.won else 0):
        gain = elsewhere(spec, found.config, request, deadline)
        if not gain.low > MARGIN:
            assert spec.space is not None
            default = spec.space.config(spec.space.default(request))
            finished = gain.repeats == REPEATS
            return replace(found, config=default, gain=gain, won=False, finished=finished)
        assert found.gain is not None
        if gain.low < found.gain.low:  # the smallest is what can be relied on
            found = replace(found, gain=gain)
    return found


def _beaten(
    best: list[tuple[KernelSpec, Config]],
    new: tuple[KernelSpec, Config],
    request: Request,
    work: Workload,
    deadline: float,
) -> dict[str, str]:
    """The kernel with the best score, with its digest, if ``new`` beats it by the margin."""
    if not best:
        return {}
    gain = rivals(work, best[0], new, request, deadline)
    if gain is None or not gain.low > MARGIN:
        return {}
    return {best[0][0].id: source_digest(best[0][0])}


def _workload(request: Request) -> Workload:
    how = tuned.operator(request.op)
    assert how is not None
    work: Workload = named(how.workload)(request)
    return work


def _outcome(request: Request, spec: KernelSpec, found: Race, status: str) -> Outcome:
    gain = found.gain
    numbers = (1.0, 1.0, 1.0) if gain is None else (gain.middle, gain.low, gain.high)
    return Outcome(
        request, spec.id, status, found.config, *numbers, tried=found.tried, wrong=found.wrong
    )


def _entry(spec: KernelSpec, request: Request, config: Config, found: Race | None = None) -> Entry:
    measured: dict[str, Any] = {}
    if found is not None:
        gain = found.gain
        measured = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "gain": round(gain.middle, 4) if gain is not None and found.won else 1.0,
            "tried": found.tried,
            "wrong": len(found.wrong),
            "sizes": dict(request.sizes),
        }
        if gain is not None:
            measured |= {
                "best_gain": round(gain.middle, 4),
                "gain_low": round(gain.low, 4),
                "gain_high": round(gain.high, 4),
                "spread": round(gain.spread, 4),
                "median_s": gain.candidate_s,
                "default_s": gain.default_s,
                "repeats": gain.repeats,
            }
    return Entry(spec.id, Problem.of(request), environment(spec), dict(config), {}, measured)
