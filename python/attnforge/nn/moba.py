"""Mixture of block attention as a layer, with a decode cache of block means.

Lu et al., 2025 (arXiv 2502.13189).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnforge.nn._cache import TokenCache
from attnforge.nn._rope import rotated
from attnforge.ops._checks import _shape, fail
from attnforge.ops.block_sparse import block_sparse_attention
from attnforge.ops.block_sparse_decode import block_sparse_decode
from attnforge.ops.moba import moba_attention, moba_select

__all__ = ["MoBA", "MoBACache"]

_OP = "nn.MoBA"
_FEW_ROWS = 8


class MoBACache(TokenCache):
    """What decoding keeps: keys, values and the sum of the keys of each block."""

    def add(self, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Appends tokens; the buffers of k and v, and the means [B, blocks, Hk, D] of all."""
        first = self.length // block
        keys = self.append("k", self.length, k, block)
        values = self.append("v", self.length, v, block)
        start, self.length = self.length, self.length + k.shape[1]
        blocks = -(-self.length // block)
        at = torch.arange(start, self.length, device=k.device) // block - first
        wide = torch.promote_types(k.dtype, torch.float32)
        sums = k.new_zeros((k.shape[0], blocks - first, *k.shape[2:]), dtype=wide)
        sums.index_add_(1, at, k.to(sums.dtype))
        if start % block:
            sums[:, 0] += self._buffers["sums"][:, first]
        total = self.append("sums", first, sums, 1)[:, :blocks]
        count = torch.full((blocks,), block, device=k.device)
        count[-1] = self.length - (blocks - 1) * block
        return keys, values, total / count.view(-1, 1, 1)


class MoBA(nn.Module):
    """x [B, T, hidden_size] -> [B, T, hidden_size], causal: MoBA between projections.

    num_heads, num_kv_heads: query heads, each with a choice of its own, and KV heads.
    block_size, top_k: as in ``moba_attention``; the paper's by default. The gate has no parameters,
    so a layer of dense attention with these projections can be run as this one and back.
    rope_base: queries and keys are rotated before the gate sees them; None: no rotation.

    With ``cache`` the call goes on where the last one ended, be it for a prompt or for a token,
    without gradients; few tokens then read the chosen blocks and the means of the others alone.
    cu_seqlens: int32 [N + 1] boundaries of sequences packed into a batch of one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        block_size: int = 512,
        top_k: int = 3,
        rope_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            fail(_OP, f"num_heads is {num_heads}; want a multiple of num_kv_heads = {num_kv_heads}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self.block_size, self.top_k, self.rope_base = block_size, top_k, rope_base
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        cache: MoBACache | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            fail(_OP, f"x has shape {_shape(x)}; want [batch, time, {self.hidden_size}]")
        if cu_seqlens is not None and (cache is not None or x.shape[0] != 1):
            fail(_OP, "cu_seqlens packs sequences into a batch of one, without a cache")
        start = 0 if cache is None else cache.length
        at = torch.arange(start, start + x.shape[1], device=x.device)
        if cu_seqlens is not None:
            ends = cu_seqlens[1:].long().contiguous()
            which = torch.searchsorted(ends, at, right=True).clamp_max(ends.numel() - 1)
            at = at - cu_seqlens[which]
        q = rotated(self.q_proj(x).unflatten(-1, (self.num_heads, -1)), at, self.rope_base)
        k = rotated(self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1)), at, self.rope_base)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        sizes: dict[str, Any] = {"block_size": self.block_size, "top_k": self.top_k}
        if cache is not None:
            out = self._cached(cache, q, k, v, sizes, backend)
        elif cu_seqlens is None:
            out = moba_attention(q, k, v, **sizes, backend=backend)
        else:
            packed = (y[0] for y in (q, k, v))
            out = moba_attention(*packed, **sizes, cu_seqlens=cu_seqlens, backend=backend)[None]
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def _cached(
        self,
        cache: MoBACache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sizes: dict[str, Any],
        backend: str | None,
    ) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            fail(_OP, "cache serves inference; got a call that would need a backward; want "
                      "torch.no_grad()")  # fmt: skip
        keys, values, means = cache.add(k, v, self.block_size)
        used = keys[:, : cache.length], values[:, : cache.length]
        lists = moba_select(q, used[0], **sizes, means=means)
        out: Tensor
        if q.shape[1] > _FEW_ROWS:
            out = block_sparse_attention(q, *used, lists, backend=backend)
        else:
            lengths = torch.full((q.shape[0],), cache.length, dtype=torch.int32, device=q.device)
            out = block_sparse_decode(
                q, keys, values, lists, cache_seqlens=lengths, backend=backend
            )
        return out
