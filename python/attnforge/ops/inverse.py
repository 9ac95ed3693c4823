"""The inverse of block lists: for each block of keys the rows of queries that see it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge.ops._checks import _shape, fail
from attnforge.ops.selection import BlockSelection

__all__ = ["InverseSelection", "invert_selection"]

_OP = "invert_selection"


class InverseSelection(NamedTuple):
    """Rows by block, as CSC: ``rows[.., starts[.., j] : starts[.., j + 1]]`` name block j."""

    starts: Tensor  # int64 [B | 1, H, blocks + 1]; packed [H, sequences * blocks + 1]
    rows: Tensor  # int32 [B | 1, H, R * S], packed [H, R * S]: ascending per block; -1 behind all


def invert_selection(
    selection: BlockSelection, blocks: int, *, cu_seqlens_q: Tensor | None = None
) -> InverseSelection:
    """The list rows that name each of ``blocks`` key blocks, ascending, each once.

    blocks: key blocks of a sequence; ids at or past it are of no block. Packed selections give
    cu_seqlens_q [B + 1]: block j of sequence b is column b * blocks + j, and rows count over the
    whole packed lists. Position rules are not applied: a causal call may see less.

    Sizes do not depend on the data and nothing is read on the host. Work: a sort of the entries.
    """
    if not isinstance(selection, BlockSelection):
        kind = type(selection).__name__
        fail(_OP, f"selection is {kind}; want an attnforge.BlockSelection", TypeError)
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 0:
        fail(_OP, f"blocks is {blocks!r}; want an int >= 0")
    if selection.packed != (cu_seqlens_q is not None):
        got = _shape(selection.indices)
        fail(_OP, f"cu_seqlens_q goes with packed lists and only with them; got indices {got}")
    ids = selection.indices.long()
    rows, slots = ids.shape[-2:]
    used = (ids >= 0) & (ids < blocks)
    if selection.counts is not None:
        used &= torch.arange(slots, device=ids.device) < selection.counts.unsqueeze(-1)
    columns = blocks
    if cu_seqlens_q is not None:
        own = -(-cu_seqlens_q.long().diff() // selection.q_block)  # list rows of a sequence
        sequences: Any = own.numel()
        row = torch.arange(rows, device=ids.device)
        sequence = torch.searchsorted(own.cumsum(0), row, right=True)
        used &= (sequence < sequences)[:, None]
        ids = ids + (sequence * blocks)[:, None]
        columns = sequences * blocks
    ids = torch.where(used, ids, columns).sort(-1).values
    again = torch.zeros_like(used)
    again[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(again, columns).flatten(-2)
    order = ids.sort(dim=-1, stable=True)
    edges = torch.arange(columns + 1, device=ids.device).expand(*ids.shape[:-1], -1).contiguous()
    starts = torch.searchsorted(order.values, edges)
    found = order.indices.div(max(1, slots), rounding_mode="floor")
    return InverseSelection(starts, torch.where(order.values < columns, found, -1).int())
