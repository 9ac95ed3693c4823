"""Argument checks of the linear family: [B, T, H, D] operands, packed sequences, states, gates.

Layouts are those of flash-linear-attention: q, k [B, T, H, K], v [B, T, HV, V] with HV a multiple
of H (value head h reads q and k of head h // (HV / H)), states [N, HV, K, V] in fp32, where N is
the batch, or with ``cu_seqlens`` the number of sequences packed into a batch of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.ops import _checks
from attnforge.ops._checks import _name, _shape, fail
from attnforge.registry import override

__all__ = [
    "accumulator",
    "boundary_values",
    "gate",
    "heads",
    "packed",
    "scale",
    "state",
    "state_indices",
]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, gates and denominators: fp64 beside fp64, else fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def heads(op: str, q: Any, k: Any, v: Any, rank: int = 4) -> None:
    """q, k [.., H, K] and v [.., HV, V] agree, HV a multiple of H; rank 3 is one token each."""
    _checks.tensors(op, q, k, v)
    layout = "[batch, time, heads, head_dim]" if rank == 4 else "[batch, heads, head_dim]"
    _checks._three(op, q, k, v, rank, layout)
    lead = rank - 2
    if q.shape[:lead] != k.shape[:lead] or q.shape[:lead] != v.shape[:lead]:
        fail(
            op,
            f"q, k and v differ in batch or time; got q {_shape(q)}, k {_shape(k)}, v {_shape(v)}; "
            f"want one {layout.rpartition(', heads')[0]}] for the three; linear attention has one "
            "query per key",
        )
    if q.shape[lead:] != k.shape[lead:]:
        fail(
            op,
            f"q and k differ in heads or head_dim; got {_shape(q)} and {_shape(k)}; want equal "
            "shapes; v alone may have more heads",
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        fail(op, f"head_dim is 0; got q {_shape(q)}, v {_shape(v)}; want at least 1")
    if q.shape[-2] == 0 or v.shape[-2] % q.shape[-2] != 0:
        fail(
            op,
            f"value heads are no multiple of the heads of q; got {v.shape[-2]} and {q.shape[-2]}; "
            "want heads_v % heads == 0, where value head h reads head h // (heads_v / heads)",
        )


def packed(op: str, q: Tensor, cu_seqlens: Any) -> tuple[Tensor | None, int]:
    """``cu_seqlens`` as int32 and the number of sequences; without it, None and the batch."""
    if cu_seqlens is None:
        return None, q.shape[0]
    _checks.tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        fail(
            op,
            f"cu_seqlens has dtype {_name(cu_seqlens.dtype)}; want int32 or int64; convert with "
            ".to(torch.int32)",
            TypeError,
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != q.device:
        fail(
            op,
            f"cu_seqlens is {_shape(cu_seqlens)} on {cu_seqlens.device}; want sequences + 1 "
            f"boundaries on {q.device}, the first of them 0",
        )
    if q.shape[0] != 1:
        fail(
            op,
            f"cu_seqlens comes with a batch of {q.shape[0]}; want batch 1 with the sequences one "
            "after another in time; reshape to [1, batch * time, heads, head_dim]",
        )
    return cu_seqlens.to(torch.int32), cu_seqlens.shape[0] - 1


def boundary_values(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """0, rising, within the packed rows. Off the CPU this waits, so only ``debug`` asks for it."""
    if cu_seqlens is None or not (cu_seqlens.device.type == "cpu" or override.checks):
        return
    values = cu_seqlens.tolist()
    for n, value in enumerate(values):
        low = values[n - 1] if n else 0
        if not (low <= value <= total) or (n == 0 and value != 0):
            fail(
                op,
                f"cu_seqlens[{n}] is {value}; want 0 first, then rising boundaries up to the "
                f"{total} packed rows, such as a cumulative sum of lengths",
            )


def gate(op: str, name: str, x: Any, shape: tuple[int, ...], q: Tensor, layout: str) -> Tensor:
    """A log gate of ``shape`` on q's device, in the accumulator's dtype."""
    return _floats(op, name, x, shape, q, f"a natural-log gate {layout}")


def state(op: str, name: str, x: Any, shape: tuple[int, ...], q: Tensor, layout: str) -> Tensor:
    """A state of ``shape`` on q's device, in the accumulator's dtype."""
    return _floats(op, name, x, shape, q, f"one state per sequence {layout}")


def _floats(op: str, name: str, x: Any, shape: tuple[int, ...], q: Tensor, want: str) -> Tensor:
    _checks._floating(op, name, x, q)
    if tuple(x.shape) != shape:
        fail(op, f"{name} has shape {_shape(x)}; want {shape}: {want}")
    return x.to(accumulator(q.dtype))  # type: ignore[no-any-return]


def scale(op: str, value: Any, head_dim: int) -> float:
    """The factor of the output, default 1 / sqrt(K); a finite number."""
    chosen = head_dim**-0.5 if value is None else value
    _finite = isinstance(chosen, (float, int, torch.SymFloat, torch.SymInt))
    if not _finite or not abs(chosen) < float("inf"):
        fail(op, f"scale is {value!r}; want a finite number; None takes 1/sqrt(head_dim)")
    return chosen  # type: ignore[no-any-return]


def state_indices(op: str, x: Any, q: Tensor, slots: int) -> Tensor | None:
    """int32 [B]: the slot of the state pool that each row owns, or -1 to skip the row.

    Without them row b owns slot b. Values are looked at on the CPU, or under ``debug``.
    """
    if x is None:
        if slots < q.shape[0]:
            fail(
                op,
                f"state has {slots} slots; got {q.shape[0]} rows; want a slot for each, or "
                "state_indices with -1 for the rows to skip",
            )
        return None
    _checks._index(op, "state_indices", x, q, q.shape[0])
    if x.device.type == "cpu" or override.checks:
        used = [slot for slot in x.tolist() if slot != -1]
        if any(not 0 <= slot < slots for slot in used) or len(set(used)) != len(used):
            fail(
                op,
                f"state_indices is {x.tolist()}; want slots 0 .. {slots - 1}, each at most once, "
                "or -1 to skip a row",
            )
    return x  # type: ignore[no-any-return]
