"""Attention to listed keys: the engine under every query-aware selection of KV.

    out = sum_n exp(s_n) v[id_n] / sum_n exp(s_n),   s_n = scale <q, k[id_n]> + log_bias_n

What selects (LSH, centroids, page bounds, top-k) ends in such lists; what a selection knows about
an entry, its inclusion probability or the size of the cluster it stands for, is its log-bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._params import KV_CODES, IndexedParams
from attnforge.ops import _checks, _indexed_ops, _paged_checks
from attnforge.ops._checks import _name, _shape, fail
from attnforge.ops._indexed_autograd import attend
from attnforge.ops.flash import _choice
from attnforge.ops.paged import _no_grad
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["indexed_attention"]

_OP = "indexed_attention"


def _int32(name: str, x: Any, q: Tensor, shape: tuple[int, ...], what: str) -> None:
    _checks.tensor(_OP, name, x)
    if x.dtype is not torch.int32:
        fail(_OP, f"{name} has dtype {_name(x.dtype)}; want int32; convert with "
                  f"{name}.to(torch.int32)", TypeError)  # fmt: skip
    if x.device != q.device or tuple(x.shape) != shape:
        fail(_OP, f"{name} is {_shape(x)} on {x.device}; want {shape} on {q.device}: {what}")


def _lists(q: Tensor, heads_kv: int, ids: Any, lens: Any, log_bias: Any) -> None:
    """ids [B, H, N], lens [B, H], log_bias like ids; H is 1, the KV heads or the query heads."""
    _checks.tensor(_OP, "ids", ids)
    heads = sorted({1, heads_kv, q.shape[2]})
    if ids.dim() != 3 or ids.shape[0] != q.shape[0] or ids.shape[1] not in heads:
        fail(_OP, f"ids has shape {_shape(ids)}; want [batch, heads, entries] with batch "
                  f"{q.shape[0]} and {' or '.join(map(str, heads))} heads: one list for all, per "
                  "KV head or per query head")  # fmt: skip
    _int32("ids", ids, q, tuple(ids.shape), "the lists")
    if lens is not None:
        _int32("lens", lens, q, tuple(ids.shape[:2]), "how many entries of each list count")
    if log_bias is not None:
        _checks._floating(_OP, "log_bias", log_bias, q)
        if log_bias.shape != ids.shape:
            fail(_OP, f"log_bias has shape {_shape(log_bias)}; want {tuple(ids.shape)} like ids: "
                      "one number per entry")  # fmt: skip


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ids: Tensor,
    lens: Tensor | None = None,
    log_bias: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    kv_layout: str = "NHD",
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, IndexedParams]:
    if block_table is None:
        _checks.tensors(_OP, q, k, v)
        _checks.dense(_OP, q, k, v)
        _checks.lengths(_OP, "cache_seqlens", cache_seqlens, q, q.shape[0])
        if kv_layout != "NHD":
            fail(_OP, f"kv_layout is {kv_layout!r} without block_table; want 'NHD': it is the "
                      "layout of pages")  # fmt: skip
    else:
        k, v = _paged_checks.pages(_OP, k, v, kv_layout)
        if k.dtype in KV_CODES:
            fail(_OP, f"k_pages have dtype {_name(k.dtype)}; want {_name(q.dtype)} like q: codes "
                      "are read by paged_attention alone")  # fmt: skip
        _paged_checks.queries(_OP, q, k, None)
        _paged_checks.tables(_OP, block_table, cache_seqlens, k, q.shape[0])
        _checks.lengths(_OP, "cache_seqlens", cache_seqlens, q, q.shape[0])
        _no_grad(_OP, q=q, k=k, v=v, log_bias=log_bias)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(_OP, scale, 0.0)
    _lists(q, k.shape[2], ids, lens, log_bias)
    if log_bias is not None:
        stat = torch.float64 if q.dtype is torch.float64 else torch.float32
        log_bias = log_bias.to(stat)
    return q, k, v, IndexedParams(ids, lens, log_bias, block_table, cache_seqlens, scale)


def _requests(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any
) -> Sequence[Request]:
    q, k, v, p = _problem(q, k, v, **options)
    meta = _indexed_ops.metadata(q, v, p)
    ops = ["indexed_fwd"] if p.block_table is not None else ["indexed_fwd", "indexed_bwd"]
    return [_indexed_ops.request(op, meta) for op in ops]


@explained_by(_requests)
def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ids: Tensor,
    lens: Tensor | None = None,
    log_bias: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    kv_layout: str = "NHD",
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of every row of q to the keys that its list names, and to no others.

    q [B, Sq, Hq, D]; all rows of a head share its list. k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], or,
    with block_table, pages [P, page_size, Hk, D] ("NHD") or [P, Hk, page_size, D] ("HND").
    ids: int32 [B, H, N] key positions, H being 1, Hk or Hq: one list for all heads, per KV head
        or per query head. Any order; ascending is fastest. Ids outside 0 .. keys - 1 (-1, or at
        and past cache_seqlens) are ignored wherever they stand. An id that stands twice counts
        twice, as samples drawn with replacement want it; the selectors give each id once.
    lens: [B, H] int32, entries of each list that count (clamped to 0 .. N); None: all of them.
    log_bias: like ids, added to the logit of an entry: -log(inclusion probability) for sampled
        keys, log(size) for a key that stands for several; -inf hides an entry.
    block_table [B, max_pages], cache_seqlens [B]: int32, as in ``paged_attention``. Without a
        table cache_seqlens may be None: all Sk keys are in use.

    No causal mask is added: a list is what is seen. Returns out [B, Sq, Hq, Dv] of q's dtype, or
    (out, lse) with the LSE [B, Hq, Sq] fp32 of the entries, differentiable: it meets other parts
    by ``merge_states``. A row without an entry gives 0, -inf and no gradient. Gradients reach q,
    k, v and log_bias; caches in pages have none.

    Raises ValueError or TypeError on arguments that do not fit. Work: 2 (D + Dv) flops per row
    and entry; where query heads have lists of their own, a KV head's rows are gathered once for
    the union of its lists.
    """
    q, k, v, p = _problem(
        q,
        k,
        v,
        ids=ids,
        lens=lens,
        log_bias=log_bias,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        kv_layout=kv_layout,
        softmax_scale=softmax_scale,
    )
    out, lse = attend(q, k, v, p, _choice(_OP, backend))
    return (out, lse) if return_lse else out
