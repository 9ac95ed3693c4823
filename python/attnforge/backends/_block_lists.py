"""Block lists as kernels on GPUs take them: ascending, without repetitions, and their inverse.

Made by sorts on the device of the lists, without a synchronisation; sizes do not depend on data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import BlockLists, FlashParams

__all__ = ["Ascending", "Inverse", "ascending", "blocks_of", "inverse", "pack_of", "union"]


class Ascending(NamedTuple):
    """Lists of block ids that rise, what is not an id behind them as the number of blocks."""

    ids: Tensor  # int32 [B | 1, H, R, S]; packed sequences have one batch entry
    counts: Tensor  # int32 [B | 1, H, R]: ids of each list
    first: Tensor | None  # int32 [B + 1]: where the list rows of packed sequences begin


class Inverse(NamedTuple):
    """For each block of keys the list rows that name it, ascending."""

    rows: Tensor  # int32 [B | 1, H, R * S], counted from the first list row of their sequence
    starts: Tensor  # int32 [B | 1, H, blocks + 1]: where the rows of a block begin
    blocks: int  # of all sequences together where they are packed
    each: int  # blocks from sequence to sequence, 0 where they are not packed


def blocks_of(k: Tensor, p: FlashParams, kv_block: int) -> int:
    """Blocks of the longest sequence."""
    keys = k.shape[1] if p.cu_seqlens_k is None else p.max_seqlen_k
    return -(-keys // kv_block)


def pack_of(q: Tensor, k: Tensor, lists: BlockLists) -> int:
    """Query heads that share a list and a KV head: rows of one tile."""
    heads = lists.indices.shape[-3]
    per_query_head = heads == q.shape[-2] and heads > 1
    return 1 if per_query_head else q.shape[-2] // k.shape[-2]


def _first_rows(p: FlashParams, q_block: int) -> Tensor | None:
    if p.cu_seqlens_q is None:
        return None
    rows = (p.cu_seqlens_q.diff() + (q_block - 1)) // q_block
    return torch.nn.functional.pad(rows.cumsum(0, dtype=torch.int32), (1, 0))


def ascending(lists: BlockLists, blocks: int, p: FlashParams) -> Ascending:
    """The lists in order; ids that name none of ``blocks`` blocks are left out."""
    ids, counts = lists.indices, lists.counts
    if ids.dim() == 3:
        ids, counts = ids.unsqueeze(0), None if counts is None else counts.unsqueeze(0)
    real = (ids >= 0) & (ids < blocks)
    if counts is not None:
        slot = torch.arange(ids.shape[-1], device=ids.device)
        real &= slot < counts.unsqueeze(-1)
    return _sorted(ids.masked_fill(~real, blocks), blocks, _first_rows(p, lists.q_block))


def _sorted(ids: Tensor, blocks: int, first: Tensor | None) -> Ascending:
    ids = ids.sort(-1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(again, blocks).sort(-1).values.contiguous()
    return Ascending(ids, (ids < blocks).sum(-1, dtype=torch.int32), first)


def union(lists: Ascending, rows: int, blocks: int, p: FlashParams, q_block: int) -> Ascending:
    """What ``rows`` list rows of a sequence after each other name together: lists of q_block * rows
    queries."""
    first = _first_rows(p, q_block * rows)
    size = lists.ids.shape[2]
    if first is None or lists.first is None:
        begin = torch.arange(0, size, rows, device=lists.ids.device)
        end = torch.full_like(begin, size)
    else:
        number = torch.arange(size // rows + first.shape[0] - 1, device=first.device)
        sequence = torch.searchsorted(first[1:].contiguous(), number, right=True)
        sequence = sequence.clamp_max(max(0, first.shape[0] - 2))
        begin = lists.first[sequence] + (number - first[sequence]) * rows
        end = lists.first[sequence + 1].clamp_max(size)
    row = begin.unsqueeze(-1) + torch.arange(rows, device=begin.device)
    real = (row < end.unsqueeze(-1)).unsqueeze(-1)
    ids = lists.ids[:, :, row.clamp(0, max(0, size - 1))].masked_fill(~real, blocks)
    return _sorted(ids.flatten(-2), blocks, first)


def inverse(lists: Ascending, blocks: int, sequences: int) -> Inverse:
    """A stable sort of all entries by their block."""
    batch, heads, rows, slots = lists.ids.shape
    total = blocks * (1 if lists.first is None else sequences)
    row = torch.arange(rows, device=lists.ids.device, dtype=torch.int32)
    block = lists.ids.to(torch.int32 if total < 1 << 31 else torch.int64)
    if lists.first is not None:
        sequence = torch.searchsorted(lists.first[1:].contiguous(), row, right=True, out_int32=True)
        real = (block < blocks) & (sequence < sequences).unsqueeze(-1)
        block = torch.where(real, block + sequence.unsqueeze(-1) * blocks, total)
        row = row - lists.first[sequence.clamp(max=sequences - 1)]
    numbers, order = block.flatten(2).sort(dim=-1, stable=True)
    bound = torch.arange(total + 1, device=row.device, dtype=numbers.dtype)
    bounds = bound.expand(batch, heads, -1).contiguous()
    return Inverse(
        row[order // max(1, slots)],
        torch.searchsorted(numbers.contiguous(), bounds, out_int32=True),
        total,
        0 if lists.first is None else blocks,
    )
