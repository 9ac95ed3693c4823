"""Work of a flash attention problem: flops and the least memory traffic."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

__all__ = ["Cost", "cost", "visible_pairs"]

Kind = Literal["fwd", "bwd", "fwd+bwd", "decode"]


class Cost(NamedTuple):
    """flops: multiply and add count as two. bytes: each operand read or written once."""

    flops: int
    bytes: int


def visible_pairs(
    seqlen_q: int, seqlen_k: int, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
) -> int:
    """Number of (query, key) pairs that the masks leave, bottom-right aligned."""
    left, right = window_size[0], 0 if causal else window_size[1]
    if left < 0 and right < 0:
        return seqlen_q * seqlen_k
    i = torch.arange(seqlen_q, dtype=torch.int64) + (seqlen_k - seqlen_q)
    first = torch.zeros_like(i) if left < 0 else (i - left).clamp(0, seqlen_k)
    last = torch.full_like(i, seqlen_k) if right < 0 else (i + right + 1).clamp(0, seqlen_k)
    return int((last - first).clamp_min(0).sum())


def cost(
    *,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    kind: Kind = "fwd",
) -> Cost:
    """Work of one call: ``fwd``, ``bwd``, ``fwd+bwd`` or ``decode`` (counted as ``fwd``).

    flops per visible pair and query head: forward 2 (D + Dv) for Q K^T and P V; backward
    2 (3 D + 2 Dv) for S again, dP, dV, dQ, dK. Softmax is not counted.

    bytes: forward reads q, k, v and writes out and lse; backward reads q, k, v, out, dout and
    lse and writes dq, dk, dv.
    """
    dv = head_dim if v_head_dim is None else v_head_dim
    pairs = batch * heads_q * visible_pairs(seqlen_q, seqlen_k, causal, window_size)
    size = dtype.itemsize
    q = batch * seqlen_q * heads_q * head_dim * size
    out = batch * seqlen_q * heads_q * dv * size
    kv = batch * seqlen_k * heads_kv * (head_dim + dv) * size
    lse = batch * heads_q * seqlen_q * 4
    forward = Cost(2 * pairs * (head_dim + dv), q + kv + out + lse)
    if kind in ("fwd", "decode"):
        return forward
    backward = Cost(2 * pairs * (3 * head_dim + 2 * dv), 2 * (q + kv + out) + lse)
    if kind == "bwd":
        return backward
    if kind != "fwd+bwd":
        raise ValueError(
            f"attnforge.cost: kind is {kind!r}; want 'fwd', 'bwd', 'fwd+bwd' or 'decode'"
        )
    return Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
