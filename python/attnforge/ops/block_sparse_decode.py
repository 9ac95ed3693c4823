"""Decode over selected blocks of a KV cache, which lies in one piece or in pages.

A list of blocks is a page table: every (sequence, row, list head) becomes a sequence of its own
whose pages are the blocks that it chose, and the paged decode kernels read those and nothing else.
Blocks of single KV heads are addressed in place, as pages that lie a head apart; no key is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._params import PagedCache, PagedParams
from attnforge.ops import _checks, _paged_checks, _paged_ops
from attnforge.ops._checks import _shape, fail
from attnforge.ops.flash import _choice
from attnforge.ops.paged import _no_grad
from attnforge.ops.selection import BlockSelection
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["block_sparse_decode"]

_OP = "block_sparse_decode"
_FAR = torch.iinfo(torch.int32).max


def _unit_strides(x: Tensor, cell: int) -> tuple[int, tuple[int, int, int]]:
    """The step u of pages of ``cell`` slots and one head, and how many u from one outer piece,
    head and cell to the next; x [outer, slots, heads, D]."""
    outer, slot, head, _ = x.stride()
    steps = (outer if x.shape[0] > 1 else 0, head if x.shape[2] > 1 else 0, cell * slot)
    unit = math.gcd(*steps) or 1
    return unit, (steps[0] // unit, steps[1] // unit, steps[2] // unit)


def _pages_of(x: Tensor, cell: int, unit: int, steps: tuple[int, int, int]) -> Tensor:
    """[P, cell, 1, D]: every cell of every head, and what lies between, as pages."""
    outer, slots, heads, dim = x.shape
    if x.numel() == 0:
        return x.new_zeros((1, cell, 1, dim))
    last = (outer - 1) * steps[0] + (heads - 1) * steps[1] + (slots // cell - 1) * steps[2]
    return x.as_strided((last + 1, cell, 1, dim), (unit, x.stride(1), dim, 1))


def _cells(k: Tensor, v: Tensor, cell: int) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Pages of k and v under one numbering; copies what is laid out too differently."""
    if k.stride(-1) != 1 or v.stride(-1) != 1 or min(k.stride()[:3] + v.stride()[:3]) < 0:
        k, v = k.contiguous(), v.contiguous()
    unit_k, steps = _unit_strides(k, cell)
    unit_v, other = _unit_strides(v, cell)
    if steps != other:
        k, v = k.contiguous(), v.contiguous()
        unit_k, steps = _unit_strides(k, cell)
        unit_v, _ = _unit_strides(v, cell)
    return _pages_of(k, cell, unit_k, steps), _pages_of(v, cell, unit_v, steps), steps


def _rows_of(selection: BlockSelection, batch: int, rows: int, heads: int) -> tuple[Tensor, Tensor]:
    """ids [B, rows, H, S] and which of them count, H list heads (at least the KV heads)."""
    ids = selection.indices.long()
    slot = torch.arange(ids.shape[-1], device=ids.device)
    used = torch.ones_like(ids, dtype=torch.bool)
    if selection.counts is not None:
        used = slot < selection.counts.unsqueeze(-1)
    row = torch.arange(rows, device=ids.device) // selection.q_block
    ids, used = (x[:, :, row].transpose(1, 2) for x in (ids, used))
    wide = ids.shape[2] if ids.shape[2] > 1 else heads
    shape = (batch, rows, wide, ids.shape[-1])
    return ids.expand(shape), used.expand(shape)


