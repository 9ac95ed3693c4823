"""Operators of the paged family: schemas, outputs, implementations that pick a kernel.

As in ``_flash_ops``, an operator checks the values of its index tensors, allocates its outputs
with the helper that the fake kernel shares, selects a launcher by metadata and runs it. Pages
come as [P, page_size, Hk, D] views: the layout is a matter of strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _ops
from attnforge._params import KV_CODES, PagedCache, PagedParams, PagedWrite
from attnforge.ops import _checks, _flash_ops, _paged_checks
from attnforge.ops._checks import fail
from attnforge.registry import override
from attnforge.registry.select import device_arch, launcher
from attnforge.registry.spec import Request

__all__ = ["cascade_fwd", "metadata", "paged_append", "paged_fwd", "request", "write_metadata"]

_CACHE = (
    "Tensor block_table, Tensor cache_seqlens, Tensor? k_scale, Tensor? v_scale, Tensor? k_zero, "
    "Tensor? v_zero, "
)
_SCORES = "SymInt max_seqlen_q, float softmax_scale, "


def metadata(q: Tensor, cache: PagedCache, p: PagedParams) -> tuple[Any, ...]:
    """What selection of a forward may look at, as a hashable tuple (see ``request``)."""
    heads_kv = cache.k_pages.shape[2]
    return (
        q.device,
        q.dtype,
        (q.shape[-1], _paged_checks.channels(cache.v_pages), q.shape[-2] // heads_kv),
        _features(
            cache,
            varlen=p.cu_seqlens_q is not None,
            alibi=p.alibi_slopes is not None,
            sinks=p.sinks is not None,
            mask=p.mask is not None,
            softcap=p.softcap > 0,
            window_left=p.window_left >= 0,
            window_right=p.window_right >= 0,
            split_plan=p.split_pieces is not None,
            latent=cache.latent,
        ),
    )


def write_metadata(k: Tensor, cache: PagedCache, p: PagedWrite) -> tuple[Any, ...]:
    """What selection of an append may look at."""
    dims = (k.shape[-1], _paged_checks.channels(cache.v_pages), 1)
    used = _features(
        cache,
        varlen=p.cu_seqlens is not None,
        rope=p.rope_cos is not None,
        page_bounds=p.page_min is not None,
    )
    return k.device, k.dtype, dims, used


def _features(cache: PagedCache, **used: bool) -> tuple[str, ...]:
    code = KV_CODES.get(cache.k_pages.dtype)
    names = [name for name, on in used.items() if on]
    if code is not None:
        names.append(f"kv_{code}")
    if cache.cache_seqlens.dim() == 2:
        names.append("lengths_per_head")
    return tuple(names)


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``metadata`` or ``write_metadata`` stands for."""
    device, dtype, sizes, used = meta
    kind, arch = device_arch(device)
    dims = tuple(zip(("head_dim", "v_head_dim", "group"), sizes, strict=True))
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(op, kind, arch, dtype, dims, frozenset(used), deterministic)


def _reads_values(x: Tensor) -> bool:
    """Elsewhere than on the CPU a look at values would wait for the device: debug asks for it."""
    return x.device.type == "cpu" or override.checks


