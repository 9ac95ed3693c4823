"""``explain(fn, *args)``: which kernel a call would use, where that came from, why not another.

Nothing is run. Arguments may be tensors (real, fake or meta), or shapes with ``dtype=`` and
``device=``, so that the question can be asked for a device that is not there:

    attnforge.explain(attnforge.flash_attention, (1, 4096, 32, 128), (1, 4096, 8, 128),
                      (1, 4096, 8, 128), dtype="bf16", device="cuda:sm_90", causal=True)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attnforge.registry import override
from attnforge.registry.predicates import dtype_name
from attnforge.registry.select import Decision, decide, device_arch
from attnforge.registry.spec import KernelSpec, Request

__all__ = ["Explanation", "as_described", "dtype_of", "explain", "explained_by", "requests_of"]

_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}

Requester = Callable[..., "Sequence[Request] | tuple[Sequence[Request], str]"]
F = TypeVar("F", bound=Callable[..., Any])
_REQUESTERS: dict[Any, Requester] = {}


def explained_by(requester: Requester) -> Callable[[F], F]:
    """Decorator of a public function: ``requester`` takes its arguments and gives the requests.

    Beside them it may give a sentence on a choice that the function makes itself. A method is
    asked for as the bound one: its requester gets the object first, and ``device=``, the type of
    device in question, as shapes have none.
    """

    def mark(fn: F) -> F:
        _REQUESTERS[fn] = requester
        return fn

    return mark


def requests_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Sequence[Request]:
    """The requests of a call of a public function."""
    return _noted(_REQUESTERS[fn](*args, **kwargs))[0]


def _noted(found: Any) -> tuple[Sequence[Request], str]:
    """What a requester gives, with its sentence, which may be empty."""
    return found if isinstance(found, tuple) else (found, "")


@dataclass(frozen=True)
class Explanation:
    """Decisions of one call, one for each operator it may run; ``print`` it.

    note: a choice that the function makes before any kernel is asked for.
    """

    function: str
    decisions: tuple[Decision, ...]
    note: str = ""

    @property
    def chosen(self) -> KernelSpec | None:
        """The kernel of the first operator (the forward), or None if nothing can serve it."""
        return self.decisions[0].chosen

    @property
    def source(self) -> str:
        """Where the first choice came from: an argument, a block, the environment, a table, ..."""
        return self.decisions[0].source

    @property
    def rejected(self) -> tuple[tuple[KernelSpec, tuple[str, ...]], ...]:
        """Rejected kernels of the first operator, each with its reasons."""
        return self.decisions[0].rejected

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``attnforge explain --json``."""
        decisions = [_as_dict(d) for d in self.decisions]
        return {"function": self.function, "note": self.note, "decisions": decisions}

    def __str__(self) -> str:
        lines = [f"attnforge.{self.function}", *([f"  {self.note}"] if self.note else [])]
        for d in self.decisions:
            r = d.request
            sizes = " ".join(f"{name}={size}" for name, size in r.dims)
            place = r.device + (f":{r.arch}" if r.arch else "")
            lines.append(f"  {r.op}: {place} {dtype_name(r.dtype)} {sizes}".rstrip())
            lines.append(f"    features: {', '.join(sorted(r.features)) or 'none'}")
            if d.chosen is None:
                lines.append(f"    error: {d.error}")
            else:
                lines.append(f"    chosen: {d.chosen.id} (by {d.source})")
            if d.config is not None:
                lines.append(f"    config: {d.config} ({d.config_source})")
            lines += [f"    rejected: {s.id}: {'; '.join(why)}" for s, why in d.rejected]
        return "\n".join(lines)


def _as_dict(d: Decision) -> dict[str, Any]:
    r = d.request
    return {
        "op": r.op,
        "device": r.device,
        "arch": r.arch,
        "dtype": dtype_name(r.dtype),
        "dims": dict(r.dims),
        "features": sorted(r.features),
        "chosen": d.chosen.id if d.chosen else None,
        "source": d.source,
        "sizes": dict(r.sizes),
        "config": None if d.config is None else dict(d.config),
        "config_source": d.config_source,
        "error": d.error,
        "rejected": {s.id: list(why) for s, why in d.rejected},
    }


