"""Native sparse attention: compressed, selected and sliding-window attention, mixed by gates.

    o_t = g_cmp,t o_cmp,t + g_slc,t o_slc,t + g_win,t o_win,t

Yuan et al., 2025 (arXiv 2502.11089). The probabilities of the compressed branch say which blocks
of tokens each query reads in the selected one: one list per query and KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FlashParams
from attnforge.ops import _flash_ops, _nsa_ops, _paged_ops
from attnforge.ops._checks import _shape, fail, tensor
from attnforge.ops._flash_autograd import attend, needs_grad
from attnforge.ops.block_sparse import block_sparse_attention
from attnforge.ops.block_sparse_decode import block_sparse_decode
from attnforge.ops.compressed import CompressedProblem, compressed_problem
from attnforge.ops.flash import _choice, flash_attention, flash_attention_varlen
from attnforge.ops.gating import gated_combine
from attnforge.ops.pooling import pool_blocks
from attnforge.ops.selection import BlockSelection
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["nsa_attention", "nsa_select"]

_SELECT = "nsa_select"
_NSA = "nsa_attention"


def _check_counts(op: str, top_n: int, init_blocks: int, local_blocks: int) -> None:
    for name, value, least in (
        ("top_n", top_n, 1), ("init_blocks", init_blocks, 0), ("local_blocks", local_blocks, 0)
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            fail(op, f"{name} is {value!r}; want an int >= {least}")
    if init_blocks + local_blocks > top_n:
        fail(
            op,
            f"top_n is {top_n}; want at least init_blocks + local_blocks = "
            f"{init_blocks + local_blocks}: forced blocks count towards top_n",
        )


def _rest(c: CompressedProblem, counts: tuple[int, int, int], choice: str | None) -> Any:
    """Arguments of the operators behind their tensors."""
    blocks = max(1, -(-c.tokens // c.sizes[2]))
    return (c.positions, *c.p[:3], *c.p[5:8], *c.sizes, blocks, *counts, choice)


def _choose(
    c: CompressedProblem, lse: Tensor, counts: tuple[int, int, int], choice: str | None
) -> BlockSelection:
    q, k = c.q.detach(), c.k.detach()
    indices = _nsa_ops.nsa_select(q, k, lse.detach(), *_rest(c, counts, choice))
    return BlockSelection(indices, 1, c.sizes[2])


# With fewer rows the flash kernels share out the keys, of decodes.
_MANY_ROWS = 64


def _takes_attend(q: Tensor, k: Tensor, v: Tensor, p: FlashParams, choice: str | None) -> bool:
    """Whether one kernel computes branch and choice: there is one, many rows and no gradient."""
    apart = q.shape[-3] < _MANY_ROWS or torch.compiler.is_compiling() or needs_grad(q, k, v, None)
    return not apart and _nsa_ops.serves_attend(q, v, p, choice)


def _compressed_branch(
    c: CompressedProblem, counts: tuple[int, int, int], choice: str | None
) -> tuple[Tensor, BlockSelection]:
    """Output of the compressed branch and the choice by it, of one kernel where there is one."""
    if not _takes_attend(c.q, c.k, c.v, c.p._replace(mods=()), choice):
        out, lse = attend(c.q, c.k, c.v, c.p, choice)
        return out, _choose(c, lse, counts, choice)
    out, _, indices = _nsa_ops.nsa_attend(c.q, c.k, c.v, *_rest(c, counts, choice))
    return out, BlockSelection(indices, 1, c.sizes[2])


def _select_requests(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, cu_seqlens: Tensor | None = None, **_: Any
) -> Sequence[Request]:
    cu = cu_seqlens
    p = FlashParams(cu, cu, None, None, None, 1, 1, 1.0, -1, -1, 0.0)
    return [_nsa_ops.request("nsa_select", _nsa_ops.metadata(q, k_cmp, p))]


@explained_by(_select_requests)
def nsa_select(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    top_n: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    slc_block: int = 64,
    seqlen_k: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> BlockSelection:
    """The blocks of tokens that NSA's selected branch reads, one list per query and KV head.

    q [B, Sq, Hq, D] and k_cmp [B, N, Hk, D], or packed, with sizes and lengths as
    ``compressed_attention`` takes them; lse: what it returned, [B, Hq, Sq] or [Hq, T].
    top_n: blocks of a list, the forced ones among them: the first ``init_blocks`` and the last
    ``local_blocks`` up to the query's own. The others are those of the largest importance; of
    equal ones the block further right wins, and a block that got no probability still goes before
    none. A query takes all blocks that begin at or before it if these are fewer than top_n.

    Returns a BlockSelection with q_block 1 and indices [B, Hk, Sq, top_n] (packed [Hk, T, top_n]),
    ascending, -1 behind. Not differentiable. The scores of a few queries are held at a time: no
    S x N buffer in the C++ and Triton kernels. Flops: 2 D per query, query head and visible window.
    """
    _check_counts(_SELECT, top_n, init_blocks, local_blocks)
    c = compressed_problem(
        _SELECT, q, k_cmp, k_cmp, (cmp_block, cmp_stride, slc_block), seqlen_k, cu_seqlens,
        cu_seqlens_k, softmax_scale,
    )  # fmt: skip
    tensor(_SELECT, "lse", lse)
    *batch, rows, heads, _ = c.q.shape
    if tuple(lse.shape) != (*batch, heads, rows):
        fail(_SELECT, f"lse has shape {_shape(lse)}; want {(*batch, heads, rows)}")
    counts = (top_n, init_blocks, local_blocks)
    return _choose(c, lse.to(_flash_ops._stat_dtype(c.q.dtype)), counts, _choice(_SELECT, backend))


def _window_branch(
    q: Tensor, k: Tensor, v: Tensor, window: int, used: Tensor | None, cu: Any, **options: Any
) -> Tensor:
    options |= {"causal": True, "window_size": (window - 1, 0), "seqused_k": used}
    cu_q, cu_k = cu
    if cu_q is None:
        out: Tensor = flash_attention(q, k, v, **options)
    else:
        out = flash_attention_varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    return out


_FEW_ROWS = 8


def _decodes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the selected branch reads single blocks: few rows of a cache and no gradient."""
    few = cu_seqlens is None and q.shape[1] <= _FEW_ROWS and k.shape[1] > 0
    return few and not needs_grad(q, k, v, None)