def _alloc(q: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    """out like q with Dv, lse [B, Hq, Sq] (varlen [Hq, T])."""
    *batch, rows, heads, _ = q.shape
    out = q.new_empty((*batch, rows, heads, _paged_checks.channels(v_pages)))
    return out, q.new_empty((*batch, heads, rows), dtype=_flash_ops._stat_dtype(q.dtype))


def _row_counts(op: str, q: Tensor, p: PagedParams, batch: int) -> tuple[Any, int]:
    """Query rows of each sequence (an int or [B] int64), and of the longest."""
    if p.cu_seqlens_q is None:
        return q.shape[1], q.shape[1]
    ends = p.cu_seqlens_q.tolist()
    longest = _checks.boundaries(op, "q", ends, q.shape[0], p.max_seqlen_q)
    return p.cu_seqlens_q.to(torch.int64).diff(), longest


def _checked(op: str, q: Tensor, cache: PagedCache, p: PagedParams) -> PagedParams:
    """Validate index tensors by value; pages that a left window hides from all rows are free."""
    rows, longest = _row_counts(op, q, p, cache.block_table.shape[0])
    lengths = cache.cache_seqlens.to(torch.int64)
    least = lengths if lengths.dim() == 1 else lengths.amin(1)
    first = torch.zeros_like(least)
    if p.window_left >= 0:
        first = (least - rows - p.window_left).clamp_min(0)
    _paged_checks.index_values(op, cache, first)
    _paged_checks.split_values(op, (p.split_pieces, p.split_first), lengths)
    return p._replace(max_seqlen_q=longest)


def _fwd(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """rest: the fields of PagedCache from block_table on, those of PagedParams, backend."""
    cache, p = PagedCache(k_pages, v_pages, *rest[:6]), PagedParams(*rest[6:-1])
    if _reads_values(q):
        p = _checked("paged_attention", q, cache, p)
    out, lse = _alloc(q, v_pages)
    launcher("paged_fwd", metadata(q, cache, p), request, rest[-1])(q, cache, p, out, lse)
    return out, lse


def _fwd_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _alloc(q, v_pages)


def _check_groups(
    q: Tensor, cache: PagedCache, p: PagedParams, cu_groups: Tensor, prefix_lens: Tensor
) -> None:
    """Groups cover the requests; all rows see the whole prefix, whose pages are the same."""
    op, table, size = "cascade_attention", cache.block_table, cache.page_size
    lengths = cache.cache_seqlens.to(torch.int64)
    rows, _ = _row_counts(op, q, p, table.shape[0])
    # Up to and with the key of the first row.
    seen = (lengths if lengths.dim() == 1 else lengths.amin(1)) - rows + 1
    ends, prefixes, batch = cu_groups.tolist(), prefix_lens.tolist(), table.shape[0]
    if ends[0] != 0 or ends[-1] != batch or sorted(ends) != ends:
        fail(op, f"cu_groups is {ends}; want rising boundaries from 0 to {batch}, the requests")
    for g, length in enumerate(prefixes):
        members = slice(ends[g], ends[g + 1])
        if ends[g] == ends[g + 1]:
            continue
        shortest = int(seen[members].min())
        if length < 0 or length % size or (length and length > shortest):
            fail(op, f"prefix_lens[{g}] is {length}; got pages of {size} and a request whose "
                     f"first query sees {max(shortest, 0)} keys; want a multiple of the page size "
                     "that all queries of the group see; a page that is shared in part belongs to "
                     "the rest")  # fmt: skip
        pages = table[members, : length // size]
        if bool((pages != pages[:1]).any()):
            b, n = (pages != pages[:1]).nonzero()[0].tolist()
            fail(op, f"block_table[{ends[g] + b}, {n}] is {int(pages[b, n])}; got page "
                     f"{int(pages[0, n])} in request {ends[g]} of the same group; want one page "
                     "for all of them: the prefix is read once")  # fmt: skip


def _cascade(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cu_groups: Tensor,
    prefix_lens: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """rest: as in ``_fwd``, with the fields of PagedParams that a cascade has."""
    *tail, cu_seqlens_q, sinks, longest, scale, softcap, num_splits, backend = rest
    cache = PagedCache(k_pages, v_pages, *tail)
    p = PagedParams(cu_seqlens_q, None, sinks, None, longest, scale, -1, 0, softcap, num_splits)
    if _reads_values(q):
        p = _checked("cascade_attention", q, cache, p)
        _check_groups(q, cache, p, cu_groups, prefix_lens)
    out, lse = _alloc(q, v_pages)
    launch = launcher("cascade_fwd", metadata(q, cache, p), request, backend)
    launch(q, cache, cu_groups, prefix_lens, p, out, lse)
    return out, lse


def _cascade_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> Any:
    return _alloc(q, v_pages)


def _append(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    *rest: Any,
) -> None:
    """rest: the fields of PagedCache from block_table on, those of PagedWrite, backend."""
    cache = PagedCache(k_pages, k_pages if v_pages is None else v_pages, *rest[:6])
    p = PagedWrite(*rest[6:-1])
    if _reads_values(k):
        if p.cu_seqlens is None:
            rows = torch.full((k.shape[0],), k.shape[1], device=k.device)
        else:
            op, ends = "paged_append", p.cu_seqlens.tolist()
            _checks.boundaries(op, "k", ends, k.shape[0], k.shape[0])
            rows = p.cu_seqlens.to(torch.int64).diff()
        _paged_checks.written_values("paged_append", cache, rows)
    if k.numel():
        launch = launcher("paged_append", write_metadata(k, cache, p), request, rest[-1])
        launch(k, v, cache, p)


def _append_fake(k: Tensor, v: Tensor | None, *rest: Any) -> None:
    return None


paged_fwd = _ops.define(
    f"paged_fwd(Tensor q, Tensor k_pages, Tensor v_pages, {_CACHE}Tensor? cu_seqlens_q, "
    f"Tensor? alibi_slopes, Tensor? sinks, Tensor? tree_mask, {_SCORES}SymInt window_left, "
    "SymInt window_right, float softcap, SymInt num_splits, Tensor? split_pieces, "
    "Tensor? split_first, str? backend) -> (Tensor out, Tensor lse)",
    _fwd,
    _fwd_fake,
)
cascade_fwd = _ops.define(
    "cascade_fwd(Tensor q, Tensor k_pages, Tensor v_pages, Tensor cu_groups, Tensor prefix_lens, "
    f"{_CACHE}Tensor? cu_seqlens_q, Tensor? sinks, {_SCORES}float softcap, SymInt num_splits, "
    "str? backend) -> (Tensor out, Tensor lse)",
    _cascade,
    _cascade_fake,
)
paged_append = _ops.define(
    f"paged_append(Tensor k, Tensor? v, Tensor(a!) k_pages, Tensor(b!)? v_pages, {_CACHE}"
    "Tensor? cu_seqlens, Tensor? rope_cos, Tensor? rope_sin, Tensor? positions, "
    "bool rope_interleaved, Tensor(c!)? page_min, Tensor(d!)? page_max, str? backend) -> ()",
    _append,
    _append_fake,
)
