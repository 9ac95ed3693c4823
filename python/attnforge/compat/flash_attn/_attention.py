"""Attention of tensors: batched and packed sequences, separate or packed q, k, v."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from attnforge.ops._checks import fail
from attnforge.ops._features import drawn_seed
from attnforge.ops.flash import flash_attention, flash_attention_varlen
from attnforge.ops.paged import paged_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Window = tuple[int, int]


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """Keywords of ``flash_attention`` for flash-attn's positional ones."""
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": tuple(window_size),
        "softcap": max(softcap, 0.0),
        "alibi_slopes": alibi_slopes,
        "return_lse": True,
    }
    if dropout_p > 0.0:
        options |= {"dropout_p": dropout_p, "dropout_seed": drawn_seed()}
    return options


def _result(found: tuple[Tensor, Tensor], return_attn_probs: bool) -> Any:
    return (*found, None) if return_attn_probs else found[0]


def _part(op: str, name: str, packed: Tensor, dim: int, count: int) -> tuple[Tensor, ...]:
    """The ``count`` tensors that ``packed`` holds along ``dim``, as views."""
    if packed.dim() <= -dim or packed.shape[dim] != count:
        fail(op, f"{name} has shape {list(packed.shape)}; want [.., {count}, heads, head_dim]")
    return packed.unbind(dim)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``attnforge.flash_attention`` of q [B, Sq, Hq, D], k, v [B, Sk, Hk, D]."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _result(flash_attention(q, k, v, **options), return_attn_probs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
    """``flash_attn_func`` with k and v in one tensor kv [B, Sk, 2, Hk, D]."""
    k, v = _part("flash_attn_kvpacked_func", "kv", kv, -3, 2)
    return flash_attn_func(q, k, v, *args, **options)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **options: Any) -> Any:
    """``flash_attn_func`` with all three in one tensor qkv [B, S, 3, H, D]."""
    q, k, v = _part("flash_attn_qkvpacked_func", "qkv", qkv, -3, 3)
    return flash_attn_func(q, k, v, *args, **options)


class _NoGradient(Function):  # type: ignore[misc, unused-ignore]
    """Its first argument, of which a gradient for the others is an error and not a zero."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *_: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        fail("flash_attn_varlen_func", "backward() came through a block_table; want packed k and v "
             "where gradients are needed: attention over pages serves inference",
             RuntimeError)  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """``attnforge.flash_attention_varlen`` of packed q [Tq, Hq, D], k, v [Tk, Hk, D].

    With block_table [B, max_pages], k and v are pages [P, page_size, Hk, D] and cu_seqlens_k gives
    lengths alone: ``attnforge.paged_attention``, without dropout; its backward is an error.
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        if dropout_p > 0.0:
            fail("flash_attn_varlen_func", f"dropout_p is {dropout_p} beside a block_table; want "
                 "0: attention over pages serves inference")  # fmt: skip
        found = paged_attention(
            *(x.detach() for x in (q, k, v)), block_table=block_table,
            cache_seqlens=cu_seqlens_k.diff(), cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, **options,
        )  # fmt: skip
        out: Tensor = _NoGradient.apply(found[0], q, k, v)  # type: ignore[no-untyped-call, unused-ignore]
        found = (out, found[1])
    else:
        found = flash_attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **options,
        )  # fmt: skip
    return _result(found, return_attn_probs)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
    """``flash_attn_varlen_func`` with k and v in one tensor kv [Tk, 2, Hk, D]."""
    k, v = _part("flash_attn_varlen_kvpacked_func", "kv", kv, -3, 2)
    return flash_attn_varlen_func(q, k, v, *args, **options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **options: Any
) -> Any:
    """``flash_attn_varlen_func`` of one set of boundaries, all three in qkv [T, 3, H, D]."""
    q, k, v = _part("flash_attn_varlen_qkvpacked_func", "qkv", qkv, -3, 3)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *bounds, *args, **options)
