"""MSA's choice of blocks: the largest plain dot product of an index query with a block's keys.

    s_tj = max over keys i <= t of block j of <q_t, k_i>;  the query's own block is always taken

One list per query and KV head (MiniMax sparse attention, 2026). Maxima need no softmax: neither
probabilities nor an LSE are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge.ops import reductions
from attnforge.ops._checks import _shape, fail, tensor
from attnforge.ops.selection import BlockSelection, top_blocks

__all__ = ["msa_select"]

_OP = "msa_select"
_CHUNK_SCORES = 1 << 22  # scores held at once, as in moba


def msa_select(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 128,
    top_n: int = 16,
    local_blocks: int = 1,
    backend: str | None = None,
) -> BlockSelection:
    """The top_n blocks of each index query by their best key, causal (bottom-right aligned).

    q [B, Sq, H, D] index queries, one head per KV head of the attention to come; k [B, Sk, 1 or
    H, D] index keys. local_blocks: blocks up to the query's own that are always taken, inside
    top_n. Of equal scores the block further right wins; NaN and -inf are not chosen.

    Returns a BlockSelection with q_block 1 and indices [B, H, Sq, min(top_n, blocks)], ascending,
    -1 behind. Not differentiable. Work 2 D per query and key; scores of blocks are held a chunk of
    queries at a time.
    """
    for name, x in (("q", q), ("k", k)):
        tensor(_OP, name, x)
    for name, value, least in (
        ("block_size", block_size, 1), ("top_n", top_n, 1), ("local_blocks", local_blocks, 0)
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            fail(_OP, f"{name} is {value!r}; want an int >= {least}")
    if local_blocks > top_n:
        fail(_OP, f"top_n is {top_n}; want at least local_blocks = {local_blocks}")
    if q.dim() != 4 or k.dim() != 4 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        fail(
            _OP,
            f"heads or dims do not fit; got q {_shape(q)}, k {_shape(k)}; want [batch, seq, heads, "
            "dim] with heads of q a multiple of those of k",
        )
    q, k = q.detach(), k.detach()
    batch, rows, heads, _ = q.shape
    keys = k.shape[1]
    blocks = max(1, -(-keys // block_size))
    slots = min(top_n, blocks)
    ids = q.new_full((batch, heads, rows, slots), -1, dtype=torch.int32)
    column = torch.arange(blocks, device=q.device)
    step = max(1, _CHUNK_SCORES // max(1, batch * heads * blocks))
    for first in range(0, rows if keys else 0, step):
        last = min(rows, first + step)
        used = keys - rows + last  # keys that the chunk's last query sees
        if used <= 0:
            continue
        top = reductions.block_max(
            q[:, first:last], k[:, :used], None, 1, block_size, causal=True, softmax_scale=1.0,
            backend=backend,
        )  # fmt: skip
        top = torch.where(top.isnan(), -torch.inf, top.float())
        at = torch.arange(first, last, device=q.device) + (keys - rows)
        own = at.div(block_size, rounding_mode="floor")[:, None]
        here = column[: top.shape[-1]]
        top = top.masked_fill((here > own - local_blocks) & (here <= own), torch.inf)
        found = top_blocks(top, slots)
        ids[:, :, first:last, : found.shape[-1]] = found
    return BlockSelection(ids, 1, block_size)
