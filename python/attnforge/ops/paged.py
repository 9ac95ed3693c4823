"""Paged attention: flash attention over a KV cache that lies in pages, and writing that cache.

Key j of sequence b is slot j % page_size of page block_table[b, j // page_size], so sequences
grow page by page and may share pages (vLLM's PagedAttention; Kwon et al., 2023). The arithmetic
is that of ``flash_attention``; pages may hold fp8, int8 or int4 codes. Nothing here has a
gradient: the family serves inference. Cost: 2 (D + Dv) flops per visible pair and head; the used
part of the cache is read once for all query heads of a KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._params import PagedCache, PagedParams, PagedWrite
from attnforge.ops import _checks, _paged_checks, _paged_ops
from attnforge.ops._checks import fail
from attnforge.ops.flash import _choice, _stat_inputs
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["cascade_attention", "paged_append", "paged_attention"]

Pair = tuple[Tensor, Tensor]
Window = tuple[int, int]


def _no_grad(op: str, **tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            fail(op, f"{name} requires grad; got a call that would need a backward; want inference "
                     "(torch.no_grad() or detach()): the paged family has no gradient; train with "
                     "flash_attention")  # fmt: skip


def _cache(
    op: str,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    batch: int | None,
    kv_layout: str,
    kv_scales: Pair | None,
    kv_zeros: Pair | None,
) -> PagedCache:
    """The checked cache, pages as [P, page_size, Hk, D] views."""
    k_pages, v_pages = _paged_checks.pages(op, k_pages, v_pages, kv_layout)
    _paged_checks.tables(op, block_table, cache_seqlens, k_pages, batch)
    codes = _paged_checks.quantisation(op, (k_pages, v_pages), kv_scales, kv_zeros)
    return PagedCache(k_pages, v_pages, block_table, cache_seqlens, *codes)


def _batch(q: Any, cu_seqlens: Any) -> int | None:
    """Sequences of a batched call; those of a packed one are as many as the table has rows."""
    return q.shape[0] if cu_seqlens is None and isinstance(q, Tensor) and q.dim() else None


def _longest(op: str, q: Tensor, cu_seqlens_q: Tensor | None, bound: int | None) -> int:
    _checks.max_seqlen(op, "max_seqlen_q", bound)
    if cu_seqlens_q is None:
        return q.shape[1]
    return q.shape[0] if bound is None else bound


def _attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_scales: Pair | None = None,
    kv_zeros: Pair | None = None,
    tree_mask: Tensor | None = None,
    kv_layout: str = "NHD",
    softmax_scale: float | None = None,
    num_splits: int = 0,
    split_plan: Pair | None = None,
    op: str = "paged_attention",
) -> tuple[Tensor, PagedCache, PagedParams]:
    batch = _batch(q, cu_seqlens_q)
    cache = _cache(op, k_pages, v_pages, block_table, cache_seqlens, batch, kv_layout, kv_scales,
                   kv_zeros)  # fmt: skip
    _paged_checks.queries(op, q, cache.k_pages, cu_seqlens_q)
    batch = block_table.shape[0]
    _paged_checks.boundary_tensor(op, "cu_seqlens_q", cu_seqlens_q, q, batch)
    left, right = _checks.window(op, window_size, causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(op, scale, softcap)
    _checks.num_splits(op, num_splits)
    plan = _paged_checks.split_plan(op, split_plan, cache.k_pages, batch)
    _checks.per_head(op, q, batch, alibi_slopes, sinks)
    _no_grad(op, q=q, k_pages=k_pages, v_pages=v_pages, sinks=sinks)
    alibi_slopes, sinks = _stat_inputs(q, alibi_slopes, sinks)
    mask = _paged_checks.tree_mask(op, tree_mask, q)
    longest = _longest(op, q, cu_seqlens_q, max_seqlen_q)
    return q, cache, PagedParams(cu_seqlens_q, alibi_slopes, sinks, mask, longest, scale, left,
                                 right, softcap, num_splits, *plan)  # fmt: skip


def _attention_requests(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, *, return_lse: bool = False, **options: Any
) -> Sequence[Request]:
    meta = _paged_ops.metadata(*_attention(q, k_pages, v_pages, **options))
    return [_paged_ops.request("paged_fwd", meta)]


@explained_by(_attention_requests)
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_scales: Pair | None = None,
    kv_zeros: Pair | None = None,
    tree_mask: Tensor | None = None,
    kv_layout: str = "NHD",
    softmax_scale: float | None = None,
    num_splits: int = 0,
    split_plan: Pair | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of new rows over a paged KV cache that already holds their keys.

    q [B, Sq, Hq, D], or packed [T, Hq, D] with cu_seqlens_q [B + 1] int32: decode, chunks of a
    prefill and mixtures of both are one call. The rows of a sequence are its last ones.
    k_pages [P, page_size, Hk, D] ("NHD") or [P, Hk, page_size, D] (kv_layout="HND"), v_pages the
    same with Dv; any strides but for a last one of 1. v_pages may be a view of k_pages (MLA:
    ``k_pages[..., :512]``).
    block_table: [B, max_pages] int32 page ids. cache_seqlens: [B] int32 valid keys, the new ones
        among them, or [B, Hk] for a length of its own per KV head. Slots and table entries behind
        them are never read, nor are pages that a left window hides from every row.
    causal: bottom-right aligned, as window_size, to the end of the sequence (of the head).
    tree_mask: [B|1, Sq, Sq] bool, True is seen, of the last Sq keys: a tree of drafts (Medusa),
        beside the causal mask; or int64 [B|1, Sq] with bit j for key j, for up to 63 rows.
    kv_scales: (k_scale, v_scale) fp32 for pages of codes, [Hk], [P, Hk] or [P, page_size, Hk]:
        per head, per page, per token. A stored code means (code - zero) * scale. float8_e4m3fn
        (scales default to 1), int8, and uint8 for int4: channel 2 n in the low nibble of byte n,
        2 n + 1 in the high one, so that the last dimension is D / 2.
    kv_zeros: (k_zero, v_zero) fp32 of the shape of the scales, for int8 and int4; default 0 and 8.
    num_splits: 0 cuts the keys of a sequence into splits of fixed length, by its rows r = Sq *
        Hq / Hk: on the CPU 2048 keys for r to 192; on CUDA C++ 2048 for r to 256; in Triton 2048
        for r to 16, 8192 for Sq to 64; none beyond. n > 0 makes n equal splits in their place.
        Either way a sequence's result does not depend on its neighbours.
    split_plan: (pieces [3, N], first [B + 1 or more]), int32, in place of both: piece n is keys
        pieces[1, n] .. pieces[2, n] - 1 of sequence pieces[0, n], and those of sequence b, first[b]
        .. first[b + 1] - 1, follow each other from key 0 to its last one (of its longest head).
        ``attnforge.paged_cache.SplitPlan`` makes one. Kernels follow it where they split keys: the
        CPU's for r to 8 (more rows are split as without it), CUDA C++ for r to 256, Triton for Sq
        to 64; on GPUs its numbers may change between replays of a captured graph. The reference,
        which splits nothing, only checks it.

    Other arguments are those of ``flash_attention``. Returns out [B, Sq, Hq, Dv] of q's dtype, or
    (out, lse) with lse [B, Hq, Sq] fp32; packed [T, Hq, Dv] and [Hq, T].

    Raises ValueError or TypeError on arguments that do not fit; on the CPU, or anywhere under
    ``attnforge.debug(checks=True)``, also on lengths that the table has no room for, on page ids
    within a length that do not exist and on plans that do not fit. Elsewhere keys of such pages are
    masked, and so are those that no piece of their sequence covers.
    """
    q, cache, p = _attention(
        q,
        k_pages,
        v_pages,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_scales=kv_scales,
        kv_zeros=kv_zeros,
        tree_mask=tree_mask,
        kv_layout=kv_layout,
        softmax_scale=softmax_scale,
        num_splits=num_splits,
        split_plan=split_plan,
    )
    out, lse = _paged_ops.paged_fwd(q, *cache, *p, _choice("paged_attention", backend))
    return (out, lse) if return_lse else out


