"""Paged attention in plain PyTorch: the definition of ``paged_fwd`` and ``paged_append``.

A sequence's pages are gathered, decoded to fp32 and given to the flash reference, one sequence
(with lengths per head: one KV head) at a time. Keys of pages that do not exist are hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnforge._params import KV_CODES, FlashMods, FlashParams, PagedCache, PagedParams, PagedWrite
from attnforge.reference import flash
from attnforge.reference.scores import rotate

__all__ = ["append", "cascade_parts", "code_zero", "decoded", "encoded", "forward"]

_RANGE = {torch.int8: (-128, 127), torch.uint8: (0, 15), torch.float8_e4m3fn: (-448, 448)}


def code_zero(dtype: torch.dtype) -> float:
    """What the code of the value 0 is without zeros."""
    return 8.0 if KV_CODES.get(dtype) == "int4" else 0.0


def decoded(codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """(code - zero) * scale in fp32; codes [.., Hk, D] with scales [.., Hk]. Others as they are."""
    if codes.dtype not in KV_CODES:
        return codes
    if codes.dtype is torch.uint8:
        x = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float()
    else:
        x = codes.float()
    if zero is not None:
        x = x - zero.unsqueeze(-1)
    elif code_zero(codes.dtype):
        x = x - code_zero(codes.dtype)
    return x if scale is None else x * scale.unsqueeze(-1)


def encoded(x: Tensor, dtype: torch.dtype, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """``x`` [.., Hk, D] as it is stored in pages of ``dtype``; scales [.., Hk]."""
    if dtype not in KV_CODES:
        return x.to(dtype)
    x = x.float()
    if scale is not None:
        x = x / scale.unsqueeze(-1)
    low, high = _RANGE[dtype]
    if KV_CODES[dtype] == "fp8":
        return x.clamp(low, high).to(dtype)
    centre = code_zero(dtype) if zero is None else zero.unsqueeze(-1)
    shifted = torch.where(x.isnan(), 0.0, x) + centre
    codes = shifted.round().clamp(low, high).to(dtype)
    if dtype is torch.uint8:
        return codes[..., 0::2] | codes[..., 1::2] << 4
    return codes


def _at(x: Tensor | None, page: Tensor, slot: Tensor, heads: slice) -> Tensor | None:
    """Scales or zeros [P|1, page_size|1, Hk] at places: [.., Hk]."""
    if x is None:
        return None
    page = page if x.shape[0] > 1 else torch.zeros_like(page)
    slot = slot if x.shape[1] > 1 else torch.zeros_like(slot)
    return x[page, slot][..., heads]


def _places(cache: PagedCache, b: int, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Page (clamped), slot of each key, and whether its page exists."""
    page = cache.block_table[b, keys // cache.page_size].to(torch.int64)
    count = cache.k_pages.shape[0]
    real = (page >= 0) & (page < count)
    return page.clamp(0, max(count - 1, 0)), keys % cache.page_size, real


def _gathered(
    cache: PagedCache, b: int, length: int, heads: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """k [N, H, D] and v of the first keys of a sequence, and which of them are real."""
    keys = torch.arange(length, device=cache.k_pages.device)
    page, slot, real = _places(cache, b, keys)
    if cache.k_pages.shape[0] == 0:
        page, slot, real = page[:0], slot[:0], real[:0]
    k, v = (
        decoded(
            pages.view(torch.uint8)[page, slot].view(pages.dtype)[:, heads]
            if pages.dtype.itemsize == 1
            else pages[page, slot][:, heads],
            _at(scale, page, slot, heads),
            _at(zero, page, slot, heads),
        )
        for pages, scale, zero in (
            (cache.k_pages, cache.k_scale, cache.k_zero),
            (cache.v_pages, cache.v_scale, cache.v_zero),
        )
    )
    return k, v, real


def _parts(cache: PagedCache) -> Iterator[tuple[int, slice, int]]:
    """(sequence, KV heads, keys): whole sequences, or single heads where they differ in length."""
    lengths = cache.cache_seqlens.clamp(0, cache.capacity).tolist()
    for b, length in enumerate(lengths):
        if isinstance(length, int):
            yield b, slice(0, cache.k_pages.shape[2]), length
        else:
            for h, own in enumerate(length):
                yield b, slice(h, h + 1), own


def forward(q: Tensor, cache: PagedCache, p: PagedParams, out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` [B, Sq, Hq, Dv] (packed [T, Hq, Dv]) and ``lse`` [B, Hq, Sq] ([Hq, T])."""
    group = q.shape[-2] // cache.k_pages.shape[2]
    ends = None if p.cu_seqlens_q is None else p.cu_seqlens_q.tolist()
    if ends is not None:  # rows behind the last sequence
        out.zero_()
        lse.fill_(float("-inf"))
    for b, heads, length in _parts(cache):
        mine = slice(heads.start * group, heads.stop * group)
        if ends is None:
            rows, o, stat = q[b], out[b], lse[b]
        else:
            span = slice(ends[b], ends[b + 1])
            rows, o, stat = q[span], out[span], lse[:, span]
        k, v, real = _gathered(cache, b, length, heads)
        segments: tuple[Tensor | None, Tensor | None] = (None, None)
        if not bool(real.all()):
            segments = (real.new_ones(1, rows.shape[0], dtype=torch.int32),
                        real.to(torch.int32).unsqueeze(0))  # fmt: skip
        mask = None if p.mask is None else p.mask[b if p.mask.shape[0] > 1 else 0].unsqueeze(0)
        if mask is not None and mask.shape[-1] > k.shape[0]:  # of keys that are there
            mask = mask[..., mask.shape[-1] - k.shape[0] :]
        mods = FlashMods(mask=mask, segments_q=segments[0], segments_k=segments[1])
        slopes = p.alibi_slopes
        if slopes is not None:
            slopes = (slopes[b] if slopes.dim() == 2 else slopes)[mine]
        used = any(x is not None for x in mods)
        inner = FlashParams(
            None, None, None, slopes, None if p.sinks is None else p.sinks[mine], rows.shape[0],
            k.shape[0], p.softmax_scale, p.window_left, p.window_right, p.softcap,
            tuple(mods) if used else (),
        )  # fmt: skip
        flash.forward(
            rows[None, :, mine], k.unsqueeze(0), v.unsqueeze(0), inner,
            o[None, :, mine], stat[None, mine], out.new_empty(0),
        )  # fmt: skip


def cascade_parts(
    q: Tensor, cache: PagedCache, cu_groups: Tensor, prefix_lens: Tensor, p: PagedParams
) -> tuple[Tensor, tuple[PagedCache, PagedParams], tuple[PagedCache, PagedParams]]:
    """A cascade as two packed forwards that are to be merged by LSE: rows, prefixes, the rest.

    All rows of a group are those of one sequence, its prefix, which they see whole. The rest is
    each request without its first pages. Nothing here waits for a device, so that an upper bound
    stands for the rows of the largest group.
    """
    if cache.block_table.shape[0] == 0:  # groups of nobody
        cu_groups, prefix_lens = cu_groups[:1], prefix_lens[:0]
    rows = q if q.dim() == 3 else q.flatten(0, 1)
    ends = p.cu_seqlens_q
    if ends is None:
        ends = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]
    batch, table, lengths = cache.block_table.shape[0], cache.block_table, cache.cache_seqlens
    last = max(batch - 1, 0)
    bounds = cu_groups.to(torch.int64).clamp(0, batch)
    members = bounds.diff()
    group_of = torch.bucketize(torch.arange(batch, device=q.device), bounds[1:], right=True)
    skipped = prefix_lens[group_of.clamp_max(max(prefix_lens.shape[0] - 1, 0))]
    shared = cache._replace(
        block_table=table[bounds[:-1].clamp_max(last)], cache_seqlens=prefix_lens * (members > 0)
    )
    prefix = p._replace(cu_seqlens_q=ends[bounds], sinks=None, window_right=-1,
                        max_seqlen_q=rows.shape[0])  # fmt: skip
    column = torch.arange(table.shape[1], device=q.device)
    column = column + (skipped // cache.page_size).to(torch.int64).unsqueeze(1)
    if table.shape[1]:  # what is behind the end is never read
        table = table.gather(1, column.clamp(0, table.shape[1] - 1))
    rest = cache._replace(
        block_table=table,
        cache_seqlens=lengths - (skipped if lengths.dim() == 1 else skipped.unsqueeze(1)),
    )
    return rows, (shared, prefix), (rest, p._replace(cu_seqlens_q=ends))


def append(k: Tensor, v: Tensor | None, cache: PagedCache, p: PagedWrite) -> None:
    """Write k [B, S, Hk, D] and v (packed: without the batch) into the slots behind the lengths."""
    ends = None if p.cu_seqlens is None else p.cu_seqlens.tolist()
    lengths = cache.cache_seqlens.tolist()
    for b, length in enumerate(lengths):
        span = slice(None) if ends is None else slice(ends[b], ends[b + 1])
        new_k = k[b] if ends is None else k[span]
        new_v = v if v is None else v[b] if ends is None else v[span]
        at = None if p.positions is None else p.positions[b] if ends is None else p.positions[span]
        owners = [slice(0, k.shape[-2])] if isinstance(length, int) else [
            slice(h, h + 1) for h in range(k.shape[-2])
        ]  # fmt: skip
        for heads, first in zip(owners, [length] if isinstance(length, int) else length,
                                strict=True):  # fmt: skip
            part = None if new_v is None else new_v[:, heads]
            _append_one(new_k[:, heads], part, at, b, heads, first, cache, p)


def _append_one(
    k: Tensor,
    v: Tensor | None,
    at: Tensor | None,
    b: int,
    heads: slice,
    first: int,
    cache: PagedCache,
    p: PagedWrite,
) -> None:
    """k [S, H, D] of the KV heads ``heads`` of one sequence, to slots first .. first + S - 1."""
    keys = torch.arange(first, first + k.shape[0], device=k.device)
    keys = keys[(keys >= 0) & (keys < cache.capacity)]
    page, slot, real = _places(cache, b, keys)
    k = k[: keys.shape[0]]
    if p.rope_cos is not None and p.rope_sin is not None:
        cos, sin = (x if x.shape[0] == 1 else x[heads] for x in (p.rope_cos, p.rope_sin))
        turn = keys if at is None else at[: keys.shape[0]]
        wide = k.to(p.rope_cos.dtype).transpose(0, 1).unsqueeze(0)
        turned = rotate(wide, cos, sin, turn.unsqueeze(0), p.rope_interleaved)
        k = turned.squeeze(0).transpose(0, 1)
    page, slot = page[real], slot[real]
    stored = encoded(k[real], cache.k_pages.dtype, _at(cache.k_scale, page, slot, heads),
                     _at(cache.k_zero, page, slot, heads))  # fmt: skip
    _store(cache.k_pages[:, :, heads], page, slot, stored)
    if v is not None:
        codes = encoded(v[: keys.shape[0]][real], cache.v_pages.dtype,
                        _at(cache.v_scale, page, slot, heads),
                        _at(cache.v_zero, page, slot, heads))  # fmt: skip
        _store(cache.v_pages[:, :, heads], page, slot, codes)
    if p.page_min is not None and p.page_max is not None:
        value = decoded(stored, _at(cache.k_scale, page, slot, heads),
                        _at(cache.k_zero, page, slot, heads))  # fmt: skip
        for bounds, name in ((p.page_min, "amin"), (p.page_max, "amax")):
            _bound(bounds[:, heads], name, page, slot, value.to(bounds.dtype))


def _store(pages: Tensor, page: Tensor, slot: Tensor, values: Tensor) -> None:
    if pages.dtype.itemsize == 1:  # index_put lacks some of them
        pages, values = pages.view(torch.uint8), values.view(torch.uint8)
    pages[page, slot] = values


def _bound(bounds: Tensor, name: str, page: Tensor, slot: Tensor, value: Tensor) -> None:
    """Fold values [S, H, D] into bounds [P, H, D]; a page's first slot starts it anew."""
    fresh = page[slot == 0]
    bounds[fresh] = float("inf") if name == "amin" else float("-inf")
    # bounds may be a slice of heads: fold into a copy of the touched pages.
    touched, where = torch.unique(page, return_inverse=True)
    folded = bounds[touched].clone()
    index = where.view(-1, 1, 1).expand_as(value)
    bounds[touched] = folded.scatter_reduce(0, index, value, name, include_self=True)
