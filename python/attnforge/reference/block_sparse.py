"""Block-sparse attention in plain PyTorch: the definition of ``block_sparse_fwd`` and ``_bwd``.

    row i of head h sees key j where position lets it and block j // kv_block is in the list of
    row i // q_block; over those keys it is flash attention (``reference.flash``)

The lists become a mask of single pairs, so this needs O(Sq * Sk) bytes per list head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnforge._params import BlockLists, FlashGrads, FlashMods, FlashParams, FlashTape
from attnforge.reference import flash

__all__ = ["backward", "forward", "token_mask"]


def token_mask(lists: BlockLists, rows: slice, seqlen_q: int, seqlen_k: int) -> Tensor:
    """bool [B | 1, H, Sq, Sk] of the given list rows: which keys the lists name.

    ``seqlen_k`` counts the keys in use: blocks past them do not exist.
    """
    ids = lists.indices if lists.indices.dim() == 4 else lists.indices.unsqueeze(0)
    ids = ids[:, :, rows].long()
    blocks = -(-seqlen_k // lists.kv_block)
    valid = (ids >= 0) & (ids < blocks)
    if lists.counts is not None:
        counts = lists.counts if lists.counts.dim() == 3 else lists.counts.unsqueeze(0)
        slot = torch.arange(ids.shape[-1], device=ids.device)
        valid &= slot < counts[:, :, rows].unsqueeze(-1)
    named = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool, device=ids.device)
    named.scatter_(-1, torch.where(valid, ids, blocks), True)
    row = torch.arange(seqlen_q, device=ids.device) // lists.q_block
    block = torch.arange(seqlen_k, device=ids.device) // lists.kv_block
    return named[:, :, row][..., block]


def _sequences(
    q: Tensor, k: Tensor, p: FlashParams, lists: BlockLists
) -> Iterator[tuple[slice, slice, slice, slice]]:
    """batch, query rows, keys in use, list rows of each sequence, or of the whole dense batch."""
    used = None if p.seqused_k is None else p.seqused_k.tolist()
    if p.cu_seqlens_q is not None and p.cu_seqlens_k is not None:
        first = 0
        cu_q, cu_k = p.cu_seqlens_q.tolist(), p.cu_seqlens_k.tolist()
        for b in range(len(cu_q) - 1):
            stop = cu_k[b + 1] if used is None else cu_k[b] + used[b]
            rows = -(-(cu_q[b + 1] - cu_q[b]) // lists.q_block)
            yield (
                slice(b, b + 1),
                slice(cu_q[b], cu_q[b + 1]),
                slice(cu_k[b], stop),
                slice(first, first + rows),
            )
            first += rows
        return
    for b in range(q.shape[0]):
        stop = k.shape[1] if used is None else used[b]
        yield slice(b, b + 1), slice(0, q.shape[1]), slice(0, stop), slice(0, lists.rows)


def _cut(x: Tensor, batch: slice, span: slice) -> Tensor:
    return x[batch, span] if x.dim() == 4 else x[span].unsqueeze(0)


def _cut_stat(x: Tensor, batch: slice, rows: slice) -> Tensor:
    return x[batch, :, rows] if x.dim() == 3 else x[:, rows].unsqueeze(0)


def _dense(
    p: FlashParams, lists: BlockLists, batch: slice, rows: int, keys: int, list_rows: slice
) -> FlashParams:
    """The same problem for one sequence, its lists as a mask."""
    own = lists
    if lists.indices.dim() == 4 and lists.indices.shape[0] > 1:
        counts = None if lists.counts is None else lists.counts[batch]
        own = lists._replace(indices=lists.indices[batch], counts=counts)
    alibi = p.alibi_slopes
    if alibi is not None and alibi.dim() == 2:
        alibi = alibi[batch]
    return p._replace(
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_k=None,
        alibi_slopes=alibi,
        max_seqlen_q=rows,
        max_seqlen_k=keys,
        mods=tuple(FlashMods(mask=token_mask(own, list_rows, rows, keys))),
    )


def _per_query_head(p: FlashParams, heads_q: int) -> FlashParams:
    """The mask of lists that KV heads share, for the query heads of each."""
    mask = p.score_mods.mask
    if mask is None or mask.shape[1] in (1, heads_q):
        return p
    wide = mask.repeat_interleave(heads_q // mask.shape[1], 1)
    return p._replace(mods=tuple(p.score_mods._replace(mask=wide)))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: FlashParams,
    lists: BlockLists,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
) -> None:
    """Fill out, lse and, unless empty, out_lo; rows of no sequence get 0 and -inf."""
    out.zero_()
    lse.fill_(-torch.inf)
    out_lo.zero_()
    for batch, rows, keys, list_rows in _sequences(q, k, p, lists):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        own = _per_query_head(_dense(p, lists, batch, n, m, list_rows), q.shape[-2])
        flash.forward(
            _cut(q, batch, rows),
            _cut(k, batch, keys),
            _cut(v, batch, keys),
            own,
            _cut(out, batch, rows),
            _cut_stat(lse, batch, rows),
            _cut(out_lo, batch, rows) if out_lo.dim() > 1 else out_lo,
        )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    tape: FlashTape,
    p: FlashParams,
    lists: BlockLists,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fill dq, dk, dv and, with sinks, dsinks."""
    q, k, v, out, lse, out_lo = tape
    dq, dk, dv, dsinks = grads
    for x in grads:
        x.zero_()
    for batch, rows, keys, list_rows in _sequences(q, k, p, lists):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        own = _per_query_head(_dense(p, lists, batch, n, m, list_rows), q.shape[-2])
        sinks = torch.empty_like(dsinks)
        empty = q.new_empty(0)
        flash.backward(
            _cut(dout, batch, rows),
            None if dlse is None else _cut_stat(dlse, batch, rows),
            FlashTape(
                _cut(q, batch, rows),
                _cut(k, batch, keys),
                _cut(v, batch, keys),
                _cut(out, batch, rows),
                _cut_stat(lse, batch, rows),
                _cut(out_lo, batch, rows) if out_lo.dim() > 1 else out_lo,
            ),
            own,
            FlashGrads(
                _cut(dq, batch, rows),
                _cut(dk, batch, keys),
                _cut(dv, batch, keys),
                sinks,
                *(empty,) * 5,
            ),
        )
        dsinks += sinks
