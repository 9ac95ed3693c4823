"""Attention to compressed keys, NSA's coarse view of the context, and the importance of blocks.

Key i of the compressed sequence stands for tokens [i d, i d + l) and is seen by the queries at or
after its last token. So it is flash attention in which each row sees the first
``floor((t + 1 - l) / d) + 1`` keys; the importance of blocks of tokens comes from its
probabilities, tile by tile.

Yuan et al., 2025 (arXiv 2502.11089), equations 7 to 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashMods, FlashParams
from attnforge.ops import _flash_ops, _nsa_ops
from attnforge.ops._checks import _index, _shape, fail
from attnforge.ops._flash_autograd import attend
from attnforge.ops.flash import _choice, _dense, _varlen
from attnforge.ops.pooling import pooled_lengths
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["CompressedProblem", "compressed_attention", "compressed_problem"]


class CompressedProblem(NamedTuple):
    """Checked arguments of the functions over compressed keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    p: FlashParams  # row bounds among its mods: which compressed keys a row sees
    positions: Tensor  # int32 [B | 1, Sq], packed [T]: places of the queries among the tokens
    tokens: int  # an upper bound of the tokens of a sequence, tight if their number is an int
    sizes: tuple[int, int, int]  # cmp_block, cmp_stride, slc_block


def check_sizes(op: str, cmp_block: int, cmp_stride: int, slc_block: int) -> None:
    """The three sizes of NSA: d divides l and l'."""
    sizes = {"cmp_block": cmp_block, "cmp_stride": cmp_stride, "slc_block": slc_block}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fail(op, f"{name} is {value!r}; want an int >= 1")
    for name in ("cmp_block", "slc_block"):
        if sizes[name] % cmp_stride:
            fail(op, f"{name} is {sizes[name]}; want a multiple of cmp_stride = {cmp_stride}")


