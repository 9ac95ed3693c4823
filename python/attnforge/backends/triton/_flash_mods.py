"""Features of single scores for the Triton launchers: FlashParams to the kernels' named tuples.

Tensors that broadcast get strides of 0 and are never expanded.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge._params import SCORE_FNS, FlashParams

__all__ = ["HEAVY", "heavy", "mods", "rope"]


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"attnforge.triton_kernels.{name}")


def _batched(x: Tensor, p: FlashParams) -> Tensor:
    """[B|1, H|1, ..]: packed tensors get a batch of one."""
    return x if p.cu_seqlens_q is None else x.unsqueeze(0)


def _step(x: Tensor, dim: int) -> int:
    return x.stride(dim) if x.shape[dim] > 1 else 0


def _stat(x: Tensor | None, p: FlashParams) -> Any:
    """A Stat of [B|1, H|1, S], last stride 1."""
    if x is None:
        return None
    x = _batched(x if x.stride(-1) == 1 else x.contiguous(), p)
    return _module("tensors").Stat(x, _step(x, 0), _step(x, 1))


def _view(x: Tensor | None, p: FlashParams) -> Any:
    """A View of [B|1, H|1, Sq, X], last stride 1."""
    if x is None:
        return None
    x = _batched(x if x.stride(-1) == 1 else x.contiguous(), p)
    return _module("tensors").View(x, _step(x, 0), x.stride(2), _step(x, 1))


def _of_all_heads(x: Tensor | None, p: FlashParams) -> Any:
    """A Stat of [B|1, S] (packed [S]), which belongs to no head."""
    return None if x is None else _stat(x.unsqueeze(-2), p)


def mods(p: FlashParams, heads: int) -> Any:
    """A Mods. heads: query heads."""
    m = p.score_mods
    seed = offset = dropped = boost = None
    if m.rng is not None:
        first, second = m.rng.tolist()  # on the CPU: no wait for a device
        seed, offset = first ^ (second >> 32 << 32), second & 0xFFFFFFFF
        dropped, boost = round(p.dropout_p * 2.0**32), 1.0 / (1.0 - p.dropout_p)
    rel = None if m.rel_bias is None else m.rel_bias.contiguous()
    return _module("mods").Mods(
        bounds=_view(m.row_bounds, p),
        mask=None if m.mask is None else _view(m.mask.view(torch.uint8), p),
        covered=None if m.mask is None else m.mask.shape[-1],
        ids_q=_of_all_heads(m.segments_q, p),
        ids_k=_of_all_heads(m.segments_k, p),
        key_bias=_stat(m.key_bias, p),
        bias=_view(m.bias, p),
        rel_bias=None if rel is None else _module("tensors").Stat(rel, 0, _step(rel, 0)),
        radius=None if rel is None else rel.shape[-1] // 2,
        decay=_stat(m.decay, p),
        row_scale=_stat(m.row_scale, p),
        seed=seed,
        offset=offset,
        dropped=dropped,
        boost=boost,
        heads=heads if m.rng is not None else None,
        qk_descale=m.qk_descale,
        v_descale=m.v_descale,
        heads_kv=next((x.shape[1] for x in (m.qk_descale, m.v_descale) if x is not None), None),
    )


# Features that need the smaller tiles of ``config``, by the names of a Request.
HEAVY = frozenset({
    "mask", "bias", "rel_bias", "forget_gate", "rope", "dropout", *SCORE_FNS[1:],
    "kv_fp8", "kv_int8", "kv_int4",
})  # fmt: skip


def heavy(p: FlashParams) -> bool:
    """Whether a call uses one of ``HEAVY``."""
    m = p.score_mods
    large = (m.mask, m.bias, m.rel_bias, m.decay, m.rope_cos, m.rng)
    return p.score_fn != "softmax" or any(x is not None for x in large)


def rope(p: FlashParams) -> Any:
    """A Rope, or None."""
    m = p.score_mods
    if m.rope_cos is None or m.rope_sin is None:
        return None
    cos, sin = m.rope_cos.contiguous(), m.rope_sin.contiguous()
    return _module("rope").Rope(
        cos=cos,
        sin=sin,
        head=_step(cos, 0),
        length=cos.shape[1],
        half=cos.shape[2],
        at_q=_of_all_heads(m.positions_q, p),
        at_k=_of_all_heads(m.positions_k, p),
        step=1 if p.rope_interleaved else cos.shape[2],
    )
