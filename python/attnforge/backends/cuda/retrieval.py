"""``cuda.retrieval.*.sm80``: the CUDA C++ kernels of ``csrc/cuda/retrieval``.

Nothing here looks at a value of a tensor: grids cover what the lists have room for, and blocks
behind the end of a list leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge._params import IndexedParams
from attnforge.backends import _gpu
from attnforge.backends.cuda import flash
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.registry.predicates import Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def indexed_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``indexed_fwd``. A forward of a backward, which wants out_lo, has no splits."""
    if out.numel() == 0:
        return
    group = 1 if p.ids.shape[1] == q.shape[2] else q.shape[2] // k.shape[2]
    low = out_lo if out_lo.dim() > 1 else None
    splits = _gpu.entry_splits(p.ids.shape[2], q.shape[1] * group) if low is None else 1
    parts = lses = None
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        lses = lse.new_empty((splits, *lse.shape))
    with _gpu.on(q.device):
        stream = _gpu.stream(q.device)
        flash._operator("indexed_fwd")(
            *map(_gpu.rows, (q, k, v)), *map(_gpu.contiguous, p[:5]), out, lse, low, parts, lses,
            p.softmax_scale, _gpu.ENTRIES, stream,
        )  # fmt: skip
        if parts is not None:
            flash._operator("merge_states")(parts, lses, out, lse, False, stream)


SPECS = (
    KernelSpec(
        id="cuda.retrieval.indexed_fwd.sm80",
        op="indexed_fwd",
        backend="cuda",
        launch=f"{__name__}:indexed_fwd",
        requires=(
            *flash._SM80,
            *flash._SHAPES[:2],
            Features("paged", "seqused_k"),
            flash._LIBRARY,
            SelfTest("retrieval.indexed_fwd"),
        ),
        # As flash's: proved under the host emulator, not run on a GPU yet.
        score=40.0,
        notes="the decode kernel over the entries of a list, gathered by cp.async",
    ),
)
