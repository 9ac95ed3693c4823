"""Argument checks of the paged family, in the manner of ``_checks``.

Metadata is checked by the public functions. Lengths, page ids and boundaries are values: the
operators check them by ``index_values``, always on the CPU and elsewhere under ``debug``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge._params import KV_CODES, PagedCache
from attnforge.ops import _checks
from attnforge.ops._checks import _name, _shape, fail

__all__ = ["boundary_tensor", "channels", "groups", "index_values", "new_rows", "pages",
           "quantisation", "queries", "rope", "split_plan", "split_values", "tables", "tree_mask",
           "written_values"]  # fmt: skip


def channels(pages: Tensor) -> int:
    """Head dim of pages: uint8 holds two int4 channels."""
    return pages.shape[-1] * (2 if pages.dtype is torch.uint8 else 1)


def pages(op: str, k_pages: Any, v_pages: Any, layout: Any) -> tuple[Tensor, Tensor]:
    """The pages as [P, page_size, Hk, D] views, whatever ``kv_layout`` says they are."""
    if layout not in ("NHD", "HND"):
        fail(op, f"kv_layout is {layout!r}; want 'NHD' ([pages, page_size, heads, head_dim]) or "
                 "'HND' ([pages, heads, page_size, head_dim])")  # fmt: skip
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        _checks.tensor(op, name, x)
        if x.dim() != 4:
            fail(op, f"{name} has shape {_shape(x)}; want four dims as kv_layout {layout!r} has "
                     "them")  # fmt: skip
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            fail(op, f"{name} has last stride {x.stride(-1)}; want 1: pages are never copied; "
                     "allocate them with head_dim last")  # fmt: skip
    if layout == "HND":
        k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    if k_pages.dtype is not v_pages.dtype or k_pages.device != v_pages.device:
        fail(
            op,
            f"k_pages are {_name(k_pages.dtype)} on {k_pages.device}, v_pages "
            f"{_name(v_pages.dtype)} on {v_pages.device}; want one dtype and device",
        )
    if k_pages.shape[:3] != v_pages.shape[:3]:
        fail(
            op,
            f"k_pages and v_pages differ; got {_shape(k_pages)} and {_shape(v_pages)} as "
            "[pages, page_size, heads, head_dim]; want equal pages, page_size and heads",
        )
    if 0 in k_pages.shape[1:] or v_pages.shape[-1] == 0:
        fail(
            op,
            f"k_pages has shape {_shape(k_pages)}, v_pages {_shape(v_pages)}; want "
            "page_size, heads and head_dim of at least 1",
        )
    return k_pages, v_pages


def queries(op: str, q: Any, k_pages: Tensor, cu_seqlens_q: Any) -> None:
    """q [B, Sq, Hq, D], or [T, Hq, D] with boundaries, fits the pages."""
    _checks.tensor(op, "q", q)
    rank = 4 if cu_seqlens_q is None else 3
    if q.dim() != rank:
        want = (
            "[batch, seq, heads, head_dim]; packed rows need cu_seqlens_q"
            if rank == 4
            else "[total, heads, head_dim] beside cu_seqlens_q"
        )
        fail(op, f"q has {q.dim()} dims; got shape {_shape(q)}; want {want}")
    if q.dtype not in _checks._DTYPES:
        want = ", ".join(map(_name, _checks._DTYPES))
        fail(op, f"q has dtype {_name(q.dtype)}; want one of {want}; convert it first")
    _dtype(op, "q", q, k_pages)
    if q.shape[-1] != channels(k_pages):
        fail(
            op,
            f"q and k_pages differ in head_dim; got {q.shape[-1]} and {channels(k_pages)}; "
            "want equal ones (a uint8 page holds two channels per byte)",
        )
    if q.shape[-2] % k_pages.shape[2] != 0:
        fail(
            op,
            f"query heads are no multiple of KV heads; got {q.shape[-2]} and "
            f"{k_pages.shape[2]}; want heads_q % heads_kv == 0, where query head h reads KV "
            "head h // (heads_q / heads_kv)",
        )


def _dtype(op: str, name: str, x: Tensor, k_pages: Tensor) -> None:
    if x.device != k_pages.device:
        fail(op, f"{name} is on {x.device}, the pages on {k_pages.device}; want one device")
    if k_pages.dtype not in KV_CODES and k_pages.dtype is not x.dtype:
        codes = ", ".join(map(_name, KV_CODES))
        fail(
            op,
            f"the pages have dtype {_name(k_pages.dtype)}; want {_name(x.dtype)} like {name}, "
            f"or codes ({codes}); convert {name}",
            TypeError,
        )


def boundary_tensor(op: str, name: str, x: Tensor | None, like: Tensor, batch: int) -> None:
    """int32 [batch + 1] on the device of ``like``, or None."""
    if x is not None:
        _int32(op, name, x, like)
        if x.dim() != 1 or x.shape[0] != batch + 1:
            fail(op, f"{name} has shape {_shape(x)}; want [batch + 1] = ({batch + 1},), where "
                     "block_table has one row per sequence")  # fmt: skip


def _int32(op: str, name: str, x: Any, like: Tensor) -> None:
    _checks.tensor(op, name, x)
    if x.dtype is not torch.int32:
        fail(op, f"{name} has dtype {_name(x.dtype)}; want int32; convert with "
                 f"{name}.to(torch.int32)", TypeError)  # fmt: skip
    if x.device != like.device:
        fail(op, f"{name} is on {x.device}; want {like.device} like the pages; move it")


def tables(op: str, table: Any, lengths: Any, k_pages: Tensor, batch: int | None) -> None:
    """block_table [B, max_pages] and cache_seqlens [B] or [B, Hk], both int32."""
    _int32(op, "block_table", table, k_pages)
    _int32(op, "cache_seqlens", lengths, k_pages)
    if table.dim() != 2 or (batch is not None and table.shape[0] != batch):
        rows = "batch" if batch is None else batch
        fail(op, f"block_table has shape {_shape(table)}; want [{rows}, max_pages]: one row of "
                 "page ids per sequence")  # fmt: skip
    heads = k_pages.shape[2]
    if tuple(lengths.shape) not in ((table.shape[0],), (table.shape[0], heads)):
        fail(
            op,
            f"cache_seqlens has shape {_shape(lengths)}; want [batch] = ({table.shape[0]},) "
            f"or, for lengths of their own per KV head, ({table.shape[0]}, {heads})",
        )


def quantisation(
    op: str, cache: tuple[Tensor, Tensor], scales: Any, zeros: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """k_scale, v_scale, k_zero, v_zero as [P|1, page_size|1, Hk], or None."""
    k_pages, _ = cache
    code = KV_CODES.get(k_pages.dtype)
    if code is None:
        for name, x in (("kv_scales", scales), ("kv_zeros", zeros)):
            if x is not None:
                fail(op, f"{name} is given with pages of {_name(k_pages.dtype)}; want it with "
                         "pages of codes (float8_e4m3fn, int8, uint8) only; drop it")  # fmt: skip
        return None, None, None, None
    if scales is None and code != "fp8":
        fail(op, f"kv_scales is missing; got {code} pages; want (k_scale, v_scale), fp32 [heads], "
                 "[pages, heads] or [pages, page_size, heads]")  # fmt: skip
    if zeros is not None and code == "fp8":
        fail(op, "kv_zeros is given with fp8 pages; want it with int8 and int4 codes; drop it")
    found = [_pair(op, name, x, k_pages) for name, x in (("kv_scales", scales),
                                                         ("kv_zeros", zeros))]  # fmt: skip
    shapes = {x.shape for x in (*found[0], *found[1]) if x is not None}
    if len(shapes) > 1:
        fail(
            op,
            f"scales and zeros differ in shape; got {sorted(map(tuple, shapes))} as [pages, slots, "
            "heads]; want one shape for all of them; expand the smaller ones",
        )
    return (*found[0], *found[1])


def _pair(op: str, name: str, x: Any, k_pages: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if x is None:
        return None, None
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        fail(op, f"{name} is {type(x).__name__}; want a pair of tensors, for k and for v",
             TypeError)  # fmt: skip
    return _wide(op, f"{name}[0]", x[0], k_pages), _wide(op, f"{name}[1]", x[1], k_pages)


def _wide(op: str, name: str, x: Any, k_pages: Tensor) -> Tensor:
    _checks.tensor(op, name, x)
    count, size, heads = k_pages.shape[:3]
    if x.dtype is not torch.float32 or x.device != k_pages.device:
        fail(op, f"{name} is {_name(x.dtype)} on {x.device}; want float32 on {k_pages.device}")
    shape = tuple(x.shape)
    wide = {(heads,): (1, 1, heads), (count, heads): (count, 1, heads)}.get(shape, shape)
    if wide not in ((1, 1, heads), (count, 1, heads), (count, size, heads)):
        fail(
            op,
            f"{name} has shape {shape}; want [heads] = ({heads},), [pages, heads] = "
            f"({count}, {heads}) or [pages, page_size, heads] = ({count}, {size}, {heads})",
        )
    found: Tensor = x.view(wide)
    return found


def tree_mask(op: str, mask: Any, q: Tensor) -> Tensor | None:
    """The mask as [B, 1, Sq, Sq] bool; int64 [B, Sq] has bit j for the j-th of the last Sq keys."""
    if mask is None:
        return None
    _checks.tensor(op, "tree_mask", mask)
    if q.dim() != 4:
        fail(op, "tree_mask is given with packed rows; got cu_seqlens_q; want batched queries: "
                 "pad the draft trees to one size")  # fmt: skip
    batch, rows = q.shape[:2]
    if mask.device != q.device:
        fail(op, f"tree_mask is on {mask.device}; want {q.device} like q; move it")
    if mask.dtype is torch.int64 and tuple(mask.shape) in ((batch, rows), (1, rows)) and rows < 64:
        bits = torch.arange(rows, device=mask.device)
        mask = (mask.unsqueeze(-1) >> bits & 1).bool()
    if mask.dtype is not torch.bool or tuple(mask.shape) not in ((batch, rows, rows),
                                                                 (1, rows, rows)):  # fmt: skip
        fail(
            op,
            f"tree_mask is {_name(mask.dtype)} {_shape(mask)}; want bool [{batch}|1, {rows}, "
            f"{rows}], or int64 bits [{batch}|1, {rows}] for up to 63 rows",
        )
    found: Tensor = mask.unsqueeze(1)
    return found


def new_rows(
    op: str, k: Any, v: Any, cache: tuple[Tensor, Tensor], cu_seqlens: Any, batch: int
) -> None:
    """k [B, S, Hk, D] and v [B, S, Hk, Dv], or packed without the batch, fit the pages."""
    rank = 4 if cu_seqlens is None else 3
    for name, x, held in (("k", k, cache[0]), ("v", v, cache[1])):
        _checks.tensor(op, name, x)
        want = (held.shape[2], channels(held))
        if x.dim() != rank or tuple(x.shape[-2:]) != want or (rank == 4 and x.shape[0] != batch):
            lead = f"[{batch}, rows" if rank == 4 else "[total"
            fail(op, f"{name} has shape {_shape(x)}; want {lead}, {want[0]}, {want[1]}] as the "
                     "pages and block_table have it; packed rows come with cu_seqlens")  # fmt: skip
        if x.dtype not in _checks._DTYPES:
            fail(op, f"{name} has dtype {_name(x.dtype)}; want a floating dtype; convert it")
        _dtype(op, name, x, held)
    if k.dtype is not v.dtype or k.shape[:-1] != v.shape[:-1]:
        fail(op, f"k and v differ; got {_name(k.dtype)} {_shape(k)} and {_name(v.dtype)} "
                 f"{_shape(v)}; want one dtype and equal rows")  # fmt: skip


def rope(op: str, tables: Any, positions: Any, k: Tensor, interleaved: bool) -> None:
    """Tables (cos, sin) [Hk|1, positions, rotary_dim / 2]; positions int32 like k's rows."""
    if tables is None:
        if positions is not None or interleaved:
            fail(op, "positions or rope_interleaved is given without rope; want (cos, sin) too")
        return
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        fail(op, f"rope is {type(tables).__name__}; want a pair of tensors (cos, sin)", TypeError)
    heads, half = k.shape[-2], k.shape[-1] // 2
    for name, x in zip(("rope cos", "rope sin"), tables, strict=True):
        _checks._floating(op, name, x, k)
        good = x.dim() == 3 and x.shape[0] in (1, heads) and x.shape[1] >= 1
        if not good or not 1 <= x.shape[2] <= half or x.shape != tables[0].shape:
            fail(op, f"{name} has shape {_shape(x)}; want [{heads}|1, positions >= 1, "
                     f"rotary_dim / 2 <= {half}] like the other table")  # fmt: skip
    if positions is not None:
        _int32(op, "positions", positions, k)
        if positions.shape != k.shape[:-2]:
            fail(op, f"positions has shape {_shape(positions)}; want {tuple(k.shape[:-2])}: one "
                     "per new row")  # fmt: skip


