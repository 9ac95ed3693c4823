"""Diagonal scan: exponential averages and HGRN, h_t = e^{g_t} h_{t-1} + x_t per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnforge.ops import _checks, _linear_checks, _scan_ops
from attnforge.ops._checks import _name, _shape, fail
from attnforge.ops._delta_autograd import diag_scan
from attnforge.ops.flash import _choice
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["hgrn"]


def _requests(x: Tensor, g: Tensor, *, cu_seqlens: Any = None, **_: Any) -> Sequence[Request]:
    meta = _scan_ops.metadata(x, cu_seqlens)
    return [_scan_ops.request(f"diag_scan_{way}", meta) for way in ("fwd", "bwd")]


@explained_by(_requests)
def hgrn(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = e^{g_t} h_{t-1} + x_t -> (h [B, T, D] of x's dtype, final_state or None).

    x [B, T, D] fp32, bf16, fp16 (fp64: reference); g [B, T, D] natural-log gates in any floating
    dtype, -inf a reset; initial_state and final_state [N, D] fp32, where N is the batch, or with
    cu_seqlens ([N + 1] int32 or int64) the sequences packed into a batch of one. Differentiable in
    x, g and initial_state, through h and final_state. In HGRN x is (1 - e^g) i. Cost: x, g and h
    once through memory. Source: Qin et al., HGRN (2023).
    """
    op = "hgrn"
    _checks.tensor(op, "x", x)
    if x.dim() != 3 or x.dtype not in _checks._DTYPES:
        fail(op, f"x is {_shape(x)} {_name(x.dtype)}; want floating [batch, time, channels]; "
                 "flatten heads and channels into one dimension")  # fmt: skip
    cu, n = _linear_checks.packed(op, x, cu_seqlens)
    g = _linear_checks.gate(op, "g", g, tuple(x.shape), x, "[batch, time, channels]")
    if initial_state is not None:
        shape = (n, x.shape[2])
        initial_state = _linear_checks.state(op, "initial_state", initial_state, shape, x, "[N, D]")
    out, state = diag_scan(x, g, initial_state, cu, output_final_state, _choice(op, backend))
    return out, state if output_final_state else None
