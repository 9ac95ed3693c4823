"""From a request to a launcher: argument > ``with backend()`` > ``ATTNFORGE_BACKEND`` > score.

A choice is a backend name, a kernel id, or a comma list ``op=choice`` with ``*`` for the other
operators. A forced choice that cannot serve raises with the reasons; nothing falls back in
silence. Results are memoised by a key of metadata and the table's epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnforge import _settings
from attnforge.registry import override, tuned
from attnforge.registry import spec as _spec
from attnforge.registry.space import Config
from attnforge.registry.spec import KernelSpec, Request

__all__ = ["Decision", "choice_for", "decide", "device_arch", "launcher", "parse_choice"]

_MEMO: dict[Hashable, Callable[..., Any]] = {}
# Metadata keys hold no sequence lengths (powers of two where there are tuned results), so a real
# program has tens of them; the bound only stops one that registers kernels for ever.
_MEMO_LIMIT = 4096


@dataclass(frozen=True)
class Decision:
    """The outcome for one operator: the chosen kernel, where the choice came from, the rest."""

    request: Request
    chosen: KernelSpec | None
    source: str  # "argument", "context manager", "ATTNFORGE_BACKEND", "tuned table" or "score"
    choice: str | None  # the forced backend or kernel id, if any
    rejected: tuple[tuple[KernelSpec, tuple[str, ...]], ...]
    config: Config | None = None  # of the chosen kernel, if it has a search space
    config_source: str = ""  # "default: <reason>" or "tuned: <cache, bucket, date, gain>"

    @property
    def error(self) -> str | None:
        """The sentence a call would raise, or None if a kernel serves it."""
        if self.chosen is not None:
            return None
        r = self.request
        reasons = "; ".join(f"{s.id}: {', '.join(why)}" for s, why in self.rejected)
        if self.choice is None:
            return f"attnforge.{r.op}: no kernel serves this call ({reasons or 'none registered'})"
        others = [s.id for s in _spec.specs_for(r.op) if not s.reasons(r)]
        forced = [s for s in _spec.specs_for(r.op) if _matches(s, self.choice)]
        if not forced:
            have = sorted({s.backend for s in _spec.specs_for(r.op)})
            reasons = f"it has no kernel for {r.op}; backends that have one: {', '.join(have)}"
        else:
            why = {s.id: w for s, w in self.rejected}
            reasons = "; ".join(f"{s.id}: {', '.join(why[s.id])}" for s in forced)
        hint = f"; {' and '.join(others)} can: drop the choice" if others else ""
        return (
            f"attnforge.{r.op}: backend {self.choice!r} (from {self.source}) "
            f"cannot serve this call: {reasons}{hint}"
        )


def parse_choice(text: str, where: str) -> dict[str, str]:
    """``"flash_fwd=reference,*=cpu"`` -> {"flash_fwd": "reference", "*": "cpu"}.

    A bare name stands for ``*=name``. ValueError on a malformed list; names are checked when a
    call needs them, since a plugin may bring them later.
    """
    choices: dict[str, str] = {}
    for part in text.split(","):
        op, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals:
            op, name = "*", op
        if not op or not name or op in choices:
            raise ValueError(
                f"{where}: {text!r} is no kernel choice; want a backend such as 'cpu', or "
                "'<op>=<backend>,*=<backend>' with each operator once"
            )
        choices[op] = name
    return choices


def choice_for(op: str, backend: str | None, outer: bool = False) -> tuple[str | None, str]:
    """The forced choice for ``op`` and its source; (None, "score") if nothing forces one."""
    if backend is not None:
        source, text = ("context manager" if outer else "argument"), backend
    else:
        source, text = _settings.BACKEND, _settings.backend() or ""
    if text:
        choices = parse_choice(text, f"attnforge.{op}: backend (from {source})")
        known = {s.op for s in _spec.list_kernels()}
        if unknown := sorted(choices.keys() - known - {"*"}):
            raise ValueError(
                f"attnforge.{op}: backend {text!r} (from {source}) names {', '.join(unknown)}; "
                f"want operators of {', '.join(sorted(known))}, or * for the others"
            )
        name = choices.get(op, choices.get("*"))
        # The id of a kernel of another operator says nothing about this one.
        if name is not None and not any(s.id == name and s.op != op for s in _spec.list_kernels()):
            return name, source
    return None, "score"


def _matches(spec: KernelSpec, choice: str) -> bool:
    return choice in (spec.backend, spec.id)


def decide(request: Request, backend: str | None, outer: bool = False) -> Decision:
    """Look at every kernel of the operator; never raises for lack of one (see ``error``).

    outer: ``backend`` came from an enclosing ``attnforge.backend`` and not from an argument.
    """
    choice, source = choice_for(request.op, backend, outer)
    specs = _spec.specs_for(request.op)
    tuned.activate(request.op, request)
    preferred = _preferred(specs, request) if choice is None else None
    if preferred is not None:
        source = "tuned table"
    chosen: KernelSpec | None = preferred
    rejected: list[tuple[KernelSpec, tuple[str, ...]]] = []
    for spec in specs:
        if spec is preferred:
            continue
        reasons = spec.reasons(request)
        if choice is not None and not _matches(spec, choice):
            reasons = (*reasons, f"{source} asks for {choice!r}")
        elif not reasons and preferred is not None:
            reasons = (f"{preferred.id} was measured to be faster at these sizes",)
        elif not reasons and chosen is not None:
            reasons = (f"score {spec.score:g} is not above {chosen.score:g} of {chosen.id}",)
        if reasons:
            rejected.append((spec, reasons))
        else:
            chosen = spec
    config, origin = _config(chosen, request)
    return Decision(request, chosen, source, choice, tuple(rejected), config, origin)


def _preferred(specs: tuple[KernelSpec, ...], request: Request) -> KernelSpec | None:
    """The kernel that a tuning run measured to beat the one with the best score, if it serves."""
    for spec in specs:
        if not spec.reasons(request):  # results need what the kernel needs, such as its library
            found = tuned.find(spec, request)
            if found is not None and found.preferred:
                return spec
    return None


def _config(spec: KernelSpec | None, request: Request) -> tuple[Config | None, str]:
    """The config a kernel runs with and where that came from; (None, "") without a space."""
    if spec is None or spec.space is None:
        return None, ""
    found = tuned.find(spec, request)
    if found is not None:
        return found.config, f"tuned: {found.origin}"
    return spec.space.default(request), f"default: {spec.space.reason}"


def launcher(
    op: str,
    metadata: tuple[Any, ...],
    describe: Callable[..., Request],
    backend: str | None,
    *call: Any,
) -> Callable[..., Any]:
    """The launcher that serves a call. The hot path is one dictionary look-up.

    ``describe(op, metadata)`` makes the Request on a miss. ``call`` is what ``tuned.sized`` was
    told to read sizes from; they are read only where tuned results for ``op`` were found, or
    while shapes are traced. ValueError if nothing can serve.
    """
    if tuned.recorder is not None:
        tuned.recorder(op, metadata, describe, call)
    deterministic = torch.are_deterministic_algorithms_enabled()
    forced = backend or _settings.backend()
    key: tuple[Any, ...]
    key = (op, metadata, forced, backend is None, deterministic, _spec._TABLE.epoch)
    if op in tuned.active:  # results hold for one number of threads
        key = (*key, tuned.call_key(op, call), torch.get_num_threads())
    found = _MEMO.get(key)
    if found is None:
        request = describe(op, metadata)
        if tuned.activate(op, request):  # the first results: from now on sizes are looked at
            key = (*key, tuned.call_key(op, call), torch.get_num_threads())
        if op in tuned.active:
            request = replace(request, sizes=tuned.call_sizes(op, call))
        # The operator gets one string; that it equals the override says where it came from.
        outer = backend is not None and backend == override.current
        decision = decide(request, backend, outer)
        if decision.chosen is None:
            raise ValueError(decision.error)
        found = decision.chosen.resolve(decision.config)
        if len(_MEMO) >= _MEMO_LIMIT:
            _MEMO.clear()
        _MEMO[key] = found
    return found


def device_arch(device: Any) -> tuple[str, str]:
    """(type, arch) of a torch device, or of a name such as ``"cuda:sm_90"`` or ``"cpu"``."""
    if isinstance(device, str):
        kind, _, detail = device.partition(":")
        if not kind or (detail and not detail.startswith("sm_") and not detail.isdigit()):
            raise ValueError(
                f"attnforge.explain: device {device!r} is not known; want 'cpu', 'cuda' or a "
                "described GPU such as 'cuda:sm_90'"
            )
        if not detail.isdigit() and detail:
            return kind, detail
        device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return "cuda", f"sm_{major}{minor}"
    return device.type, ""
