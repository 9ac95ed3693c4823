"""The learned gate of SeerAttention: scores of key blocks from pooled queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnforge.nn._rope import rotated
from attnforge.ops._checks import fail
from attnforge.ops.pooling import pool_blocks

__all__ = ["SeerAttentionGate"]

_OP = "nn.SeerAttentionGate"


class SeerAttentionGate(nn.Module):
    """q [B, Sq, Hq, D], k [B, Sk, Hk, D] before rotation -> logits of key blocks.

    form "prefill" (Gao et al., 2024): [B, Hq, ceil(Sq / block), ceil(Sk / block)]. Queries are
        means of blocks; with gate_dim = head_dim they are used as they are, else projected.
    form "decode" (SeerAttention-R, 2025): [B, Hk, Sq, ceil(Sk / block)]. Queries are sums of the
        projections of a KV head's query heads, token by token.

    Keys are the maximum, minimum and mean of a block, projected: per query head in the first form
    without a query projection, else per KV head. Queries stand at their block's or own position,
    keys at the first of their block. rope_base: None leaves rotation out. norm: RMS norms of both
    sides. Logits are scaled by 1 / sqrt(gate_dim) and not masked: ``seer_select`` and ``seer_loss``
    know which blocks are visible.

    For decoding keep ``keys(k)`` of whole blocks and call ``scores(q, keys, start)``.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        gate_dim: int | None = None,
        block_size: int = 64,
        form: str = "prefill",
        rope_base: float | None = 10000.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if form not in ("prefill", "decode"):
            fail(_OP, f"form is {form!r}; want 'prefill' or 'decode'")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            fail(_OP, f"num_heads is {num_heads}; want a multiple of num_kv_heads = {num_kv_heads}")
        gate_dim = head_dim if gate_dim is None else gate_dim
        self.num_heads, self.num_kv_heads, self.gate_dim = num_heads, num_kv_heads, gate_dim
        self.block_size, self.form, self.rope_base = block_size, form, rope_base
        self.decodes = form == "decode"
        projects = self.decodes or gate_dim != head_dim
        key_heads = num_kv_heads if projects else num_heads
        self.q_weight = (
            nn.Parameter(torch.randn(num_heads, head_dim, gate_dim) * head_dim**-0.5)
            if projects
            else None
        )
        self.k_weight = nn.Parameter(
            torch.randn(key_heads, 3 * head_dim, gate_dim) * (3 * head_dim) ** -0.5
        )
        self.q_norm = nn.RMSNorm(gate_dim) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(gate_dim) if norm else nn.Identity()

    def keys(self, k: Tensor, first_block: int = 0) -> Tensor:
        """[B, Sk, Hk, D] -> [B, blocks, heads, gate_dim]; k begins with block ``first_block``."""
        pooled = pool_blocks(
            k, block=self.block_size, mode=("max", "min", "mean"), partial=True
        )  # fmt: skip
        repeat = self.k_weight.shape[0] // k.shape[2]
        out = torch.einsum("bnhd,hdg->bnhg", pooled.repeat_interleave(repeat, 2), self.k_weight)
        at = torch.arange(first_block, first_block + out.shape[1], device=k.device)
        return rotated(self.k_norm(out), at * self.block_size, self.rope_base)

    def _queries(self, q: Tensor, start: int) -> Tensor:
        """[B, rows, heads, gate_dim]; q begins at position ``start``."""
        if self.decodes:
            step, x = 1, q
        else:
            step, x = self.block_size, pool_blocks(q, block=self.block_size, partial=True)
        if self.q_weight is not None:
            x = torch.einsum("bnhd,hdg->bnhg", x, self.q_weight)
        if self.decodes:
            x = x.view(*x.shape[:2], self.num_kv_heads, -1, self.gate_dim).sum(3)
        at = torch.arange(x.shape[1], device=q.device) * step + start
        return rotated(self.q_norm(x), at, self.rope_base)

    def scores(self, q: Tensor, keys: Tensor, start: int = 0) -> Tensor:
        """Logits of queries whose first stands at position ``start``, from ``keys``."""
        x = self._queries(q, start)
        keys = keys.repeat_interleave(x.shape[2] // keys.shape[2], 2)
        logits: Tensor = torch.einsum("bihg,bjhg->bhij", x, keys) * self.gate_dim**-0.5
        return logits

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scores(q, self.keys(k), k.shape[1] - q.shape[1])
