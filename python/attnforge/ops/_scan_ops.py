"""Operators of the diagonal scan: schemas, outputs, implementations that pick a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _ops
from attnforge.ops import _flash_vmap, _linear_checks
from attnforge.ops._linear_checks import accumulator
from attnforge.registry.select import device_arch, launcher
from attnforge.registry.spec import Request

__all__ = ["diag_scan_bwd", "diag_scan_fwd", "metadata", "request"]

Grads = tuple[Tensor, Tensor, Tensor]


def metadata(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Any, ...]:
    """What selection may look at, as a hashable tuple (see ``request``)."""
    return x.device, x.dtype, cu_seqlens is not None


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``metadata`` stands for."""
    device, dtype, varlen = meta
    kind, arch = device_arch(device)
    used = frozenset({"varlen"} if varlen else ())
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(op, kind, arch, dtype, (), used, deterministic)


def _alloc_fwd(x: Tensor, cu_seqlens: Tensor | None, final_state: bool) -> tuple[Tensor, Tensor]:
    """out like x and the states [N, D], or [0] if they are not wanted; contiguous."""
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (n, x.shape[2]) if final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=accumulator(x.dtype))


def _fwd(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _linear_checks.boundary_values("diag_scan_fwd", cu_seqlens, x.shape[1])
    out, state = _alloc_fwd(x, cu_seqlens, output_final_state)
    launch = launcher("diag_scan_fwd", metadata(x, cu_seqlens), request, backend)
    launch(x, g, initial_state, cu_seqlens, out, state)
    return out, state


def _fwd_fake(
    x: Tensor, g: Tensor, initial: Tensor | None, cu: Tensor | None, final: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    return _alloc_fwd(x, cu, final)


def _bwd_out(
    dout: Tensor, dstate: Tensor | None, x: Tensor, g: Tensor, initial: Tensor | None, *_: Any
) -> Grads:
    none = g.new_empty(0)
    return (
        x.new_empty(x.shape),
        g.new_empty(g.shape),
        (none if initial is None else initial.new_empty(initial.shape)),
    )


def _bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> Grads:
    _linear_checks.boundary_values("diag_scan_bwd", cu_seqlens, x.shape[1])
    grads = _bwd_out(dout, dfinal_state, x, g, initial_state)
    launch = launcher("diag_scan_bwd", metadata(x, cu_seqlens), request, backend)
    launch(dout, dfinal_state, x, g, initial_state, cu_seqlens, grads)
    return grads


_INPUTS = "Tensor x, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, "
diag_scan_fwd = _ops.define(
    f"diag_scan_fwd({_INPUTS}bool output_final_state, str? backend) "
    "-> (Tensor out, Tensor final_state)",
    _fwd,
    _fwd_fake,
    _flash_vmap.looped("diag_scan_fwd"),
)
diag_scan_bwd = _ops.define(
    f"diag_scan_bwd(Tensor dout, Tensor? dfinal_state, {_INPUTS}str? backend) "
    "-> (Tensor dx, Tensor dg, Tensor dinitial_state)",
    _bwd,
    _bwd_out,
    _flash_vmap.looped("diag_scan_bwd"),
)
