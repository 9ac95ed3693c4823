"""``cuda.linear.diag_scan_*``: the diagonal scan of ``csrc/cuda/linear``, since sm_80."""

from __future__ import annotations

from torch import Tensor

from attnforge.backends import _gpu
from attnforge.backends.cuda import flash, linear
from attnforge.backends.cuda._selftest import SelfTest
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
    if cu_seqlens is not None:  # rows of no sequence
        out.zero_()
    given = map(_gpu.contiguous, (x, g, initial_state, cu_seqlens))
    with _gpu.on(x.device):
        flash._operator("diag_scan_fwd")(*given, out, final_state, _gpu.stream(x.device))


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
    if cu_seqlens is not None:  # rows of no sequence
        for grad in grads[:2]:
            grad.zero_()
    given = map(_gpu.contiguous, (dout, dfinal_state, x, g, initial_state, cu_seqlens))
    with _gpu.on(x.device):
        flash._operator("diag_scan_bwd")(*given, *grads, _gpu.stream(x.device))


def _spec(op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cuda.linear.{op}.sm80",
        op=op,
        backend="cuda",
        launch=f"{__name__}:{op}",
        requires=(*linear.DEVICE, linear.LIBRARY, SelfTest(f"scan.{op}")),
        score=40.0,  # as those of cuda.linear
        notes=notes,
    )


SPECS = (
    _spec("diag_scan_fwd", "a thread per channel, eight tokens in flight"),
    _spec("diag_scan_bwd", "states made again, in the room of the gates' gradient"),
)