def explain(
    fn: Callable[..., Any],
    *args: Any,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Explanation:
    """Explain the kernel choice of ``fn(*args, **kwargs)`` without running it.

    args: what ``fn`` takes. Any tensor may be given as a shape (a tuple of ints); ``dtype``
    (default fp32) and ``device`` (default cpu) then say the rest. ``device`` also moves real
    tensors in thought: ``"cuda:sm_90"`` asks for an H100 wherever this runs.

    Returns an Explanation. Raises TypeError for a function that is not attnforge's and the
    errors of ``fn`` itself for arguments that no kernel could take.
    """
    requester, owner = _requester(fn)
    if requester is None:
        known = ", ".join(sorted(f.__qualname__ for f in _REQUESTERS))
        raise TypeError(
            f"attnforge.explain: fn must be a public function of attnforge; got {fn!r}; "
            f"want one of {known}"
        )
    kind = dtype_of(dtype) if dtype is not None else None
    place = device_arch(device) if device is not None else None
    forced = kwargs.pop("backend", None)
    backend = forced if forced is not None else override.current
    args = tuple(as_described(x, kind) for x in args)
    kwargs = {name: _described_keyword(name, x, kind) for name, x in kwargs.items()}
    told = {"device": place[0] if place else _device_type(args)} if owner else {}
    found, note = _noted(requester(*owner, *args, **told, **kwargs))
    requests = [_placed(r, place) for r in found]
    decisions = tuple(decide(r, backend, outer=forced is None) for r in requests)
    name = f"{type(owner[0]).__name__}.{fn.__name__}" if owner else fn.__name__
    return Explanation(name, decisions, note)


def _device_type(args: Sequence[Any]) -> str:
    """That of the first tensor; shapes alone stand for the CPU."""
    kind = next((x.device.type for x in args if isinstance(x, torch.Tensor)), "cpu")
    return "cpu" if kind == "meta" else kind


def _requester(fn: Callable[..., Any]) -> tuple[Requester | None, tuple[Any, ...]]:
    """That of a function, or of a bound method or what it overrides, with its object."""
    if not inspect.ismethod(fn):
        return _REQUESTERS.get(fn), ()
    kinds = (vars(kind).get(fn.__name__) for kind in type(fn.__self__).__mro__)
    return next((_REQUESTERS[f] for f in kinds if f in _REQUESTERS), None), (fn.__self__,)


def dtype_of(name: torch.dtype | str) -> torch.dtype:
    """``"bf16"``, ``"bfloat16"`` or a torch dtype -> the torch dtype."""
    if isinstance(name, torch.dtype):
        return name
    found = _DTYPES.get(name, getattr(torch, name, None))
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"attnforge.explain: dtype {name!r} is not known; want one of {', '.join(_DTYPES)}"
        )
    return found


def as_described(x: Any, dtype: torch.dtype | None) -> Any:
    """A shape becomes a meta tensor of it; a list of shapes a list of them; the rest stays."""
    if isinstance(x, (tuple, torch.Size)) and x and all(isinstance(n, int) for n in x):
        return torch.empty(tuple(x), dtype=dtype or torch.float32, device="meta")
    if isinstance(x, (list, tuple)):
        return [as_described(item, dtype) for item in x]
    return x


def _described_keyword(name: str, x: Any, dtype: torch.dtype | None) -> Any:
    # window_size and the like are tuples of plain numbers, index tensors keep their own dtype.
    if not isinstance(x, (tuple, torch.Size)) or name == "window_size":
        return x
    if name in ("q", "k", "v", "k_cache", "v_cache", "k_pages", "v_pages"):
        return as_described(x, dtype)
    if name.startswith(("cu_", "seqused", "cache_seqlens", "block_table", "prefix_lens")):
        return as_described(x, torch.int32)
    return as_described(x, torch.float32)


def _placed(request: Request, place: tuple[str, str] | None) -> Request:
    # Shapes alone stand for tensors on the CPU unless said otherwise.
    kind, arch = place or (request.device, request.arch)
    if kind == "meta":
        kind = "cpu"
    return Request(
        request.op,
        kind,
        arch,
        request.dtype,
        request.dims,
        request.features,
        torch.are_deterministic_algorithms_enabled(),
        request.sizes,
    )
