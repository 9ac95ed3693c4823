"""Block-sparse attention: attention over listed blocks of keys, with work that follows the lists.

    O_i = softmax over {j visible, j // kv_block in lists[i // q_block]} of scale * <q_i, k_j>, V

Which blocks is said by a ``BlockSelection``; a selector (MoBA's gate, a static pattern) makes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnforge._params import BlockLists, FlashParams
from attnforge.ops import _block_sparse_ops, _flash_ops
from attnforge.ops._block_sparse_autograd import attend
from attnforge.ops._checks import _shape, fail
from attnforge.ops.flash import _choice, _dense, _varlen
from attnforge.ops.selection import BlockSelection
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["block_sparse_attention"]

_OP = "block_sparse_attention"
Window = tuple[int, int]


def _lists(q: Tensor, k: Tensor, p: FlashParams, selection: Any) -> BlockLists:
    """The selection's lists, if they are those of this problem."""
    if not isinstance(selection, BlockSelection):
        kind = type(selection).__name__
        fail(
            _OP,
            f"selection is {kind}; want an attnforge.BlockSelection; BlockSelection.from_mask "
            "makes one of a bool mask",
            TypeError,
        )
    varlen, s = p.cu_seqlens_q is not None, selection
    if s.packed != varlen:
        want = "[heads, rows, slots]" if varlen else "[batch, heads, rows, slots]"
        fail(_OP, f"selection.indices has shape {_shape(s.indices)}; want {want} for these inputs")
    if s.indices.device != q.device:
        fail(_OP, f"selection is on {s.indices.device}; want {q.device} like q")
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if s.heads not in (1, heads_kv, heads_q):
        fail(
            _OP,
            f"selection has lists for {s.heads} heads; want 1, {heads_kv} (KV heads) or {heads_q} "
            "(query heads)",
        )
    if not varlen:
        if s.indices.shape[0] not in (1, q.shape[0]):
            fail(
                _OP,
                f"selection has batch {s.indices.shape[0]}; want 1 or {q.shape[0]} like q",
            )
        rows = -(-q.shape[1] // s.q_block)
        if s.rows != rows:
            fail(
                _OP,
                f"selection has {s.rows} rows; want {rows}: {q.shape[1]} queries in blocks of "
                f"{s.q_block}",
            )
    return BlockLists(s.indices, s.counts, s.q_block, s.kv_block)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, FlashParams]:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        fail(_OP, "cu_seqlens_q and cu_seqlens_k go together; got one of them; pass both")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense(_OP, q, k, v, "seqused_k", seqused_k, **options)
    return _varlen(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        **options,
    )  # fmt: skip


def _requests(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = True,
    return_lse: bool = False,
    **options: Any,
) -> Sequence[Request]:
    q, k, v, p = _problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, causal=causal, **options)
    meta = _flash_ops.metadata(q, v, p)
    ops = ("block_sparse_fwd", "block_sparse_bwd")
    return [_block_sparse_ops.request(op, meta) for op in ops]


@explained_by(_requests)
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over the blocks of keys that ``selection`` lists.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], or packed [T, H, D] with cu_seqlens_q
    and cu_seqlens_k [B + 1] int32. selection: lists for one, Hk or Hq heads. A key is seen if its
    block is listed and position lets it: causal (bottom-right aligned), window_size, seqused_k
    and the other options mean what they mean for ``flash_attention``.

    Returns out of q's shape with Dv, or (out, lse) with the LSE [B, Hq, Sq] (packed [Hq, T]) fp32
    over the keys seen, differentiable: parts over disjoint lists go together by ``merge_states``.
    A row without a key gives 0, an LSE of -inf and no gradient.

    Raises ValueError or TypeError on arguments that do not fit. Flops are 2 (D + Dv) per row and
    listed key (backward 2.5 times that); memory is linear. The order of the work is that of
    FlashMoBA (Xiao et al., 2025): rows gathered by key block.
    """
    q, k, v, p = _problem(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        softmax_scale=softmax_scale,
    )
    if p.mods:
        fail(_OP, "window_size is a tensor; want two ints; per-head windows go into the lists")
    lists = _lists(q, k, p, selection)
    out, lse = attend(q, k, v, p, lists, _choice(_OP, backend))
    return (out, lse) if return_lse else out
