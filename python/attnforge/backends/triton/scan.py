"""``triton.linear.diag_scan_*``: the diagonal scan of ``triton_kernels/linear/scan.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import _on, _tiles
from attnforge.backends.triton.linear import _DEVICE, _DTYPES, _TRITON, _module
from attnforge.registry.spec import KernelSpec
from attnforge.triton_kernels.linear import config as tiles_of

__all__ = ["SPECS"]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _launch(kernel: str, x: Tensor, cu_seqlens: Tensor | None, *args: Any) -> None:
    time, width = x.shape[1:]
    tiles = _tiles(width, tiles_of.SCAN["BLOCK_D"])
    if grid := tiles * _sequences(x, cu_seqlens):
        with _on(x.device):
            getattr(_module("scan"), kernel)[(grid,)](
                *args, _dense(cu_seqlens), time, tiles, D=width, **tiles_of.SCAN
            )


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
    final = final_state if final_state.dim() > 1 else None
    _launch("diag_scan_fwd", x, cu_seqlens, x.contiguous(), g.contiguous(), out,
            _dense(initial_state), final)  # fmt: skip


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
    dx, dg, dinitial = grads
    if cu_seqlens is not None:  # rows of no sequence
        dx.zero_()
        dg.zero_()
    rows = x.shape[0] * x.shape[1]
    blocks = rows // tiles_of.SCAN["BLOCK_T"] + _sequences(x, cu_seqlens) + 1
    kept = x.new_empty(blocks, x.shape[2], dtype=torch.float32)
    _launch(
        "diag_scan_bwd", x, cu_seqlens, dout.contiguous(), x.contiguous(), g.contiguous(), dx, dg,
        _dense(initial_state), _dense(dfinal_state),
        None if initial_state is None else dinitial, kept,
    )  # fmt: skip


def _spec(op: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.linear.{op}",
        op=op,
        backend="triton",
        launch=f"{__name__}:{op}",
        requires=(_DEVICE, _DTYPES, _TRITON, SelfTest(f"scan.{op}")),
        score=50.0,  # above the reference; native kernels of a device go first
        notes=notes,
    )


SPECS = (
    _spec("diag_scan_fwd", "associative scans of blocks of tokens, one after the other"),
    _spec("diag_scan_bwd", "states made again from before each block; no atomics"),
)
