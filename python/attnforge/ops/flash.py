"""Flash attention: exact attention in tiles, with memory linear in the sequence length.

    S = scale * Q K^T;  O = softmax(S) V;  LSE = log sum exp S      (Dao et al., 2022, 2023)

Public functions of the family. They check metadata, normalise arguments and call the operators
of ``_flash_ops``; autograd is entered only if a gradient is needed. Cost: ``flops`` and bytes of
a problem by ``cost``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Unpack

from attnforge._params import FLOAT8, FlashParams
from attnforge.ops import _checks, _feature_checks, _flash_ops
from attnforge.ops._features import Features, apply_features, split_window
from attnforge.ops._flash_autograd import attend, merge, needs_grad
from attnforge.ops._flash_cost import Cost, cost
from attnforge.ops._flash_finish import finish
from attnforge.registry import override, tuned
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = [
    "Cost",
    "cost",
    "flash_attention",
    "flash_attention_varlen",
    "flash_decode",
    "merge_states",
]

Window = tuple[int, int]
_decode = _flash_ops.flash_decode


def _autocast(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under ``torch.autocast`` q, k and v take its dtype; float64 and fp8 are left alone."""
    _checks.tensors(op, q, k, v)
    kind = q.device.type
    if kind == "meta":  # knows no autocast
        return q, k, v
    if torch.is_autocast_enabled(kind) and q.dtype is not torch.float64 and k.dtype is not FLOAT8:
        dtype = torch.get_autocast_dtype(kind)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _stat_inputs(q: Tensor, alibi: Tensor | None, sinks: Tensor | None) -> Any:
    """Per-head tensors in the dtype of the statistics: fp64 beside fp64, else fp32."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    if alibi is not None and alibi.dtype is not dtype:
        alibi = alibi.to(dtype)
    if sinks is not None and sinks.dtype is not dtype:
        sinks = sinks.to(dtype)
    return alibi, sinks


def _choice(op: str, backend: str | None) -> str | None:
    """The argument, else the enclosing ``attnforge.backend``."""
    if backend is None:
        return override.current
    _checks.backend(op, backend)
    return backend


def _problem(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: int,
    indices: tuple[Tensor | None, Tensor | None, Tensor | None],
    sizes: tuple[int, int],
    *,
    causal: bool = False,
    window_size: Window | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    **features: Any,
) -> FlashParams:
    """Check and normalise the options that all functions share. indices: cu_q, cu_k, used."""
    window, per_head = split_window(op, window_size, q)
    left, right = _checks.window(op, window, causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(op, scale, softcap)
    if alibi_slopes is not None or sinks is not None:
        _checks.per_head(op, q, batch, alibi_slopes, sinks)
        alibi_slopes, sinks = _stat_inputs(q, alibi_slopes, sinks)
    if v.dtype is FLOAT8:
        _feature_checks.float8(op, (q, k, v, sinks), features)
    if features:
        _feature_checks.jit_mods(op, (q, k, v, sinks), features)
    p = FlashParams(*indices, alibi_slopes, sinks, *sizes, scale, left, right, softcap)
    if features or per_head is not None:
        p = apply_features(op, q, k, v, p, features, per_head, causal)
    return p


def _dense(
    op: str, q: Tensor, k: Tensor, v: Tensor, used_name: str, used: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, FlashParams]:
    q, k, v = _autocast(op, q, k, v)
    _checks.dense(op, q, k, v)
    batch = q.shape[0]
    _checks.lengths(op, used_name, used, q, batch)
    sizes = (q.shape[1], k.shape[1])
    return q, k, v, _problem(op, q, k, v, batch, (None, None, used), sizes, **options)


def _requests(ops: tuple[str, ...], q: Tensor, _: Tensor, v: Tensor, p: FlashParams) -> Any:
    meta = _flash_ops.metadata(q, v, p)
    return [replace(_flash_ops.request(op, meta), sizes=tuned.call_sizes(op, (q, p))) for op in ops]


def _attention_requests(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Sequence[Request]:
    problem = _dense("flash_attention", q, k, v, "seqused_k", seqused_k, **options)
    return _requests(("flash_fwd", "flash_bwd"), *problem)  # type: ignore[no-any-return]


@explained_by(_attention_requests)
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: Window | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **features: Unpack[Features],
) -> Any:
    """Exact attention of batched sequences; differentiable in q, k, v and sinks.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], one dtype of fp32, bf16, fp16 (fp64
    by the reference); Hq a multiple of Hk, where query head h reads KV head h // (Hq / Hk). Any
    strides are read in place if the last one is 1; else the tensor is copied once. k and v may be
    float8_e4m3fn, beside a q of that or any of the others but fp64: forward only, see ``Features``.

    causal: query i sees keys up to i + Sk - Sq (bottom-right aligned).
    window_size: (left, right) keys beside that diagonal that are seen; -1 is unlimited. An int32
        tensor [Hq, 2] gives each head its own.
    softcap: logits become softcap * tanh(logits / softcap); 0 is off.
    alibi_slopes: [Hq] or [B, Hq]; logits get -slope * |i + Sk - Sq - j|. No gradient.
    sinks: [Hq]; one logit per head that takes part in the softmax and brings no value.
    seqused_k: [B] int32; keys at and past it are never read, and Sk above means it.
    softmax_scale: default 1 / sqrt(D).
    return_lse: also return the LSE [B, Hq, Sq] fp32, natural log, sinks included;
        differentiable.
    backend: a backend (``"cpu"``), kernel id or ``"flash_fwd=cpu,*=reference"``; default: the
        enclosing ``attnforge.backend``, ``ATTNFORGE_BACKEND``, the best score.
    features: masks, biases, gates, score functions, dropout, RoPE, fp8: see ``Features``.

    Returns out [B, Sq, Hq, Dv] of q's dtype, or (out, lse). A row that sees no key gives 0 and
    an LSE of -inf (with a sink: the sink). Under ``torch.autocast`` q, k, v take its dtype.

    Raises ValueError or TypeError on arguments that do not fit. Memory is linear in Sq and Sk;
    flops are 2 (D + Dv) per visible pair and head. Source: FlashAttention-2 (Dao, 2023).
    """
    q, k, v, p = _dense(
        "flash_attention",
        q,
        k,
        v,
        "seqused_k",
        seqused_k,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        softmax_scale=softmax_scale,
        **features,
    )
    choice = _choice("flash_attention", backend)
    out, lse = attend(q, k, v, p, choice)
    if features:
        out, lse = finish("flash_attention", q, p, (out, lse), features, choice)
    return (out, lse) if return_lse else out


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, FlashParams]:
    op = "flash_attention_varlen"
    q, k, v = _autocast(op, q, k, v)
    _checks.varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k)
    batch = cu_seqlens_q.shape[0] - 1
    _checks.lengths(op, "seqused_k", seqused_k, q, batch)
    _checks.max_seqlen(op, "max_seqlen_q", max_seqlen_q)
    _checks.max_seqlen(op, "max_seqlen_k", max_seqlen_k)
    # The totals bound every sequence; the operator finds the exact bound on the CPU.
    sizes = (
        q.shape[0] if max_seqlen_q is None else max_seqlen_q,
        k.shape[0] if max_seqlen_k is None else max_seqlen_k,
    )
    indices = (cu_seqlens_q, cu_seqlens_k, seqused_k)
    return q, k, v, _problem(op, q, k, v, batch, indices, sizes, **options)


def _varlen_requests(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any
) -> Sequence[Request]:
    problem = _varlen(q, k, v, **options)
    return _requests(("flash_fwd", "flash_bwd"), *problem)  # type: ignore[no-any-return]


@explained_by(_varlen_requests)
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: Window | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **features: Unpack[Features],
) -> Any:
    """Attention of packed sequences of different lengths; otherwise as ``flash_attention``.

    q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv]. cu_seqlens_q, cu_seqlens_k: [B + 1] int32,
    rising from 0; sequence b is rows cu[b] .. cu[b + 1]. Sequences may be empty. Rows past
    the last boundary give 0, an LSE of -inf and no gradient.

    max_seqlen_q, max_seqlen_k: bounds of the lengths, checked; default: the totals.

    Returns out [Tq, Hq, Dv], or (out, lse) with lse [Hq, Tq] fp32. Boundaries on the CPU are
    checked by value: ValueError if they decrease, do not start at 0 or pass the end.
    """
    q, k, v, p = _varlen(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        softmax_scale=softmax_scale,
        **features,
    )
    choice = _choice("flash_attention_varlen", backend)
    out, lse = attend(q, k, v, p, choice)
    if features:
        out, lse = finish("flash_attention_varlen", q, p, (out, lse), features, choice)
    return (out, lse) if return_lse else out


def _decode_requests(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    num_splits: int = 0,
    causal: bool = True,
    return_lse: bool = False,
    **options: Any,
) -> Sequence[Request]:
    _checks.num_splits("flash_decode", num_splits)
    problem = _dense(
        "flash_decode", q, k_cache, v_cache, "cache_seqlens", cache_seqlens, causal=causal,
        **options,
    )  # fmt: skip
    return _requests(("flash_decode",), *problem)  # type: ignore[no-any-return]


@explained_by(_decode_requests)
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    num_splits: int = 0,
    causal: bool = True,
    window_size: Window | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **features: Unpack[Features],
) -> Any:
    """Attention of a few new rows over a long KV cache, split over the keys.

    q [B, Sq, Hq, D] with small Sq (its rows are the last of the sequence), k_cache
    [B, Sk, Hk, D], v_cache [B, Sk, Hk, Dv]; cache_seqlens [B] int32: the valid keys, the new
    ones among them; slots past it are never read. The cache is not written.

    num_splits: 0 splits every 2048 keys, which makes the result independent of the batch and of
        the number of threads; n > 0 makes n equal splits.

    Other arguments and results are those of ``flash_attention``. If a gradient is needed the
    call runs as ``flash_attention`` with ``seqused_k=cache_seqlens``. Bytes read: the valid
    part of the cache, once for all query heads of a KV head. Source: Flash-Decoding (2023).
    """
    _checks.num_splits("flash_decode", num_splits)
    q, k, v, p = _dense(
        "flash_decode",
        q,
        k_cache,
        v_cache,
        "cache_seqlens",
        cache_seqlens,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        softmax_scale=softmax_scale,
        **features,
    )
    choice = _choice("flash_decode", backend)
    if needs_grad(q, k, v, p.sinks, p.mods) or forward_ad._current_level >= 0:
        out, lse = attend(q, k, v, p, choice)
    else:
        out, lse = _decode(q, k, v, *p[2:5], *p[7:], num_splits, choice)
    if features:
        out, lse = finish("flash_decode", q, p, (out, lse), features, choice)
    return (out, lse) if return_lse else out


def _merge_requests(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Sequence[Request]:
    # Shapes are described with the dtype of the outputs; an LSE is fp32 beside all but fp64.
    lses = [x.float() if x.is_meta and x.dtype is not torch.float64 else x for x in lses]
    _checks.merge_parts("merge_states", outs, lses)
    meta = (outs[0].device, outs[0].dtype, outs[0].shape[-1])
    return [_flash_ops.merge_request("merge_states", meta)]


@explained_by(_merge_requests)
def merge_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the attention over each of them.

        LSE = log sum_n exp(LSE_n);  O = sum_n exp(LSE_n - LSE) O_n

    outs: tensors of one shape, [B, S, H, D] or [T, H, D]; lses: their LSEs [B, H, S] or [H, T].
    A part whose LSE is -inf or +inf is empty and its output is not used. A sink must have been
    given to exactly one part. Differentiable in both.

    Returns (out, lse): out of the parts' dtype, lse fp32 (fp64 beside fp64 outputs).
    """
    _checks.merge_parts("merge_states", outs, lses)
    return merge(list(outs), list(lses), _choice("merge_states", backend))
