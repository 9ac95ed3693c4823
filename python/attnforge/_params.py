"""Parameters of the operators, one named tuple per operator: the Python twin of ``params.h``.

A launcher receives its tensors and one of these, never a long list of arguments.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["FlashGrads", "FlashParams", "FlashTape"]


class FlashParams(NamedTuple):
    """Everything a ``flash_*`` launcher needs beyond q, k, v and its outputs.

    Windows are normalised: -1 is unlimited, and a causal call has ``window_right == 0``.
    Index tensors were validated on the CPU; on other devices only their metadata was.
    """

    cu_seqlens_q: Tensor | None  # [B + 1] int32; given together with cu_seqlens_k, or neither
    cu_seqlens_k: Tensor | None  # [B + 1] int32
    seqused_k: Tensor | None  # [B] int32: key slots at or past it are never read
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    max_seqlen_q: int  # an upper bound of the rows of one sequence; exact on the CPU
    max_seqlen_k: int
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float  # 0 = off


class FlashTape(NamedTuple):
    """What a forward leaves for the backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    out_lo: Tensor  # round16(O_fp32 - out), or empty


class FlashGrads(NamedTuple):
    """Outputs of a backward launcher, allocated by the operator."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor  # [Hq], or empty without sinks
