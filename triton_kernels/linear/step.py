"""One token of a recurrence per row, on a pool of states updated in place: what a decode runs.

    S~ = decay S      additive  S <- S~ + k v^T                     o = scale S^T q
                      delta     S <- S~ + k (beta (v - S~^T k))^T

Algorithm: a program owns ``per`` tiles [K, BLOCK_C] of a state: each is read once, and what the
new state gives is taken from the old one, S^T q = S~^T q + (q^T k) update. A denominator has a z
per state, which one program must own: then ``per`` is all tiles. Bytes: 8 K V per row and head,
flops: 6 K V, with the delta rule 8 K V. Rows whose slot is no slot of the pool give 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.linear.decays import factor_of
from attnforge.triton_kernels.linear.walk import COLUMNS, NUMBERS, ROWS
from attnforge.triton_kernels.tensors import head_ptr


@triton.jit(do_not_specialize=["slots", "heads", "tiles", "per"])
def step(
    q, k, v, gate, beta, out, state, z, indices, slots, scale, eps, heads, group, tiles, per,
    R: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q, k, v, gate, beta, out: Views [B, 1, heads, X]; state fp32 [slots, HV, K, V]; z or None.

    beta: None for the additive recurrence. indices: int32 [B], or None: row b owns slot b.
    """
    pid = tl.program_id(0)
    part = pid % tl.cdiv(tiles, per)
    h = pid // tl.cdiv(tiles, per) % heads
    b = pid // tl.cdiv(tiles, per) // heads
    slot = b
    if indices is not None:
        slot = tl.load(indices + b)
    live = (slot >= 0) & (slot < slots)
    r = tl.arange(0, BLOCK_R)
    row = tl.load(head_ptr(q, b, h // group, 0) + r, mask=r < R, other=0.0).to(tl.float32)
    key = tl.load(head_ptr(k, b, h // group, 0) + r, mask=r < R, other=0.0).to(tl.float32)
    own = tl.cast(slot, tl.int64) * heads + h
    kept = tl.full([BLOCK_R, 1], 1.0, tl.float32)
    if gate is not None:
        logs = head_ptr(gate, b, h, 0)
        if DECAY == NUMBERS:
            kept = kept * factor_of(tl.load(logs))
        if DECAY == ROWS:
            kept = factor_of(tl.load(logs + r, mask=r < R, other=0.0))[:, None]
    base = 1.0
    if NORM:
        z_at = z + own * R + r
        new = tl.load(z_at, mask=(r < R) & live, other=0.0) * tl.sum(kept, 1) + key
        tl.store(z_at, new, mask=(r < R) & live)
        den = tl.sum(new * row, 0) * scale
        base = den + eps if NORM == 1 else tl.maximum(tl.abs(den), eps)
    for tile in tl.range(part * per, tl.minimum((part + 1) * per, tiles)):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        at = state + own * (R * C) + r[:, None] * C + c[None, :]
        inner = (r < R)[:, None] & (c < C)[None, :] & live
        s = tl.load(at, mask=inner, other=0.0) * kept
        if DECAY == COLUMNS:
            s = s * factor_of(tl.load(logs + c, mask=c < C, other=0.0))[None, :]
        value = tl.load(head_ptr(v, b, h, 0) + c, mask=c < C, other=0.0).to(tl.float32)
        if beta is not None:
            value = (value - tl.sum(s * key[:, None], 0)) * tl.load(head_ptr(beta, b, h, 0))
        y = (tl.sum(s * row[:, None], 0) + tl.sum(row * key, 0) * value) * scale / base
        tl.store(at, s + key[:, None] * value[None, :], mask=inner)
        tl.store(head_ptr(out, b, h, 0) + c, tl.where(live, y, 0.0), mask=c < C)
