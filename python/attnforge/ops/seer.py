"""SeerAttention: a learned gate scores blocks, attention reads the best; and how the gate learns.

    prefill   one list per query block and query head, blocks kept by probability or by rank
    decode    one list per token and KV head, a budget of blocks (SeerAttention-R)
    target    the largest attention probability of each block, rows divided by their sums

Gao et al., 2024 (arXiv 2410.13276) and 2025 (arXiv 2506.08889). The gate itself is a module,
``nn.SeerAttentionGate``; here are the functions of its scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.ops import reductions
from attnforge.ops._checks import _shape, fail, tensor
from attnforge.ops._flash_autograd import needs_grad
from attnforge.ops.block_sparse import block_sparse_attention
from attnforge.ops.block_sparse_decode import block_sparse_decode
from attnforge.ops.selection import BlockSelection, top_blocks

__all__ = ["seer_attention", "seer_loss", "seer_select", "seer_targets", "visible_blocks"]

_SELECT = "seer_select"
_FEW_ROWS = 8


def visible_blocks(
    rows: int, blocks: int, q_block: int, block_size: int, offset: int | Tensor, device: Any
) -> Tensor:
    """bool [B | 1, 1, rows, blocks]: blocks that the last query of a row may see some key of.

    offset: the key position of query 0, an int or [B].
    """
    last = torch.arange(1, rows + 1, device=device) * q_block - 1
    if isinstance(offset, Tensor):
        last = last + offset[:, None].to(device)
    else:
        last = (last + offset).unsqueeze(0)
    first = torch.arange(blocks, device=device) * block_size
    return (first <= last.unsqueeze(-1)).unsqueeze(1)


def _budget(top_k: int | None, nz_ratio: float | None, blocks: int) -> int | None:
    """Blocks that a gate may keep of each row; None: as many as are above a threshold."""
    if nz_ratio is not None:
        if not 0 < nz_ratio <= 1:
            fail(_SELECT, f"nz_ratio is {nz_ratio!r}; want 0 < nz_ratio <= 1")
        return max(1, int((1 - (1 - nz_ratio) ** 0.5) * blocks))
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        fail(_SELECT, f"top_k is {top_k!r}; want an int >= 1")
    return top_k


def _keep(scores: Tensor, visible: Tensor, threshold: float | None, budget: int | None) -> Tensor:
    """bool like scores: blocks that the gate keeps, by exactly one of threshold and budget."""
    masked = scores.float().masked_fill(~visible, -torch.inf)
    if budget is None:
        assert threshold is not None
        return (masked.softmax(-1) > threshold) & visible
    masked = torch.where(masked.isnan(), -torch.inf, masked)
    ids = top_blocks(masked, min(budget, scores.shape[-1])).long()
    blocks = scores.shape[-1]
    mask = torch.zeros(*scores.shape[:-1], blocks + 1, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, torch.where(ids >= 0, ids, blocks), True)[..., :blocks]


def seer_select(
    gate_scores: Tensor,
    *,
    block_size: int = 64,
    q_block: int | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    nz_ratio: float | None = None,
    dense_rows: int | None = None,
    init_blocks: int | None = None,
    local_blocks: int | None = None,
    seqlen_q: int | None = None,
    seqlen_k: int | Tensor | None = None,
) -> BlockSelection:
    """The blocks that a gate's scores keep, causal.

    gate_scores: [B, H, R, N], logits of N key blocks for R blocks of q_block queries. q_block:
        block_size (default), the prefill form, or 1, the decode form of SeerAttention-R.
    Exactly one of
    threshold: keeps blocks whose softmax over the visible ones is above it.
    top_k: keeps so many per row; of equal scores the block further right wins.
    nz_ratio: the top_k that makes a causal mask of about this density, (1 - sqrt(1 - r)) N.
    dense_rows: the last so many rows see everything (default: 2 of a prefill, as the public code
        has it, 0 of a decode).
    init_blocks, local_blocks: the first blocks, and the last up to the query's own, are kept
        beside those of the gate (default: 0 of a prefill, 1 of a decode: the incomplete last block
        has no score there).
    seqlen_q, seqlen_k: lengths in tokens, seqlen_k also int32 [B] (default: R q_block and
        N block_size); queries are the last of the keys.

    Returns a BlockSelection with lists [B, H, R, slots], ascending. A row that keeps nothing gives
    0 and an LSE of -inf. Where top_k bounds all rows (no dense ones) nothing is read on the host;
    else the size of the fullest row is, and a GPU is waited for.
    """
    tensor(_SELECT, "gate_scores", gate_scores)
    if gate_scores.dim() != 4:
        fail(
            _SELECT,
            f"gate_scores has shape {_shape(gate_scores)}; want [batch, heads, rows, blocks]",
        )
    if sum(x is not None for x in (threshold, top_k, nz_ratio)) != 1:
        fail(_SELECT, "want exactly one of threshold, top_k and nz_ratio; pass one of them")
    q_block = block_size if q_block is None else q_block
    decode = q_block == 1 and block_size != 1
    dense = (0 if decode else 2) if dense_rows is None else dense_rows
    init = (1 if decode else 0) if init_blocks is None else init_blocks
    local = (1 if decode else 0) if local_blocks is None else local_blocks
    scores = gate_scores.detach()
    rows, blocks = scores.shape[-2:]
    seqlen_q = rows * q_block if seqlen_q is None else seqlen_q
    keys: int | Tensor = blocks * block_size if seqlen_k is None else seqlen_k
    at = keys - seqlen_q
    visible = visible_blocks(rows, blocks, q_block, block_size, at, scores.device)
    most = _budget(top_k, nz_ratio, blocks)
    keep = _keep(scores, visible, threshold, most)
    column = torch.arange(blocks, device=scores.device)
    own = visible.sum(-1, keepdim=True) - 1
    keep |= (column < init) | ((column > own - local) & (column <= own))
    keep[..., max(0, rows - dense) :, :] |= dense > 0
    slots = None
    if most is not None and dense == 0:
        slots = max(1, min(blocks, most + init + local))
    return BlockSelection.from_mask(
        keep & visible, q_block=q_block, kv_block=block_size, slots=slots
    )


def seer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_scores: Tensor,
    *,
    block_size: int = 64,
    threshold: float | None = None,
    top_k: int | None = None,
    nz_ratio: float | None = None,
    dense_rows: int | None = None,
    init_blocks: int | None = None,
    local_blocks: int | None = None,
    cache_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Causal attention over the blocks that a gate keeps: ``seer_select``, then attention.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]. gate_scores: [B, Hq or Hk,
    ceil(Sq / block_size), N] of a prefill, or [B, Hk, Sq, N] with one row per query, the decode
    form; N = ceil(Sk / block_size). cache_seqlens: int32 [B], the keys in use.

    Returns out, or (out, lse), as ``block_sparse_attention``; differentiable in q, k and v, not in
    the scores (the gate learns by ``seer_loss``). Few rows of the decode form without a gradient
    read the kept blocks alone.
    """
    op = "seer_attention"
    tensor(op, "gate_scores", gate_scores)
    prefill = -(-q.shape[1] // block_size)
    rows = gate_scores.shape[-2] if gate_scores.dim() == 4 else -1
    if rows not in (prefill, q.shape[1]):
        fail(
            op,
            f"gate_scores has shape {_shape(gate_scores)}; want [batch, heads, {prefill} or "
            f"{q.shape[1]}, blocks]: a row per query block or per query",
        )
    decode = rows == q.shape[1] and (rows != prefill or q.shape[1] == 1)
    selection = seer_select(
        gate_scores, block_size=block_size, q_block=1 if decode else block_size,
        threshold=threshold, top_k=top_k, nz_ratio=nz_ratio, dense_rows=dense_rows,
        init_blocks=init_blocks, local_blocks=local_blocks, seqlen_q=q.shape[1],
        seqlen_k=k.shape[1] if cache_seqlens is None else cache_seqlens,
    )  # fmt: skip
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale, "return_lse": return_lse, "backend": backend
    }  # fmt: skip
    if decode and q.shape[1] <= _FEW_ROWS and not needs_grad(q, k, v, None):
        return block_sparse_decode(q, k, v, selection, cache_seqlens=cache_seqlens, **options)
    return block_sparse_attention(q, k, v, selection, seqused_k=cache_seqlens, **options)