def _cascade(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    cu_groups: Tensor,
    prefix_lens: Tensor,
    **options: Any,
) -> tuple[Tensor, PagedCache, Pair, PagedParams]:
    op = "cascade_attention"
    q, cache, p = _attention(q, k_pages, v_pages, op=op, **options)
    _paged_checks.groups(op, cu_groups, prefix_lens, cache.k_pages, cache.block_table.shape[0])
    return q, cache, (cu_groups, prefix_lens), p


def _cascade_requests(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, *, return_lse: bool = False, **options: Any
) -> Sequence[Request]:
    q, cache, _, p = _cascade(q, k_pages, v_pages, **options)
    return [_paged_ops.request("cascade_fwd", _paged_ops.metadata(q, cache, p))]


@explained_by(_cascade_requests)
def cascade_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    cu_groups: Tensor,
    prefix_lens: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_scales: Pair | None = None,
    kv_zeros: Pair | None = None,
    kv_layout: str = "NHD",
    softmax_scale: float | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """``paged_attention`` of requests that share prefixes, each of which is read once.

    The arguments of a causal ``paged_attention`` with whole tables and lengths, and what is
    shared: requests cu_groups[g] .. cu_groups[g + 1] - 1 have their first prefix_lens[g] keys in
    the same pages. cu_groups [G + 1] int32 rises from 0 to B; prefix_lens [G] int32, multiples of
    the page size, 0 for a group that shares nothing. Every query must see the whole prefix.

    All queries of a group meet the prefix as the rows of one tile; the rest of each request is
    attended to apart, and both meet by their LSEs. Results are those of ``paged_attention``, up
    to the order of sums. Source: RelayAttention, Zhu et al., 2024; Hydragen, Juravsky et al., 2024.
    """
    q, cache, shared, p = _cascade(
        q,
        k_pages,
        v_pages,
        cu_groups=cu_groups,
        prefix_lens=prefix_lens,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        softcap=softcap,
        sinks=sinks,
        kv_scales=kv_scales,
        kv_zeros=kv_zeros,
        kv_layout=kv_layout,
        softmax_scale=softmax_scale,
        num_splits=num_splits,
    )
    rest = (p.cu_seqlens_q, p.sinks, p.max_seqlen_q, p.softmax_scale, p.softcap, p.num_splits)
    out, lse = _paged_ops.cascade_fwd(
        q, *cache[:2], *shared, *cache[2:], *rest, _choice("cascade_attention", backend)
    )
    return (out, lse) if return_lse else out