def _check(
    q: Tensor, k: Tensor, v: Tensor, selection: Any, block_table: Tensor | None, used: Any
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(_OP, name, x)
    if not isinstance(selection, BlockSelection):
        kind = type(selection).__name__
        fail(_OP, f"selection is {kind}; want an attnforge.BlockSelection", TypeError)
    _paged_checks.pages(_OP, k, v, "NHD")
    _paged_checks.queries(_OP, q, k, None)
    batch = q.shape[0]
    if block_table is None:
        if k.shape[0] != batch:
            fail(_OP, f"k has shape {_shape(k)}; want batch {batch} like q, or block_table")
        _checks.lengths(_OP, "cache_seqlens", used, q, batch)
    else:
        _checks.tensor(_OP, "cache_seqlens", used)
        _paged_checks.tables(_OP, block_table, used, k, batch)
        if used.dim() != 1:
            fail(_OP, f"cache_seqlens has shape {_shape(used)}; want [batch] = ({batch},)")
    s = selection
    heads = (1, k.shape[2], q.shape[2])
    rows = -(-q.shape[1] // s.q_block)
    if s.packed or s.indices.shape[0] not in (1, batch) or s.heads not in heads or s.rows != rows:
        fail(
            _OP,
            f"selection.indices has shape {_shape(s.indices)}; want [1 or {batch}, one of {heads} "
            f"heads, {rows}, slots]: {q.shape[1]} queries in blocks of {s.q_block}",
        )
    if s.indices.device != q.device:
        fail(_OP, f"selection is on {s.indices.device}; want {q.device} like q")


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, PagedCache, PagedParams, int]:
    """(q of the small problems, their cache, what is asked, list heads)."""
    _check(q, k, v, selection, block_table, cache_seqlens)
    _no_grad(_OP, q=q, k=k, v=v)
    batch, rows, heads_q, dim = q.shape
    heads_kv, block = k.shape[2], selection.kv_block
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(_OP, scale, softcap)
    _checks.num_splits(_OP, num_splits)
    cell = math.gcd(block, k.shape[1]) or block
    ids, used = _rows_of(selection, batch, rows, heads_kv)
    lists = ids.shape[2]
    # Key position of each row, and the blocks that begin at or before it, ascending, each once.
    length = k.shape[1] if cache_seqlens is None else cache_seqlens.long()[:, None]
    at = torch.arange(rows, device=q.device) + length - rows
    at = at.expand(batch, rows)[:, :, None, None]
    used = used & (ids >= 0) & (ids * block <= at)
    ids = torch.where(used, ids, _FAR).sort(-1).values
    again = torch.zeros_like(used)
    again[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(again, _FAR).sort(-1).values
    valid = ids < _FAR
    seen = torch.where(valid, (at + 1 - ids * block).clamp_max(block), 0).sum(-1)
    # Cells of the blocks, then where they lie.
    cells = ids.masked_fill(~valid, 0).unsqueeze(-1) * (block // cell)
    cells = (cells + torch.arange(block // cell, device=q.device)).flatten(-2)
    k_pages, v_pages, steps = _cells(k, v, cell)
    kv_head = torch.arange(lists, device=q.device) // (lists // heads_kv)
    if block_table is None:
        outer = torch.arange(batch, device=q.device)[:, None, None, None]
    else:
        per_page = k.shape[1] // cell
        page = (cells // per_page).clamp_max(block_table.shape[1] - 1)
        table = block_table.long()[:, None, None].expand(*page.shape[:3], -1)
        outer, cells = table.gather(-1, page), cells % per_page
    place = outer * steps[0] + kv_head[:, None] * steps[1] + cells * steps[2]
    place = place.clamp(0, max(k_pages.shape[0] - 1, 0))
    many = batch * rows * lists
    cache = PagedCache(
        k_pages,
        v_pages,
        place.reshape(many, -1).int(),
        seen.reshape(many).int(),
    )
    p = PagedParams(None, None, None, None, 1, scale, -1, -1, softcap, num_splits)
    return q.reshape(many, 1, heads_q // lists, dim), cache, p, lists


def _requests(
    q: Tensor, k: Tensor, v: Tensor, selection: Any, *, return_lse: bool = False, **options: Any
) -> Sequence[Request]:
    wide, cache, p, _ = _problem(q, k, v, selection, **options)
    return [_paged_ops.request("paged_fwd", _paged_ops.metadata(wide, cache, p))]


@explained_by(_requests)
def block_sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of a few new rows over the listed blocks of a KV cache; reads those blocks alone.

    q [B, Sq, Hq, D] with small Sq: its rows are the last of the sequence and causal. k [B, Sk, Hk,
    D], v [B, Sk, Hk, Dv], or with block_table [B, max_pages] int32 pages [P, page_size, Hk, ..].
    cache_seqlens: int32 [B], the valid keys, the new ones among them (default: Sk).
    selection: lists for one, Hk or Hq heads, each row its own (drafts of speculative decoding may
        differ). Ids count within the sequence, whatever the page size; set semantics as always.
    num_splits: as of ``paged_attention``, over the listed keys.

    Returns out [B, Sq, Hq, Dv], or (out, lse) with the LSE [B, Hq, Sq]. A row whose list is empty
    gives 0 and -inf. No gradient: train with ``block_sparse_attention``, whose last row this is.
    Blocks are read in place; where the cache or page size is no multiple of kv_block, in cells of
    their common divisor. Bytes: the listed keys and values, once per list head. Source: the split
    over the selected list of SeerAttention-R (arXiv 2506.08889).
    """
    wide, cache, p, lists = _problem(
        q, k, v, selection, cache_seqlens=cache_seqlens, block_table=block_table, softcap=softcap,
        softmax_scale=softmax_scale, num_splits=num_splits,
    )  # fmt: skip
    out, lse = _paged_ops.paged_fwd(wide, *cache, *p, _choice(_OP, backend))
    batch, rows, heads_q, _ = q.shape
    out = out.reshape(batch, rows, heads_q, v.shape[-1])
    lse = lse.reshape(batch, rows, lists, -1).flatten(2).transpose(1, 2)
    return (out, lse) if return_lse else out