def seer_targets(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_size: int = 64,
    per_token: bool = False,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """What a gate should say: the largest probability of each block, rows divided by their sums.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D] and the LSE of their attention. Returns fp32
    [B, Hq, ceil(Sq / block_size), ceil(Sk / block_size)]; per_token (SeerAttention-R): [B, Hk, Sq,
    blocks], the largest over the query heads of a KV head. A row without a key is 0. No scratch
    beside the result. Not differentiable.
    """
    top = reductions.block_max(
        q.detach(), k.detach(), lse.detach(), 1 if per_token else block_size, block_size,
        causal=causal, softmax_scale=softmax_scale, backend=backend,
    )  # fmt: skip
    if per_token:
        top = top.view(top.shape[0], k.shape[2], -1, *top.shape[2:]).amax(2)
    return top / (top.sum(-1, keepdim=True) + 1e-9)


def seer_loss(
    gate_scores: Tensor,
    targets: Tensor,
    visible: Tensor | None = None,
    *,
    skip: float = 0.25,
    reduction: str = "mean",
) -> Tensor:
    """KL(targets || softmax(gate_scores)) of the rows behind the first ``skip`` of them.

    gate_scores, targets [B, H, R, N]; visible: bool that broadcasts to them (default: where any
    target is above 0 in some head, which is where blocks are causal). reduction: "mean" divides by
    all elements, as the public code does, "rows" by the rows: the KL itself. The public recipe
    multiplies by 10 and skips 0.25 of a prefill, 0.5 of a decode.
    """
    op = "seer_loss"
    if gate_scores.shape != targets.shape:
        fail(op, f"targets has shape {_shape(targets)}; want {_shape(gate_scores)} like the scores")
    if reduction not in ("mean", "rows"):
        fail(op, f"reduction is {reduction!r}; want 'mean' or 'rows'")
    if not 0 <= skip < 1:
        fail(op, f"skip is {skip!r}; want 0 <= skip < 1")
    first = int(targets.shape[-2] * skip)
    scores, targets = gate_scores[..., first:, :].float(), targets[..., first:, :].detach().float()
    if visible is None:
        visible = (targets > 0).any(1, keepdim=True)
    else:
        visible = visible[..., first:, :]
    log_gate = scores.masked_fill(~visible, -1e9).log_softmax(-1)
    kl = torch.xlogy(targets, targets) - targets * log_gate
    total = kl.sum()
    return total / (kl.numel() if reduction == "mean" else max(1, kl[..., 0].numel()))
