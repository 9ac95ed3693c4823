"""A small problem per kernel and dtype at first use on a GPU, compared with the reference.

Triton compiles on the user's machine, with the user's version and driver, and there have been
versions that compiled attention wrongly. A kernel that fails here warns once and is routed around,
which ``explain`` shows with the reason. Costs milliseconds beyond a compilation that would come
anyway or soon; off where there is no GPU, in the interpreter, and while a CUDA graph is captured.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import FLOAT8, FlashGrads, FlashParams, FlashTape
from attnforge.reference import flash as reference
from attnforge.registry.predicates import Available, dtype_name
from attnforge.registry.spec import Request

__all__ = ["SelfTest", "check"]

# Largest error on values of order 1. Wrong code is off by the values themselves.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2, FLOAT8: 6e-2}

_VERDICTS: dict[tuple[str, torch.dtype, str], str | None] = {}


class SelfTest(Available):
    """The kernel ``kind`` of the flash family agrees with the reference on the GPU of a request."""

    def __init__(self, kind: str) -> None:
        super().__init__("self-test", lambda: None)
        self.kind = kind

    def __call__(self, request: Request, /) -> str | None:
        if request.dtype not in _TOLERANCE or not _on_gpu(request):
            return None
        key = (self.kind, request.dtype, request.arch)
        if key not in _VERDICTS:
            _VERDICTS[key] = check(self.kind, request.dtype, torch.device("cuda"))
        return _VERDICTS[key]


def _on_gpu(request: Request) -> bool:
    """Whether the request is for the current GPU, and not for one that is only described."""
    if request.device != "cuda" or _settings.triton_interpreted() or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    return request.arch == f"sm_{major}{minor}" and not torch.cuda.is_current_stream_capturing()


def check(kind: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason not to use ``triton.flash.<kind>``, which is also given as a warning."""
    launchers = importlib.import_module("attnforge.backends.triton.flash")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            error = _worst(*_PROBLEMS[kind](getattr(launchers, kind), dtype, device))
        reason = f"off by {error:.3g} from the reference" if error > _TOLERANCE[dtype] else ""
    except Exception as failure:  # a compiler that crashes is as good a reason
        reason = f"{type(failure).__name__}: {failure}"
    if not reason:
        return None
    import triton

    text = f"its self-test in {dtype_name(dtype)} failed with Triton {triton.__version__}: {reason}"
    warnings.warn(
        f"attnforge: triton.flash.{kind} is not used: {text}", RuntimeWarning, stacklevel=2
    )
    return text


def _worst(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference; NaN counts as infinite."""
    gaps = [
        (a.double() - b.double()).abs().max().nan_to_num(float("inf"))
        for a, b in zip(got, want, strict=True)
    ]
    return max(float(gap) for gap in gaps)


def _inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, FlashParams]:
    """A causal GQA problem with a window: whole and masked tiles, tails in both directions."""
    g = torch.Generator().manual_seed(0)
    sizes = ((1, 200, 4, 64), (1, 330, 2, 64), (1, 330, 2, 64))
    q, k, v = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
    sinks = torch.randn(4, generator=g).to(device)
    return q, k, v, FlashParams(None, None, None, None, sinks, 200, 330, 0.125, 250, 0, 0.0)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a problem whose V is as wide as its K."""
    out = torch.empty_like(q, dtype=torch.bfloat16 if q.dtype is FLOAT8 else q.dtype)
    return out, q.new_empty((1, 4, q.shape[1]), dtype=torch.float32)


def _forward(
    run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(dtype, device)
    got, want, none = _outputs(q), _outputs(q), q.new_empty(0)
    run(q, k, v, p, *got, none)
    reference.forward(q, k, v, p, *want, none)
    return list(got), list(want)


def _backward(
    run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(dtype, device)
    out, lse = _outputs(q)
    low = torch.empty_like(out) if dtype.itemsize == 2 else q.new_empty(0)
    reference.forward(q, k, v, p, out, lse, low)
    tape, dout = FlashTape(q, k, v, out, lse, low), torch.ones_like(out)
    found = []
    for backward in (run, reference.backward):
        dsinks = q.new_empty(4, dtype=torch.float32)
        dq, dk, dv = map(torch.empty_like, (q, k, v))
        grads = FlashGrads(dq, dk, dv, dsinks, *[q.new_empty(0)] * 5)
        backward(dout, None, tape, p, grads)
        found.append([x / x.abs().max() for x in grads[:4]])
    return found[0], found[1]


def _decode(
    run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(dtype, device)
    q, p = q[:, :3].contiguous(), p._replace(max_seqlen_q=3)
    got, want = _outputs(q), _outputs(q)
    run(q, k, v, p, *got, 2)
    reference.forward(q, k, v, p, *want, q.new_empty(0))
    return list(got), list(want)


def _merge(
    run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    outs = [x.to(device, dtype) for x in torch.randn(3, 1, 20, 4, 64).unbind()]
    lses = [x.to(device) for x in torch.randn(3, 1, 4, 20).unbind()]
    got, want = _outputs(outs[0]), _outputs(outs[0])
    run(outs, lses, *got)
    reference.merge(outs, lses, *want)
    return list(got), list(want)


_PROBLEMS = {"fwd": _forward, "bwd": _backward, "decode": _decode, "merge": _merge}
