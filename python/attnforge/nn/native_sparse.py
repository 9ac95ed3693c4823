"""Native sparse attention as a layer: projections per branch, learned compression, gates, a cache.

Yuan et al., 2025 (arXiv 2502.11089).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from attnforge.nn._cache import TokenCache
from attnforge.nn._rope import rotated
from attnforge.ops._checks import _shape, fail
from attnforge.ops.nsa import nsa_attention
from attnforge.ops.pooling import pooled_lengths

__all__ = ["BlockCompression", "MeanCompression", "NSACache", "NativeSparseAttention"]

_OP = "nn.NativeSparseAttention"
_GELU_GAIN = 1.7  # gelu(x) of a standard normal x has a standard deviation of 1 / 1.7


def _windows(x: Tensor, block: int, stride: int, starts: Tensor | None) -> Tensor:
    """x [B, T, H, D] -> [B, N, H, block, D]; starts [N]: first tokens of the windows, of packed x
    [T, H, D] -> [N, H, block, D]."""
    if starts is not None:
        at = starts[:, None] + torch.arange(block, device=x.device)
        return x[at].transpose(1, 2)
    if x.shape[1] < block:
        return x[:, :0].unsqueeze(3).expand(-1, -1, -1, block, -1)
    return x.unfold(1, block, stride).transpose(-1, -2)


class MeanCompression(nn.Module):
    """Windows of tokens by their means, which is what fla's layer has: no parameters.

    A window's score is then a mean of the scores of its tokens, so that queries that have learnt to
    find a token find its block.
    """

    def __init__(self, block: int, stride: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride

    def forward(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """x [B, T, H, D] -> [B, N, H, D]; starts as for ``BlockCompression``."""
        return _windows(x, self.block, self.stride, starts).mean(-2)


class BlockCompression(nn.Module):
    """Learned compression of windows of tokens: an MLP over their channels and places.

    y_i = W_2 gelu(W_1 [x_id + e_0, ..., x_{id+l-1} + e_{l-1}]), one for all heads

    W_1 and W_2 begin such that windows vary as their tokens do: with torch's own initialization
    compressed keys are alike at first, and a branch that cannot tell windows apart may stay idle.
    """

    def __init__(self, dim: int, block: int, stride: int, expansion: int = 1) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.position = nn.Parameter(torch.randn(block, dim) * 0.02)
        mixed, out = nn.Linear(block * dim, expansion * dim), nn.Linear(expansion * dim, dim)
        for layer, gain in ((mixed, 1.0), (out, _GELU_GAIN)):
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(mixed, nn.GELU(), out)

    def forward(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """x [B, T, H, D] -> [B, N, H, D]; starts [N]: first tokens of the windows, of packed x
        [T, H, D] -> [N, H, D]."""
        windows = _windows(x, self.block, self.stride, starts)
        out: Tensor = self.mlp((windows + self.position).flatten(-2))
        return out


class NSACache(TokenCache):
    """What decoding keeps: tokens of the selected branch, compressed ones, the last window."""

    def __init__(self) -> None:
        super().__init__()
        self.compressed = 0

    def extended(self, name: str, new: Tensor) -> Tensor:
        """The tail with ``new`` behind it."""
        old = self._tails.get(name)
        return new if old is None else torch.cat([old, new], 1)


class NativeSparseAttention(nn.Module):
    """x [B, T, hidden_size] -> [B, T, hidden_size], causal: NSA with keys and values per branch.

    num_heads, num_kv_heads: query heads, a multiple of the KV heads that share lists of blocks.
    head_dim, v_head_dim: channels of keys and values (default: hidden_size / num_heads, head_dim).
    cmp_block, cmp_stride, slc_block, top_n, window: as in ``nsa_attention``; the paper's by
        default.
    rope_base: queries and keys are rotated at the positions of their tokens, compressed keys at
        that of their first one, after compression; None: no rotation.
    share_kv: one key and value projection for all branches, as most public code has it; the paper
        and the default have one each.
    compression: of the windows, "mlp" (``BlockCompression``, the paper's) or "mean"
        (``MeanCompression``, fla's). From scratch, means with share_kv learn what to select sooner.
    expansion: of the MLP's hidden channels over head_dim.

    Gates are sigmoids of a projection of x, one per head and branch. With ``cache`` the call goes
    on where the last one ended, be it for a prompt or for a token, without gradients. cu_seqlens:
    int32 [N + 1] boundaries of sequences packed into a batch of one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        cmp_block: int = 32,
        cmp_stride: int = 16,
        slc_block: int = 64,
        top_n: int = 16,
        window: int = 512,
        rope_base: float | None = 10000.0,
        share_kv: bool = False,
        expansion: int = 1,
        compression: str = "mlp",
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            fail(_OP, f"num_heads is {num_heads}; want a multiple of num_kv_heads = {num_kv_heads}")
        if head_dim is None:
            if hidden_size % num_heads:
                fail(_OP, f"hidden_size is {hidden_size}; want a multiple of {num_heads} heads, or "
                          "head_dim given")  # fmt: skip
            head_dim = hidden_size // num_heads
        if compression not in ("mlp", "mean"):
            fail(_OP, f"compression is {compression!r}; want 'mlp' or 'mean'")
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self.rope_base, self.branches = rope_base, 1 if share_kv else 3
        self.options: dict[str, int] = {
            "cmp_block": cmp_block, "cmp_stride": cmp_stride, "slc_block": slc_block,
            "top_n": top_n, "window": window,
        }  # fmt: skip
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        keys, values = (num_kv_heads * dim * self.branches for dim in (head_dim, v_head_dim))
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.gate_proj = nn.Linear(hidden_size, 3 * num_heads, bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)
        self.compress_k, self.compress_v = (
            MeanCompression(cmp_block, cmp_stride) if compression == "mean" else
            BlockCompression(dim, cmp_block, cmp_stride, expansion)
            for dim in (head_dim, v_head_dim)
        )  # fmt: skip

    def _branches(self, x: Tensor, dim: int) -> list[Tensor]:
        """[B, T, branches * Hk * dim] -> the three branches' [B, T, Hk, dim]."""
        parts = x.view(*x.shape[:-1], self.branches, self.num_kv_heads, dim).unbind(-3)
        return list(parts) if self.branches == 3 else [parts[0]] * 3

    def _compress(self, k: Tensor, v: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Compressed keys, rotated, and values; the first of them has number ``first``."""
        k, v = self.compress_k(k), self.compress_v(v)
        at = (torch.arange(k.shape[1], device=k.device) + first) * self.options["cmp_stride"]
        return rotated(k, at, self.rope_base), v

    def _packed(self, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The same of packed sequences [1, T, Hk, D]; reads their boundaries."""
        block, stride = self.options["cmp_block"], self.options["cmp_stride"]
        pairs = list(itertools.pairwise(cu_seqlens.tolist()))
        each = [pooled_lengths(b - a, block, stride) for a, b in pairs]
        number = torch.cat([torch.arange(n) for n in each] or [torch.arange(0)]) * stride
        first = torch.tensor([a for a, _ in pairs], dtype=torch.int64)
        first = first.repeat_interleave(torch.tensor(each, dtype=torch.int64))
        number, starts = number.to(k.device), (first + number).to(k.device)
        k = rotated(self.compress_k(k[0], starts), number, self.rope_base)
        return k, self.compress_v(v[0], starts)

    def forward(
        self,
        x: Tensor,
        *,
        cache: NSACache | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            fail(_OP, f"x has shape {_shape(x)}; want [batch, time, {self.hidden_size}]")
        if cu_seqlens is not None and (cache is not None or x.shape[0] != 1):
            fail(_OP, "cu_seqlens packs sequences into a batch of one, without a cache")
        gates = self.gate_proj(x).unflatten(-1, (self.num_heads, 3)).sigmoid()
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self._branches(self.k_proj(x), self.head_dim)
        v = self._branches(self.v_proj(x), self.v_head_dim)
        start = 0 if cache is None else cache.length
        at = torch.arange(start, start + x.shape[1], device=x.device)
        if cu_seqlens is not None:
            ends = cu_seqlens[1:].long().contiguous()
            which = torch.searchsorted(ends, at, right=True).clamp_max(ends.numel() - 1)
            at = at - cu_seqlens[which]
        q = rotated(q, at, self.rope_base)
        k_slc = rotated(k[1], at, self.rope_base)
        k_win = k_slc if self.branches == 1 else rotated(k[2], at, self.rope_base)
        options: dict[str, Any] = {**self.options, "backend": backend}
        if cache is not None:
            out = self._cached(cache, q, k[0], v, k_slc, k_win, gates, options)
        elif cu_seqlens is None:
            k_cmp, v_cmp = self._compress(k[0], v[0])
            out = nsa_attention(q, k_cmp, v_cmp, k_slc, v[1], k_win, v[2], gates, **options)
        else:
            k_cmp, v_cmp = self._packed(k[0], v[0], cu_seqlens)
            rows = (y[0] for y in (k_slc, v[1], k_win, v[2], gates))
            out = nsa_attention(q[0], k_cmp, v_cmp, *rows, cu_seqlens=cu_seqlens, **options)[None]
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def _cached(
        self,
        cache: NSACache,
        q: Tensor,
        k_raw: Tensor,
        v: list[Tensor],
        k_slc: Tensor,
        k_win: Tensor,
        gates: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            fail(_OP, "cache serves inference; got a call that would need a backward; want "
                      "torch.no_grad()")  # fmt: skip
        stride, block, window = (
            self.options[n] for n in ("cmp_stride", "slc_block", "window")
        )  # fmt: skip
        # Tokens that windows to come still need: those from the next window's first one on.
        tail_k, tail_v = cache.extended("k", k_raw), cache.extended("v", v[0])
        new_k, new_v = self._compress(tail_k, tail_v, cache.compressed)
        used = cache.compressed
        k_cmp = cache.append("k_cmp", used, new_k, block)
        v_cmp = cache.append("v_cmp", used, new_v, block)
        cache.compressed += new_k.shape[1]
        passed = new_k.shape[1] * stride
        cache._tails["k"], cache._tails["v"] = tail_k[:, passed:], tail_v[:, passed:]
        k_tokens = cache.append("k_slc", cache.length, k_slc, block)
        v_tokens = cache.append("v_slc", cache.length, v[1], block)
        near_k, near_v = cache.extended("k_win", k_win), cache.extended("v_win", v[2])
        cache.length += q.shape[1]
        keep = max(0, near_k.shape[1] - (window - 1))
        cache._tails["k_win"], cache._tails["v_win"] = near_k[:, keep:], near_v[:, keep:]
        lengths = torch.full((q.shape[0],), cache.length, dtype=torch.int32, device=q.device)
        out: Tensor = nsa_attention(
            q, k_cmp[:, : cache.compressed], v_cmp[:, : cache.compressed], k_tokens, v_tokens,
            near_k, near_v, gates, cache_seqlens=lengths, **options,
        )  # fmt: skip
        return out
