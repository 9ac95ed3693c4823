"""``flash_attn_with_kvcache``: append new keys to a cache, rotate, attend, in one call.

A contiguous cache is a paged one whose pages are its rows, so one path serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnforge.ops._checks import fail
from attnforge.ops.flash import flash_decode
from attnforge.ops.paged import paged_append, paged_attention
from attnforge.reference.scores import rotate

__all__ = ["flash_attn_with_kvcache"]

_OP = "flash_attn_with_kvcache"


def _lengths(cache_seqlens: Tensor | int | None, q: Tensor, full: int) -> Tensor:
    """Lengths before the call [B] int32; an int is that of every sequence, None a full cache."""
    batch = q.shape[0]
    if cache_seqlens is None:
        cache_seqlens = full
    if isinstance(cache_seqlens, int):
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    return cache_seqlens


def _rotated(
    q: Tensor, rope: tuple[Tensor, Tensor], lengths: Tensor, ordered: bool, interleaved: bool
) -> Tensor:
    """q turned at the positions of its rows: ``lengths`` on, or all at ``lengths`` (unordered)."""
    at = lengths.long().unsqueeze(1)
    if ordered:
        at = at + torch.arange(q.shape[1], device=q.device)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    turned = rotate(q.to(wide).transpose(1, 2), *rope, at.expand(q.shape[:2]), interleaved)
    return turned.transpose(1, 2).to(q.dtype)


def _refuse(
    k: Tensor | None,
    v: Tensor | None,
    rotary: tuple[Tensor | None, Tensor | None],
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_seqlens: Any,
) -> None:
    if (k is None) != (v is None):
        fail(_OP, "k and v come apart; got one of them; want both new keys and values, or neither")
    if k is not None and cache_seqlens is None:
        fail(_OP, "cache_seqlens is None beside new keys; want the lengths before them")
    if (rotary[0] is None) != (rotary[1] is None):
        fail(_OP, "rotary_cos and rotary_sin come apart; got one of them; want both or neither")
    if rotary[0] is not None and k is None:
        fail(_OP, "rotary_cos is given without k; want new keys: those in the cache are rotated")
    if block_table is not None and cache_batch_idx is not None:
        fail(_OP, "cache_batch_idx is given beside a block_table; want one of them")
    if cache_leftpad is not None and block_table is not None:
        fail(_OP, "cache_leftpad is given beside a block_table; want one of them")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q [B, Sq, Hq, D] over a cache, after k, v [B, Sn, Hk, D] were written to it.

    k_cache, v_cache: [Bc, Sc, Hk, D], or with block_table [B, max_pages] pages
        [P, page_size, Hk, D] of any size. The new keys go behind cache_seqlens, in place.
    cache_seqlens: [B] int32 or an int, before the new keys; default: a full cache.
    cache_batch_idx: [B] int32, the row of the cache that each sequence uses.
    cache_leftpad: [B] int32; keys before it are not seen. Contiguous caches only.
    rotary_cos, rotary_sin: [positions, rotary_dim / 2], of the new keys and of q, whose rows stand
        at cache_seqlens on, or with neither causal nor a window all at cache_seqlens; padding
        moves no position.

    Returns out [B, Sq, Hq, D], with return_softmax_lse (out, lse [B, Hq, Sq]). No gradient. Raises
    RuntimeError where a block_table has no room for the keys, as flash-attn does.
    """
    tables = (rotary_cos, rotary_sin)
    _refuse(k, v, tables, cache_leftpad, block_table, cache_batch_idx, cache_seqlens)
    paged = block_table is not None
    full = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    lengths = _lengths(cache_seqlens, q, full)
    if block_table is None:
        rows = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
        rows = rows if cache_batch_idx is None else cache_batch_idx.to(torch.int32)
        block_table = rows.unsqueeze(1)
    rope = None
    with torch.no_grad(), _room_errors():
        if rotary_cos is not None and rotary_sin is not None:
            rope = (rotary_cos.float().unsqueeze(0), rotary_sin.float().unsqueeze(0))
            ordered = causal or tuple(window_size) != (-1, -1)
            q = _rotated(q, rope, lengths, ordered, rotary_interleaved)
        used = lengths
        if k is not None:
            paged_append(
                k, v, k_cache, v_cache, block_table=block_table, cache_seqlens=lengths,
                rope=rope, rope_interleaved=rope is not None and rotary_interleaved,
            )  # fmt: skip
            used = lengths + k.shape[1]
        options: dict[str, Any] = {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": tuple(window_size),
            "softcap": max(softcap, 0.0),
            "alibi_slopes": alibi_slopes,
            "num_splits": num_splits,
            "return_lse": True,
        }
        if paged or (cache_batch_idx is not None and cache_leftpad is None):
            options |= {"block_table": block_table, "cache_seqlens": used}
            found = paged_attention(q, k_cache, v_cache, **options)
        else:
            if cache_batch_idx is not None:
                k_cache, v_cache = (x[cache_batch_idx.long()] for x in (k_cache, v_cache))
            if cache_leftpad is not None:
                options |= _leftpad(q, k_cache, cache_leftpad)
            batch = q.shape[0]
            found = flash_decode(q, k_cache[:batch], v_cache[:batch], cache_seqlens=used, **options)
    return found if return_softmax_lse else found[0]


@contextmanager
def _room_errors() -> Iterator[None]:
    """flash-attn raises RuntimeError where a block_table has too little room."""
    try:
        yield
    except ValueError as error:
        if "room for" not in str(error):
            raise
        raise RuntimeError(str(error)) from error


def _leftpad(q: Tensor, k_cache: Tensor, cache_leftpad: Tensor) -> dict[str, Tensor]:
    """Padding as a segment that no query belongs to."""
    key = torch.arange(k_cache.shape[1], device=q.device)
    padding = (key < cache_leftpad.unsqueeze(1)).to(torch.int32)
    return {"segment_ids_k": padding, "segment_ids_q": padding.new_zeros(q.shape[:2])}
