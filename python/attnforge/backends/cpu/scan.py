"""``cpu.linear.diag_scan_*``: the kernels of ``csrc/cpu/linear/diag_scan.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge import _native
from attnforge.backends.cpu.linear import _dense, _native_op, clear_rest
from attnforge.registry.predicates import Available, Device, Dtypes
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def diag_scan_fwd(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    final_state: Tensor,
) -> None:
    """Launcher of ``diag_scan_fwd``."""
    clear_rest(cu_seqlens, out)
    _native_op("diag_scan_fwd")(
        x.contiguous(), g.contiguous(), _dense(initial_state), _dense(cu_seqlens), out, final_state
    )


def diag_scan_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Launcher of ``diag_scan_bwd``."""
    clear_rest(cu_seqlens, *grads[:2])
    _native_op("diag_scan_bwd")(
        dout.contiguous(), _dense(dfinal_state), x.contiguous(), g.contiguous(),
        _dense(initial_state), _dense(cu_seqlens), *grads,
    )  # fmt: skip


def _spec(op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.linear.{op}",
        op=op,
        backend="cpu",
        launch=f"{__name__}:{op}",
        requires=(
            Device("cpu"),
            Dtypes(torch.float32, torch.bfloat16, torch.float16),
            Available("libattnforge_cpu.so", _native.unavailable),
        ),
        score=100.0,  # far above the reference; room below for simpler kernels
        notes=notes,
    )


SPECS = (
    _spec("diag_scan_fwd", "channels in vectors, time in registers"),
    _spec("diag_scan_bwd", "states made again in segments of 64 tokens"),
)