def page_bounds(op: str, k: Tensor, k_pages: Tensor, bounds: tuple[Any, Any]) -> None:
    """page_min and page_max [P, Hk, D] of k's dtype or fp32, both or neither."""
    if bounds[0] is None and bounds[1] is None:
        return
    want = (k_pages.shape[0], k_pages.shape[2], k.shape[-1])
    for name, x in zip(("page_min", "page_max"), bounds, strict=True):
        _checks.tensor(op, name, x)
        if (
            tuple(x.shape) != want
            or x.dtype not in (k.dtype, torch.float32)
            or not (x.is_contiguous() and x.device == k.device and x.dtype is bounds[0].dtype)
        ):
            fail(op, f"{name} is {_name(x.dtype)} {_shape(x)} on {x.device}; want contiguous "
                     f"[pages, heads, head_dim] = {want} of one dtype, {_name(k.dtype)} or float32,"
                     f" on {k.device}")  # fmt: skip


def groups(op: str, cu_groups: Any, prefix_lens: Any, like: Tensor, batch: int) -> None:
    """cu_groups [G + 1] and prefix_lens [G], both int32."""
    _int32(op, "cu_groups", cu_groups, like)
    _int32(op, "prefix_lens", prefix_lens, like)
    if (
        cu_groups.dim() != 1
        or cu_groups.shape[0] < 1
        or (tuple(prefix_lens.shape) != (cu_groups.shape[0] - 1,))
    ):
        fail(
            op,
            f"cu_groups has shape {_shape(cu_groups)}, prefix_lens {_shape(prefix_lens)}; "
            f"want [groups + 1] boundaries over {batch} requests and [groups] lengths",
        )