def _packed_positions(rows: int, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """int32 [T]: places of packed queries among the tokens, bottom-right aligned."""
    row = torch.arange(rows, device=cu_q.device)
    if cu_q.shape[0] < 2:
        return row.int()
    sequence = torch.searchsorted(cu_q[1:].long().contiguous(), row, right=True)
    sequence = sequence.clamp_max(cu_q.shape[0] - 2)
    shift = (cu_k[1:] - cu_k[:-1]) - (cu_q[1:] - cu_q[:-1]) - cu_q[:-1]
    return (row + shift[sequence]).int()


def _key_limit(positions: Tensor, cmp_block: int, cmp_stride: int) -> Tensor:
    """int32: compressed keys that end at or before each position."""
    past = positions + 1 - cmp_block
    return (past.div(cmp_stride, rounding_mode="floor") + 1).clamp_min(0).int()


def compressed_problem(
    op: str,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    sizes: tuple[int, int, int],
    seqlen_k: int | Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float | None,
) -> CompressedProblem:
    """Check the arguments that functions over compressed keys share; see compressed_attention."""
    check_sizes(op, *sizes)
    block, stride, _ = sizes
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            fail(op, "cu_seqlens_k comes with cu_seqlens; got it alone; pass both")
        q, k, v, p = _dense(op, q, k_cmp, v_cmp, "seqused_k", None, softmax_scale=softmax_scale)
        rows = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)
        if isinstance(seqlen_k, Tensor):
            _index(op, "seqlen_k", seqlen_k, q, q.shape[0])
            positions = rows + (seqlen_k - q.shape[1]).unsqueeze(1)
            tokens = k.shape[1] * stride + block - 1
        else:
            tokens = q.shape[1] if seqlen_k is None else seqlen_k
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                fail(op, f"seqlen_k is {seqlen_k!r}; want an int >= 0 or int32 [batch]")
            want = pooled_lengths(tokens, block, stride)
            if k.shape[1] < want:
                fail(
                    op,
                    f"k_cmp has shape {_shape(k)}; want at least {want} compressed keys: "
                    f"{tokens} tokens in blocks of {block} with stride {stride}",
                )
            positions = (rows + (tokens - q.shape[1])).unsqueeze(0)
    else:
        if seqlen_k is not None:
            fail(op, "seqlen_k is for batched calls; packed lengths are those of cu_seqlens_k")
        cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        counts = pooled_lengths(cu_k.diff(), block, stride)
        cu_cmp = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        q, k, v, p = _varlen(
            q, k_cmp, v_cmp, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_cmp,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        positions = _packed_positions(q.shape[0], cu_seqlens, cu_k)
        tokens = k.shape[0] * stride + block - 1
    limit = _key_limit(positions, block, stride).clamp_max(k.shape[-3]).unsqueeze(-2)
    bounds = torch.stack((torch.zeros_like(limit), limit), -1)
    p = p._replace(mods=tuple(FlashMods(row_bounds=bounds)))
    return CompressedProblem(q, k, v, p, positions, tokens, sizes)


def importance(c: CompressedProblem, lse: Tensor, blocks: int, choice: str | None) -> Tensor:
    """The operator ``nsa_importance`` of a problem."""
    p = c.p
    out: Tensor = _nsa_ops.nsa_importance(
        c.q.detach(), c.k.detach(), lse.detach(), c.positions, *p[:3], *p[5:8], *c.sizes, blocks,
        choice,
    )  # fmt: skip
    return out


def _requests(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    slc_block: int = 64,
    seqlen_k: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    return_importance: bool = False,
) -> Sequence[Request]:
    sizes = (cmp_block, cmp_stride, slc_block)
    c = compressed_problem(
        "compressed_attention", q, k_cmp, v_cmp, sizes, seqlen_k, cu_seqlens, cu_seqlens_k,
        softmax_scale,
    )  # fmt: skip
    meta = _flash_ops.metadata(c.q, c.v, c.p)
    found = [_flash_ops.request(op, meta) for op in ("flash_fwd", "flash_bwd")]
    found = [replace(r, sizes=()) for r in found]
    if return_importance:
        meta = _nsa_ops.metadata(c.q, c.k, c.p._replace(mods=()))
        found.append(_nsa_ops.request("nsa_importance", meta))
    return found


@explained_by(_requests)
def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    slc_block: int = 64,
    seqlen_k: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    return_importance: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of queries to compressed keys that lie wholly at or before them.

    q [B, Sq, Hq, D], k_cmp [B, N, Hk, D], v_cmp [B, N, Hk, Dv]: compressed key i stands for tokens
    [i * cmp_stride, i * cmp_stride + cmp_block), as ``pool_blocks`` makes them. Packed: q
    [T, Hq, D] with cu_seqlens, k_cmp and v_cmp of the sequences one after another.
    seqlen_k: tokens of the context, an int or int32 [B] (default: Sq); the queries are its last.
        Packed calls give cu_seqlens_k, boundaries in tokens (default: cu_seqlens).
    slc_block: tokens of a block of the importance. cmp_stride divides both blocks.

    Returns out [B, Sq, Hq, Dv], with return_lse also the LSE [B, Hq, Sq], with return_importance
    also the importance fp32 [B, Hk, Sq, ceil(tokens / slc_block)] (packed [Hk, T, ..] by the
    longest sequence, which is read on the host): for each
    query the probability on the windows of a block, each window by the strides that it shares
    with the block, summed over the query heads of a KV head. Sources: NSA, equations 9 and 10,
    read so that block j counts the windows that overlap it. A query before the first whole window
    gives 0, an LSE of -inf and importance 0.

    out and LSE are differentiable; the importance is not. ``nsa_select`` chooses blocks without
    this S x N output. Flops are 2 (D + Dv) per query and visible window.
    """
    op = "compressed_attention"
    sizes = (cmp_block, cmp_stride, slc_block)
    c = compressed_problem(
        op, q, k_cmp, v_cmp, sizes, seqlen_k, cu_seqlens, cu_seqlens_k, softmax_scale
    )
    choice = _choice(op, backend)
    out, lse = attend(c.q, c.k, c.v, c.p, choice)
    results = [out, lse] if return_lse else [out]
    if return_importance:
        tokens, cu = c.tokens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        if cu is not None:
            tokens = int(cu.diff().max()) if cu.shape[0] > 1 else 0
        results.append(importance(c, lse, -(-tokens // slc_block), choice))
    return tuple(results) if len(results) > 1 else out
