"""Lists of blocks for tests, and the check of a selection against the truth of its mask."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from attnforge._params import BlockLists
from attnforge.ops.block_sparse import block_sparse_attention
from attnforge.ops.selection import BlockSelection
from attnforge.reference.block_sparse import token_mask
from attnforge.testing import cases
from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import compare

__all__ = ["check", "random_lists", "wide_mask"]


def random_lists(
    case: FlashCase, heads: int, q_block: int, kv_block: int, density: float, seed: int = 0
) -> BlockSelection:
    """Lists with -1, ids of no block and repeated ids among their entries."""
    g = torch.Generator().manual_seed(seed)
    rows, blocks = -(-case.seqlen_q // q_block), -(-case.seqlen_k // kv_block)
    mask = torch.rand(case.batch, heads, rows, blocks, generator=g) < density
    ids = torch.where(mask, torch.arange(blocks), -1)
    noise = torch.randint(-5, blocks + 5, (case.batch, heads, rows, 2), generator=g)
    noise = torch.where((noise < 0) | (noise >= blocks), noise, ids[..., :1])
    ids = torch.cat([ids, noise], -1)
    order = torch.rand(ids.shape, generator=g).argsort(-1)
    ids = ids.gather(-1, order).to(cases.DEVICE)
    return BlockSelection.from_indices(ids, q_block=q_block, kv_block=kv_block)


def wide_mask(selection: BlockSelection, inputs: FlashInputs) -> Tensor:
    """The lists as a mask [B, Hq, Sq, Sk] of single pairs."""
    lists = BlockLists(selection.indices, selection.counts, selection.q_block, selection.kv_block)
    mask = token_mask(lists, slice(0, lists.rows), inputs.q.shape[1], inputs.k.shape[1])
    return mask.repeat_interleave(inputs.q.shape[2] // mask.shape[1], 1)


def check(
    case: FlashCase,
    selection: BlockSelection,
    backend: str,
    mask: Tensor | None = None,
    *,
    rounded: bool | None = None,
) -> None:
    """Outputs and gradients within their bounds; rounded: see ``oracle.truth``."""
    inputs = case.make()
    mask = wide_mask(selection, inputs) if mask is None else mask
    truth = inputs.with_(mask=mask).truth(rounded=rounded)
    call = functools.partial(block_sparse_attention, selection=selection)
    got = dataclasses.replace(inputs, call=call).run(backend)
    compare(got, truth, inputs.context).check()