def split_plan(op: str, plan: Any, like: Tensor, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """(pieces [3, N], first [batch + 1 or more]), both int32, or None."""
    if plan is None:
        return None, None
    if not isinstance(plan, (tuple, list)) or len(plan) != 2:
        fail(op, f"split_plan is {type(plan).__name__}; want a pair of tensors (pieces, first), as "
                 "SplitPlan.tensors has them", TypeError)  # fmt: skip
    pieces, first = plan
    _int32(op, "split_plan pieces", pieces, like)
    _int32(op, "split_plan first", first, like)
    if pieces.dim() != 2 or pieces.shape[0] != 3 or first.dim() != 1 or first.shape[0] <= batch:
        fail(op, f"split_plan has shapes {_shape(pieces)} and {_shape(first)}; want pieces "
                 f"[3, N] (sequence, first key, end) and the first piece of each sequence "
                 f"[{batch + 1} or more]")  # fmt: skip
    return pieces, first


# ---- values ----


def split_values(op: str, plan: tuple[Tensor | None, Tensor | None], lengths: Tensor) -> None:
    """The pieces of each sequence cover its keys, ascending, each key once."""
    pieces, first = plan
    if pieces is None or first is None:
        return
    longest = (lengths if lengths.dim() == 1 else lengths.amax(1)).tolist()
    (owner, begin, end), at = pieces.tolist(), first.tolist()
    for b, length in enumerate(longest):
        mine = range(at[b], at[b + 1])
        good = 0 <= at[b] <= at[b + 1] <= len(owner) and at[0] == 0
        edges = [0, *(end[n] for n in mine)] if good else []
        good = good and all(owner[n] == b and begin[n] < end[n] for n in mine)
        if not good or edges[:-1] != [begin[n] for n in mine] or edges[-1] != length:
            named = range(max(0, at[b]), min(at[b + 1], len(owner)))  # of what may be any integers
            cuts = [(begin[n], end[n]) for n in named[:4]]
            fail(op, f"split_plan cuts sequence {b} into pieces {at[b]} .. {at[b + 1] - 1}: {cuts} "
                     f".. for {length} keys; want keys 0 .. {length - 1} in ascending pieces, each "
                     "key once; plan again for these lengths")  # fmt: skip


def index_values(op: str, cache: PagedCache, first: Tensor, last: Tensor | None = None) -> None:
    """Lengths fit the table, and page ids of keys first .. last - 1 exist.

    first: [B] int64, the first key that matters; last: [B] int64, default the longest length.
    What stands behind in the table is not looked at.
    """
    lengths = cache.cache_seqlens
    if lengths.numel() == 0:
        return
    wrong = (lengths < 0) | (lengths > cache.capacity)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        fail(op, f"cache_seqlens{where} is {int(lengths[tuple(where)])}; got a block_table with "
                 f"room for {cache.capacity} keys ({cache.block_table.shape[1]} pages of "
                 f"{cache.page_size}); want 0 <= cache_seqlens <= {cache.capacity}")  # fmt: skip
    if last is None:
        last = (lengths if lengths.dim() == 1 else lengths.amax(1)).to(torch.int64)
    _page_ids(op, cache, first, last)


def _page_ids(op: str, cache: PagedCache, first: Tensor, last: Tensor) -> None:
    table, size, count = cache.block_table, cache.page_size, cache.k_pages.shape[0]
    start = torch.arange(table.shape[1], device=table.device) * size
    used = (start < last.unsqueeze(1)) & (start + size > first.unsqueeze(1))
    wrong = used & ((table < 0) | (table >= count))
    if bool(wrong.any()):
        b, n = wrong.nonzero()[0].tolist()
        fail(op, f"block_table[{b}, {n}] is {int(table[b, n])}; got {count} pages, and this one "
                 f"holds keys from {n * size} on of a sequence of {int(last[b])}; want an id of "
                 f"0 .. {count - 1}; entries behind the length may be anything")  # fmt: skip


def written_values(op: str, cache: PagedCache, rows: Tensor) -> None:
    """The table has room for ``rows`` [B] int64 new keys per sequence, and their pages exist."""
    lengths = cache.cache_seqlens.to(torch.int64)
    low, high = (lengths, lengths) if lengths.dim() == 1 else (lengths.amin(1), lengths.amax(1))
    full = (low >= 0) & (high + rows > cache.capacity)
    if bool(full.any()):
        b = int(full.nonzero()[0])
        fail(op, f"sequence {b} has {int(high[b])} keys and gets {int(rows[b])}; got a "
                 f"block_table with room for {cache.capacity}; want more pages for it")  # fmt: skip
    index_values(op, cache, low, torch.where(rows > 0, high + rows, low))