def _nsa_requests(
    q: Tensor, k_cmp: Tensor | None, v_cmp: Any, k_slc: Tensor, v_slc: Tensor, *_: Any,
    cu_seqlens: Tensor | None = None, **__: Any,
) -> Sequence[Request]:  # fmt: skip
    cu = cu_seqlens
    p = FlashParams(cu, cu, None, None, None, 1, 1, 1.0, -1, 0, 0.0)
    meta = _flash_ops.metadata(q, v_slc, p)
    names: tuple[str, ...] = ("flash_fwd", "flash_bwd", "block_sparse_fwd", "block_sparse_bwd")
    if _decodes(q, k_slc, v_slc, cu):
        names = names[:1]
    found = [_flash_ops.request(name, meta) for name in names]
    if len(names) == 1:
        dims = (q.shape[-1], v_slc.shape[-1], q.shape[-2] // k_slc.shape[-2])
        found.append(_paged_ops.request("paged_fwd", (q.device, q.dtype, dims, ())))
    p = p._replace(window_right=-1)
    if _takes_attend(q, k_slc, v_slc, p, None):
        found.append(_nsa_ops.request("nsa_attend", _nsa_ops.metadata(q, v_slc, p)))
    return [*found, _nsa_ops.request("nsa_select", _nsa_ops.metadata(q, k_slc, p))]


@explained_by(_nsa_requests)
def nsa_attention(
    q: Tensor,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor | None,
    v_win: Tensor | None,
    gates: Tensor,
    *,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    slc_block: int = 64,
    top_n: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window: int = 512,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    return_selection: bool = False,
    backend: str | None = None,
) -> Any:
    """Native sparse attention, causal: three branches and their gates.

    q [B, Sq, Hq, D]; its rows are the last of the context. k_cmp, v_cmp [B, N, Hk, ..]: compressed
    keys and values, as of ``nn.NativeSparseAttention``, or None for the means of k_slc and v_slc.
    k_slc, v_slc [B, Sk, Hk, ..]: tokens of the selected branch; k_win, v_win: of the window branch,
    the last Sw <= Sk tokens, or None for those of the selected one. Packed: [T, H, ..] with
    cu_seqlens (and cu_seqlens_k, where queries are fewer than tokens).
    gates [B, Sq, Hq, 3]: weights of the branches compressed, selected, window (after the sigmoid).
    cache_seqlens: int32 [B], the tokens in use of k_slc, for caches of fixed size; of k_win too if
        it has as many slots, else all of k_win is in use.
    window: keys that a query sees in that branch, itself among them. Sizes and top_n: see
    ``nsa_select``; all defaults are the paper's.

    Returns out [B, Sq, Hq, Dv], with return_selection also the BlockSelection. Differentiable in
    q, all keys and values and the gates; the choice of blocks is not. Work per query and head:
    2 (D + Dv) (t / cmp_stride + top_n * slc_block + window) flops, and 2 D t / cmp_stride for the
    choice.
    """
    for name, x in (("q", q), ("k_slc", k_slc), ("v_slc", v_slc), ("gates", gates)):
        tensor(_NSA, name, x)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        fail(_NSA, f"window is {window!r}; want an int >= 1: a query sees itself")
    if (k_win is None) != (v_win is None) or (k_cmp is None) != (v_cmp is None):
        fail(_NSA, "keys and values of a branch go together; got one of them; pass both or None")
    _check_counts(_NSA, top_n, init_blocks, local_blocks)
    if cache_seqlens is not None and cu_seqlens is not None:
        fail(_NSA, "cache_seqlens is for batched calls; packed lengths are those of cu_seqlens_k")
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if k_cmp is None or v_cmp is None:
        room = None if cu_k is None else k_slc.shape[0] // max(1, cmp_stride)
        pooled = [
            pool_blocks(x, block=cmp_block, stride=cmp_stride, cu_seqlens=cu_k, total_blocks=room)
            for x in (k_slc, v_slc)
        ]
        k_cmp, v_cmp = (x if cu_k is None else x[0] for x in pooled)
    if k_win is None or v_win is None:
        k_win, v_win = k_slc, v_slc
    tokens: int | Tensor | None = None
    if cu_seqlens is None:
        tokens = k_slc.shape[1] if cache_seqlens is None else cache_seqlens
    sizes = (cmp_block, cmp_stride, slc_block)
    c = compressed_problem(
        _NSA, q, k_cmp, v_cmp, sizes, tokens, cu_seqlens, cu_seqlens_k, softmax_scale
    )
    choice = _choice(_NSA, backend)
    o_cmp, selection = _compressed_branch(c, (top_n, init_blocks, local_blocks), choice)
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "backend": backend}
    if _decodes(q, k_slc, v_slc, cu_seqlens):
        o_slc = block_sparse_decode(
            q, k_slc, v_slc, selection, cache_seqlens=cache_seqlens, **options
        )
    else:
        o_slc = block_sparse_attention(
            q, k_slc, v_slc, selection, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_k,
            seqused_k=cache_seqlens, **options,
        )  # fmt: skip
    cu = (cu_seqlens, cu_k)
    used = cache_seqlens if k_win.shape[1] == k_slc.shape[1] else None
    o_win = _window_branch(q, k_win, v_win, window, used, cu, **options)
    out = gated_combine((o_cmp, o_slc, o_win), gates)
    return (out, selection) if return_selection else out