def _write(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    *,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor | None = None,
    kv_scales: Pair | None = None,
    kv_zeros: Pair | None = None,
    rope: Pair | None = None,
    positions: Tensor | None = None,
    rope_interleaved: bool = False,
    page_min: Tensor | None = None,
    page_max: Tensor | None = None,
    kv_layout: str = "NHD",
) -> tuple[PagedCache, PagedWrite]:
    op, batch = "paged_append", _batch(k, cu_seqlens)
    if (v is None) != (v_pages is None):
        fail(op, "v and v_pages come apart; got one of them; want both, or neither where values "
                 "are a part of the keys (MLA)")  # fmt: skip
    values = k_pages if v_pages is None else v_pages
    cache = _cache(op, k_pages, values, block_table, cache_seqlens, batch, kv_layout, kv_scales,
                   kv_zeros)  # fmt: skip
    batch = block_table.shape[0]
    pair = (cache.k_pages, cache.v_pages)
    _paged_checks.new_rows(op, k, k if v is None else v, pair, cu_seqlens, batch)
    _paged_checks.boundary_tensor(op, "cu_seqlens", cu_seqlens, k, batch)
    _paged_checks.rope(op, rope, positions, k, rope_interleaved)
    _paged_checks.page_bounds(op, k, cache.k_pages, (page_min, page_max))
    _no_grad(op, k=k, v=v, k_pages=k_pages, v_pages=v_pages)
    stat = torch.float64 if k.dtype is torch.float64 else torch.float32
    cos, sin = (None, None) if rope is None else (x.to(stat) for x in rope)
    return cache, PagedWrite(cu_seqlens, cos, sin, positions, rope_interleaved, page_min, page_max)


def _write_requests(
    k: Tensor, v: Tensor | None, k_pages: Tensor, v_pages: Tensor | None, **options: Any
) -> Sequence[Request]:
    cache, p = _write(k, v, k_pages, v_pages, **options)
    return [_paged_ops.request("paged_append", _paged_ops.write_metadata(k, cache, p))]


@explained_by(_write_requests)
def paged_append(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    *,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor | None = None,
    kv_scales: Pair | None = None,
    kv_zeros: Pair | None = None,
    rope: Pair | None = None,
    positions: Tensor | None = None,
    rope_interleaved: bool = False,
    page_min: Tensor | None = None,
    page_max: Tensor | None = None,
    kv_layout: str = "NHD",
    backend: str | None = None,
) -> None:
    """Write new keys and values behind those that the pages hold, in place.

    k [B, S, Hk, D], v [B, S, Hk, Dv], or packed [T, Hk, D] with cu_seqlens [B + 1] int32. v and
    v_pages are None where values are a part of the keys (MLA). cache_seqlens, [B] or [B, Hk]
    int32, are the lengths *before* the call and are not changed. Tables, layouts, codes, scales
    and zeros are those of ``paged_attention``; nothing but the new slots is written.

    Pages of codes get clamp(round(x / scale + zero)) in fp32, ties to even, NaN as a value of 0;
    fp8 gets x / scale, clamped to +-448, NaN kept. int4 slots are whole bytes: D must be even.
    rope: (cos, sin) tables [Hk|1, n, rotary_dim / 2] that turn k before it is written, at its
        cache position or at positions, [B, S] or [T] int32 (clamped to the tables);
        rope_interleaved pairs channels (2 n, 2 n + 1).
    page_min, page_max: [P, Hk, D] fp32 or k's dtype: the least and largest key in each page per
        channel, as attention will read it. The first slot of a page starts them anew. Quest
        selects pages by them (Tang et al., 2024).

    Sequences must not share a page that is written. Raises as ``paged_attention`` does, also
    where the table has no room for the new keys.
    """
    cache, p = _write(
        k,
        v,
        k_pages,
        v_pages,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        cu_seqlens=cu_seqlens,
        kv_scales=kv_scales,
        kv_zeros=kv_zeros,
        rope=rope,
        positions=positions,
        rope_interleaved=rope_interleaved,
        page_min=page_min,
        page_max=page_max,
        kv_layout=kv_layout,
    )
    values = None if v_pages is None else cache.v_pages
    _paged_ops.paged_append(
        k, v, cache.k_pages, values, *cache[2:], *p, _choice("paged_append", backend)
    )
