"""``cuda.linear.delta_*``: the delta rules of ``csrc/cuda/linear``, forward and step, since sm_80.

Gates of keys (KDA) have a step; in chunks, and in every backward, other backends serve.
"""

from __future__ import annotations

from torch import Tensor

from attnforge._params import DeltaParams
from attnforge.backends import _gpu
from attnforge.backends.cuda import flash, linear
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.registry.predicates import Dim, Features
from attnforge.registry.spec import KernelSpec, Predicate

__all__ = ["SPECS"]


def delta_chunk_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: DeltaParams, out: Tensor, final_state: Tensor
) -> None:
    """Launcher of ``delta_chunk_fwd``."""
    if p.cu_seqlens is not None:  # rows of no sequence
        out.zero_()
    with _gpu.on(q.device):
        flash._operator("delta_chunk_fwd")(
            *map(_gpu.rows, (q, k, v)), *map(_gpu.contiguous, p[:4]), p.scale, out,
            final_state, _gpu.stream(q.device),
        )  # fmt: skip


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    p: DeltaParams,
    out: Tensor,
) -> None:
    """Launcher of ``delta_step``: sequences of one token."""
    tokens = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    g = None if p.g is None else p.g.contiguous().unsqueeze(1)
    with _gpu.on(q.device):
        flash._operator("delta_step")(
            *(x.unsqueeze(1) for x in tokens), g, p.beta.contiguous(), state,
            _gpu.contiguous(state_indices), p.scale, out.unsqueeze(1), _gpu.stream(q.device),
        )  # fmt: skip


def _spec(op: str, notes: str, *needs: Predicate) -> KernelSpec:
    return KernelSpec(
        id=f"cuda.linear.{op}.sm80",
        op=op,
        backend="cuda",
        launch=f"{__name__}:{op}",
        requires=(*linear.DEVICE, *needs, linear.LIBRARY, SelfTest(f"delta.{op}")),
        score=40.0,  # as those of cuda.linear
        notes=notes,
    )


SPECS = (
    _spec(
        "delta_chunk_fwd", "chunks of 32 in registers, solved by forward substitution in fp32",
        *linear.CHUNK, Features("scalar_gate", "varlen"),
    ),
    _spec(
        "delta_step", "both products while the state is read, its update from registers",
        Dim("head_dim", 1, 128), Dim("v_head_dim", 2, 1024, 2),
        Features("scalar_gate", "key_gate"),
    ),
)  # fmt: skip
