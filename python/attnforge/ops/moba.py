"""MoBA: each query attends to its own block of keys and the best of the blocks before it.

    s_j = <q_t, mean of the keys of block j>  (fp32, no scale);  own block: +inf;  later ones: -inf
    attention over the top_k blocks by s, causal inside the own one; one softmax over their union

Lu et al., 2025 (arXiv 2502.13189), equations 5 to 7. The own block counts towards top_k, so
top_k = 1 is attention inside the own block; some public code turns it into full attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.ops._checks import _shape, fail
from attnforge.ops.block_sparse import block_sparse_attention
from attnforge.ops.pooling import packed_blocks
from attnforge.ops.selection import BlockSelection, top_blocks

__all__ = ["moba_attention", "moba_select"]

# fp32 scores held at once: 16 MiB; on a CPU 2 MiB, so that what is made of them stays in caches.
_CHUNK_SCORES = 1 << 22
_CPU_CHUNK_SCORES = 1 << 19
_SLICE = 64  # keys of each block of packed sequences that are summed at once


def _block_means(k: Tensor, block_size: int) -> Tensor:
    """[S, H, D] -> fp32 [blocks, H, D]; the mean of a shorter last block is over its own keys."""
    keys, heads, dim = k.shape
    blocks = -(-keys // block_size)
    whole = keys // block_size
    means = k.new_empty((blocks, heads, dim), dtype=torch.float32)
    full = k[: whole * block_size].reshape(whole, block_size, heads, dim)
    means[:whole] = full.float().mean(1)
    if whole < blocks:
        means[whole:] = k[whole * block_size :].float().mean(0, keepdim=True)
    return means


def _packed_means(k: Tensor, starts: Tensor, sizes: Tensor, block_size: int) -> Tensor:
    """[T, H, D] -> fp32 [blocks, H, D] of blocks of sizes [blocks] <= block_size; 0 for a size of
    0. A slice of each block at a time: the same sums on every device, and no second copy of k."""
    total = k.new_zeros((starts.shape[0], *k.shape[1:]), dtype=torch.float32)
    for lo in range(0, block_size, _SLICE):
        at = torch.arange(lo, min(lo + _SLICE, block_size), device=k.device)
        rows = k[(starts[:, None] + at).clamp_max(k.shape[0] - 1)].float()
        total += torch.where((at < sizes[:, None])[..., None, None], rows, 0.0).sum(1)
    return total / sizes.clamp_min(1)[:, None, None]


def _best(
    q: Tensor, means: Tensor, first: int | Tensor, last: int | Tensor, slots: int, causal: bool
) -> Tensor:
    """int32 ids [Hq, rows, slots], counted from ``first``, of the best blocks in first .. last.

    q [rows, Hq, D], means fp32 [blocks, Hk, D]; first and last: blocks, of all rows or int64
    [rows, 1]. causal: the last one is the row's own.
    """
    rows, heads, dim = q.shape
    blocks, heads_kv = means.shape[:2]
    means = means.permute(1, 2, 0)  # [Hk, D, blocks]
    ids = q.new_empty((heads, rows, slots), dtype=torch.int32)
    column = torch.arange(blocks, device=q.device)
    chunk = _CPU_CHUNK_SCORES if q.device.type == "cpu" else _CHUNK_SCORES
    step = max(1, chunk // (heads * blocks))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        low, high = (x[part] if isinstance(x, Tensor) else x for x in (first, last))
        x = q[part].float().reshape(-1, heads_kv, heads // heads_kv, dim).permute(1, 2, 0, 3)
        scores = (x.flatten(1, 2) @ means).view(heads, -1, blocks)
        scores = scores.masked_fill((column < low) | (column > high), -torch.inf)
        if causal:
            scores = scores.masked_fill(column == high, torch.inf)
        found = top_blocks(scores, slots)
        ids[:, part] = torch.where(found < 0, found, found - low).int()
    return ids


def _select(
    q: Tensor, k: Tensor, block_size: int, top_k: int, causal: bool, means: Tensor | None = None
) -> Tensor:
    """One sequence: q [Sq, Hq, D], k [Sk, Hk, D] -> int32 ids [Hq, Sq, slots]."""
    rows, heads, _ = q.shape
    keys = k.shape[0]
    blocks = max(1, -(-keys // block_size))
    slots = min(top_k, blocks)
    if keys == 0 or rows == 0:
        return q.new_full((heads, rows, slots), -1, dtype=torch.int32)
    means = _block_means(k, block_size) if means is None else means.float()
    at = torch.arange(rows, device=q.device) + (keys - rows)  # key positions of the queries
    own = at.div(block_size, rounding_mode="floor").unsqueeze(1)
    return _best(q, means, 0, own if causal else blocks - 1, slots, causal)


def _select_packed(
    q: Tensor, k: Tensor, cu: Tensor, block_size: int, top_k: int, causal: bool
) -> Tensor:
    """Packed sequences: int32 ids [Hq, T, slots] with bounds of sizes alone: boundaries are not
    read on the host, so a row is scored against the blocks of all sequences and hides the others.
    """
    tokens, heads, _ = q.shape
    slots = min(top_k, max(1, -(-tokens // block_size)))
    if tokens == 0 or cu.shape[0] < 2:
        return q.new_full((heads, tokens, slots), -1, dtype=torch.int32)
    room = tokens // block_size + cu.shape[0] - 1  # each sequence has one shorter block at most
    starts, sizes, bounds = packed_blocks(cu, tokens, block_size, block_size, True, room)
    row = torch.arange(tokens, device=q.device)
    ends = cu[1:].long().contiguous()
    sequence = torch.searchsorted(ends, row, right=True).clamp_max(ends.shape[0] - 1)
    first = bounds[sequence].long()
    if causal:
        last = first + (row - cu[sequence]).div(block_size, rounding_mode="floor")
    else:
        last = bounds[sequence + 1].long() - 1
    means = _packed_means(k, starts, sizes, block_size)
    return _best(q, means, first.unsqueeze(1), last.unsqueeze(1), slots, causal)


def moba_select(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    means: Tensor | None = None,
) -> BlockSelection:
    """The blocks that MoBA's gate picks for each query and query head.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D] (after RoPE), or packed [T, H, D] with cu_seqlens [B + 1].
    means: [B, blocks, Hk, D] of the blocks of k, if the caller keeps them (a decode): k itself is
    not read then; batched calls only.
    Ties go to the later block. Without causal no block is forced. No gradient flows through the
    choice. Work: 2 D per (query, block), packed with the blocks of all sequences; scores are held a
    chunk at a time. Nothing is read on the host.

    Returns a BlockSelection with q_block 1 and lists [B, Hq, Sq, min(top_k, blocks)], packed
    [Hq, T, min(top_k, blocks of T tokens)].
    """
    op = "moba_select"
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fail(op, f"{name} is {value!r}; want an int >= 1")
    rank = 4 if cu_seqlens is None else 3
    if q.dim() != rank or k.dim() != rank:
        fail(
            op,
            f"q has shape {_shape(q)} and k {_shape(k)}; want [batch, seq, heads, head_dim], or "
            "[total, heads, head_dim] with cu_seqlens",
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] or q.shape[-1] != k.shape[-1]:
        fail(
            op,
            f"heads or head_dim do not fit; got q {_shape(q)}, k {_shape(k)}; want query heads a "
            "multiple of KV heads and one head_dim",
        )
    q, k = q.detach(), k.detach()
    if cu_seqlens is None:
        if q.shape[0] != k.shape[0]:
            fail(op, f"batch sizes differ; got {q.shape[0]} and {k.shape[0]}; want one")
        kept = [None] * q.shape[0] if means is None else means.detach()
        want = (k.shape[0], -(-k.shape[1] // block_size), *k.shape[2:])
        if means is not None and tuple(means.shape) != want:
            fail(op, f"means has shape {_shape(means)}; want {want}: one row per block of k")
        lists = [
            _select(x, y, block_size, top_k, causal, m) for x, y, m in zip(q, k, kept, strict=True)
        ]
        slots = min(top_k, max(1, -(-k.shape[1] // block_size)))
        empty = q.new_empty((0, q.shape[2], q.shape[1], slots), dtype=torch.int32)
        indices = torch.stack(lists) if lists else empty
    else:
        if means is not None:
            fail(op, "means is for batched calls; got cu_seqlens as well")
        indices = _select_packed(q, k, cu_seqlens, block_size, top_k, causal)
    return BlockSelection(indices, 1, block_size)


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Mixture of block attention (Lu et al., 2025): ``moba_select``, then attention.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], or packed [T, H, D] with cu_seqlens
    [B + 1] int32. block_size: keys of a block, at most 4096. top_k: blocks of each query, its own
    among them. With top_k at least the number of blocks this is dense attention.

    Returns out, or (out, lse), as ``block_sparse_attention``; differentiable in q, k and v.
    """
    selection = moba_select(
        q, k, block_size=block_size, top_k=top_k, causal=causal, cu_seqlens=cu_seqlens
    )
    return block_sparse_attention(
        q,
        k,
        v,
        selection,
        causal=causal,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        softmax_scale=softmax_scale,
        return_lse=return_lse,
        backend=backend,
    )
