"""``cuda.linear.*``: the CUDA C++ kernels of ``csrc/cuda/linear``, for every GPU from sm_80 on.

A launcher hands over tensors, scalars and the stream in the order of the native schema. What a
backward writes apart from its results is allocated here, and rows behind the last sequence of a
packed batch are cleared, as kernels walk sequences only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge import _native_cuda
from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape
from attnforge.backends import _gpu
from attnforge.backends.cuda import flash
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.registry.predicates import Arch, Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["CHUNK", "COLUMNS", "DEVICE", "DIMS", "LIBRARY", "SPECS"]

DIMS = (64, 128)  # what the read side of a state is padded to, as csrc/cuda/linear/tiles.h has it
COLUMNS = 64  # of a block
_GATES = ("none", "head", "scalar", "key", "value")


def _given(p: LinearParams) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    gate = p.gate
    if gate is not None:
        gate = _gpu.rows(gate.contiguous()) if gate.dim() == 4 else gate.contiguous()
    return gate, _gpu.contiguous(p.initial_state), _gpu.contiguous(p.cu_seqlens)


def _numbers(p: LinearParams, device: torch.device) -> tuple[int, float, int]:
    return _GATES.index(p.gate_kind), p.scale, _gpu.stream(device)


def chunk_fwd(q: Tensor, k: Tensor, v: Tensor, p: LinearParams, outputs: LinearOutputs) -> None:
    """Launcher of ``linear_chunk_fwd``."""
    out, final_state = outputs[:2]
    if p.cu_seqlens is not None:  # rows of no sequence
        out.zero_()
    with _gpu.on(q.device):
        flash._operator("linear_chunk_fwd")(
            *map(_gpu.rows, (q, k, v)), *_given(p), out, final_state, *_numbers(p, q.device)
        )


def _workspace(q: Tensor, v: Tensor, dgate: Tensor) -> Tensor:
    """fp32: dq and dk of every value head, where heads share q and k; what dgate adds up."""
    token_heads = v.shape[0] * v.shape[1] * v.shape[2]
    size = 0
    if v.shape[2] > q.shape[2]:
        size += 2 * (-(-token_heads * q.shape[3] // 4) * 4)
    if dgate.dim() == 3:
        size += 2 * token_heads * -(-q.shape[3] // COLUMNS) * 4
    return q.new_empty(-(-size // 4) * 4, dtype=torch.float32)


def chunk_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    dfinal_z: Tensor | None,
    tape: LinearTape,
    p: LinearParams,
    grads: LinearGrads,
) -> None:
    """Launcher of ``linear_chunk_bwd``."""
    q, k, v, outputs = tape
    dq, dk, dv, dgate, dinitial_state = grads[:5]
    if p.cu_seqlens is not None:  # rows of no sequence
        for x in grads:
            x.zero_()
    with _gpu.on(q.device):
        flash._operator("linear_chunk_bwd")(
            _gpu.rows(dout), _gpu.contiguous(dfinal_state), *map(_gpu.rows, (q, k, v)),
            _gpu.rows(outputs.out), outputs.final_state.contiguous(), *_given(p), dq, dk, dv,
            dgate, dinitial_state, _workspace(q, v, dgate), *_numbers(p, q.device),
        )  # fmt: skip


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    indices: Tensor | None,
    p: LinearParams,
    out: Tensor,
) -> None:
    """Launcher of ``linear_step``: sequences of one token."""
    tokens = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with _gpu.on(q.device):
        flash._operator("linear_step")(
            *(x.unsqueeze(1) for x in tokens), state, _gpu.contiguous(p.gate),
            _gpu.contiguous(indices), out.unsqueeze(1), *_numbers(p, q.device),
        )  # fmt: skip


DEVICE = (Device("cuda"), Arch(80), Dtypes(torch.float32, torch.bfloat16, torch.float16))
LIBRARY = Available("libattnforge_cuda.so", _native_cuda.unavailable)
_FEATURES = tuple(f"{kind}_gate" for kind in _GATES[1:])


def _spec(kind: str, notes: str, dims: tuple[Dim, ...]) -> KernelSpec:
    return KernelSpec(
        id=f"cuda.linear.{kind}.sm80",
        op=f"linear_{kind}",
        backend="cuda",
        launch=f"{__name__}:{kind}",
        requires=(
            *DEVICE, *dims, Features(*_FEATURES, "varlen"), LIBRARY, SelfTest(f"linear.{kind}"),
        ),
        score=40.0,  # below Triton's 50: proved under the host emulator, not run on a GPU yet
        notes=notes,
    )  # fmt: skip


CHUNK = (Dim("head_dim", 8, 128, 8), Dim("v_head_dim", 8, 128, 8))
_STEP = (Dim("head_dim", 1, 1024), Dim("v_head_dim", 2, 1024, 2))

SPECS = (
    _spec("chunk_fwd", "the state in registers from the first token to the last", CHUNK),
    _spec("chunk_bwd", "three walks of the same kernel, no states kept, no atomics", CHUNK),
    _spec("step", "a pool of states in place, a batch of rows in flight", _STEP),
)
