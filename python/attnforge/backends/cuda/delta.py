"""``cuda.linear.delta_*``: the delta rules of ``csrc/cuda/linear``, for every GPU since sm_80."""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge._params import DeltaGrads, DeltaParams
from attnforge.backends import _gpu
from attnforge.backends.cuda import flash, linear
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.registry.predicates import Dim, Features
from attnforge.registry.spec import KernelSpec, Predicate

__all__ = ["SPECS"]


def _given(p: DeltaParams) -> tuple[Tensor | None, ...]:
    g = p.g
    if g is not None:
        g = _gpu.rows(g.contiguous()) if g.dim() == 4 else g.contiguous()
    return (g, *map(_gpu.contiguous, (p.beta, p.initial_state, p.cu_seqlens)))


def delta_chunk_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: DeltaParams, out: Tensor, final_state: Tensor
) -> None:
    """Launcher of ``delta_chunk_fwd``."""
    if p.cu_seqlens is not None:  # rows of no sequence
        out.zero_()
    with _gpu.on(q.device):
        flash._operator("delta_chunk_fwd")(
            *map(_gpu.rows, (q, k, v)), *_given(p), p.scale, out, final_state,
            _gpu.stream(q.device),
        )  # fmt: skip


def _workspace(q: Tensor, v: Tensor, p: DeltaParams, states: bool) -> Tensor:
    """What csrc/cuda/linear/delta_chunk.cu lists, in fp32; states: also the last ones."""
    token_heads, keys, values = v.shape[0] * v.shape[1] * v.shape[2], q.shape[3], v.shape[3]
    wide = 2 if v.dtype is torch.float32 else 3
    sizes = [token_heads * values] * wide + [token_heads * keys] * (1 + (v.shape[2] > q.shape[2]))
    sizes.append(token_heads * -(-values // linear.COLUMNS) * 4)
    if p.g is not None and p.g.dim() == 3:
        sizes.append(4 * token_heads * -(-keys // linear.COLUMNS) * 4)
    if states and p.g is not None:
        sequences = v.shape[0] if p.cu_seqlens is None else p.cu_seqlens.numel() - 1
        sizes.append(sequences * v.shape[2] * keys * values)
    return q.new_empty(sum(-(-size // 4) * 4 for size in sizes), dtype=torch.float32)


def delta_chunk_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: DeltaParams,
    grads: DeltaGrads,
) -> None:
    """Launcher of ``delta_chunk_bwd``."""
    if p.cu_seqlens is not None:  # rows of no sequence
        for x in grads[:5]:
            x.zero_()
    with _gpu.on(q.device):
        flash._operator("delta_chunk_bwd")(
            _gpu.rows(dout), _gpu.contiguous(dfinal_state), *map(_gpu.rows, (q, k, v)),
            *_given(p), p.scale, *grads, _workspace(q, v, p, dfinal_state is not None),
            _gpu.stream(q.device),
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
        *linear.CHUNK, Features("scalar_gate", "key_gate", "varlen"),
    ),
    _spec(
        "delta_chunk_bwd", "two such walks and four of the additive recurrence, no states kept",
        *linear.CHUNK, Features("scalar_gate", "key_gate", "varlen"),
    ),
    _spec(
        "delta_step", "both products while the state is read, its update from registers",
        Dim("head_dim", 1, 128), Dim("v_head_dim", 2, 1024, 2),
        Features("scalar_gate", "key_gate"),
    ),
)  # fmt: skip
