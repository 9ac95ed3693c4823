"""Static patterns as block selections: who sees whom is known before any token is.

Each function returns lists [1, heads, rows, slots] for ``block_sparse_attention``. A block is
listed if the pattern gives some query of a row some key of it, so patterns are exact where their
edges are those of blocks and cover a little more elsewhere; a causal call cuts at the token, and
``window_size`` makes a window exact to the token. Rows are the last ones of seqlen_k keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnforge.ops._checks import _shape, fail
from attnforge.ops.selection import BlockSelection

__all__ = [
    "anchors",
    "bigbird",
    "documents",
    "duo",
    "longformer",
    "shifted_groups",
    "streaming",
    "strided",
    "transient_global",
]


class _Grid(NamedTuple):
    """First and last key position of the queries of each row [R, 1], and of each block [N]."""

    row_lo: Tensor
    row_hi: Tensor
    key_lo: Tensor
    key_hi: Tensor
    q_block: int
    kv_block: int

    def near(self, left: int, right: int) -> Tensor:
        """bool [R, N]: blocks with a key at most so far left or right of some query of the row."""
        return (self.key_hi >= self.row_lo - left) & (self.key_lo <= self.row_hi + right)

    def past(self) -> Tensor:
        """bool [R, N]: blocks with a key at or before some query."""
        return self.key_lo <= self.row_hi

    def lists(self, mask: Tensor) -> BlockSelection:
        """Of a mask [R, N] or [H, R, N]."""
        mask = mask.expand(1, *([1] if mask.dim() == 2 else []), *mask.shape)
        return BlockSelection.from_mask(mask, q_block=self.q_block, kv_block=self.kv_block)


def _count(op: str, name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        fail(op, f"{name} is {value!r}; want an int >= {least}")
    return value


def _grid(
    op: str, seqlen_q: int, seqlen_k: int | None, q_block: int, kv_block: int, device: object
) -> _Grid:
    keys = seqlen_q if seqlen_k is None else seqlen_k
    for name, value in (("seqlen_q", seqlen_q), ("seqlen_k", keys)):
        _count(op, name, value)
    _count(op, "q_block", q_block, 1), _count(op, "kv_block", kv_block, 1)
    rows = torch.arange(0, seqlen_q, q_block, device=device)  # type: ignore[call-overload]
    blocks = torch.arange(0, keys, kv_block, device=device)  # type: ignore[call-overload]
    shift = keys - seqlen_q
    row_hi = (rows + q_block).clamp_max(seqlen_q) - 1 + shift
    key_hi = (blocks + kv_block).clamp_max(keys) - 1
    return _Grid(rows[:, None] + shift, row_hi[:, None], blocks, key_hi, q_block, kv_block)


def streaming(
    seqlen_q: int, *, sinks: int = 64, window: int = 256, seqlen_k: int | None = None,
    q_block: int = 64, kv_block: int = 64, device: object = None,
) -> BlockSelection:  # fmt: skip
    """Attention sinks and a causal window (StreamingLLM, arXiv 2309.17453).

    The first ``sinks`` keys, and for each query the last ``window`` ones, itself among them.
    """
    op = "patterns.streaming"
    g = _grid(op, seqlen_q, seqlen_k, q_block, kv_block, device)
    first = g.key_lo < _count(op, "sinks", sinks)
    return g.lists((g.near(_count(op, "window", window, 1) - 1, 0) | first) & g.past())


def duo(
    seqlen_q: int, full_heads: Sequence[bool] | Tensor, *, sinks: int = 64, window: int = 256,
    seqlen_k: int | None = None, q_block: int = 64, kv_block: int = 64, device: object = None,
) -> BlockSelection:  # fmt: skip
    """Full and streaming heads side by side (DuoAttention, arXiv 2410.10819).

    full_heads: a flag for each KV or query head; the others see sinks and window.
    """
    op = "patterns.duo"
    g = _grid(op, seqlen_q, seqlen_k, q_block, kv_block, device)
    full = torch.as_tensor(full_heads, dtype=torch.bool, device=g.key_lo.device)
    if full.dim() != 1:
        fail(op, f"full_heads has shape {_shape(full)}; want [heads]")
    first = g.key_lo < _count(op, "sinks", sinks)
    near = g.near(_count(op, "window", window, 1) - 1, 0) | first
    return g.lists((near | full[:, None, None]) & g.past())


def longformer(
    seqlen: int, *, window: int = 512, global_tokens: Sequence[int] = (0,), q_block: int = 64,
    kv_block: int = 64, device: object = None,
) -> BlockSelection:  # fmt: skip
    """A symmetric window and global tokens that see and are seen by all (arXiv 2004.05150).

    window: keys of a query's neighbourhood, half of them to each side. Of a call without causal.
    """
    op = "patterns.longformer"
    g = _grid(op, seqlen, None, q_block, kv_block, device)
    half = _count(op, "window", window, 1) // 2
    mask = g.near(half, half)
    for token in global_tokens:
        if not 0 <= token < seqlen:
            fail(op, f"global_tokens has {token}; want positions in 0 .. {seqlen - 1}")
        mask |= (g.key_lo <= token) & (token <= g.key_hi)
        mask |= (g.row_lo <= token) & (token <= g.row_hi)
    return g.lists(mask)


def bigbird(
    seqlen: int, *, block: int = 64, window_blocks: int = 3, global_blocks: int = 1,
    random_blocks: int = 3, heads: int = 1, seed: int = 0, device: object = None,
) -> BlockSelection:  # fmt: skip
    """Window, global and random blocks (BigBird, arXiv 2007.14062), of a call without causal.

    window_blocks: neighbours of a row, itself in the middle; global_blocks: at each end, they see
    and are seen by all; random_blocks: drawn for each head and row among the others, by ``seed``.
    """
    op = "patterns.bigbird"
    g = _grid(op, seqlen, None, block, block, device)
    count = g.key_lo.numel()
    ids = torch.arange(count, device=g.key_lo.device)
    ends = _count(op, "global_blocks", global_blocks)
    half = _count(op, "window_blocks", window_blocks, 1) // 2
    edge = (ids < ends) | (ids >= count - ends)
    mask = ((ids[:, None] - ids).abs() <= half) | edge | edge[:, None]
    mask = mask.expand(_count(op, "heads", heads, 1), -1, -1).clone()
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(mask, 2.0)
    taken = min(_count(op, "random_blocks", random_blocks), count)
    drawn = order.argsort(-1)[..., :taken]
    mask.scatter_(-1, drawn, True)
    return g.lists(mask)


def strided(
    seqlen_q: int, *, stride: int, window: int = 0, seqlen_k: int | None = None, block: int = 64,
    dilated: bool = False, device: object = None,
) -> BlockSelection:  # fmt: skip
    """Every stride-th block, causal, beside a local window (LongGen, arXiv 2410.01485).

    Columns stand still: blocks 0, stride, ... are seen by all; dilated: they go with the row, its
    own block and those a multiple of stride before it. window: keys of a local window, 0 for none;
    the own block is always listed.
    """
    op = "patterns.strided"
    g = _grid(op, seqlen_q, seqlen_k, block, block, device)
    own = g.row_hi // block
    ids = torch.arange(g.key_lo.numel(), device=g.key_lo.device)
    step = _count(op, "stride", stride, 1)
    grid = ((own - ids) % step == 0) if dilated else (ids % step == 0).expand(own.shape[0], -1)
    local = g.near(max(0, _count(op, "window", window) - 1), 0)
    return g.lists((grid | local | (ids == own)) & g.past())


def shifted_groups(
    seqlen: int, *, group: int, heads: int, block: int = 64, device: object = None
) -> BlockSelection:
    """Attention in groups of tokens, shifted by half a group in the second half of the heads.

    S2-Attn of LongLoRA (arXiv 2309.12307) and its kin (SCCA). group: tokens, a multiple of
    2 block. The first and the last half group of the shifted heads are groups of their own, where
    the original wraps around: no query sees the other end of the text.
    """
    op = "patterns.shifted_groups"
    g = _grid(op, seqlen, None, block, block, device)
    if _count(op, "group", group, 1) % (2 * block):
        fail(op, f"group is {group}; want a multiple of 2 * block = {2 * block}")
    _count(op, "heads", heads, 1)
    start = g.key_lo
    same = []
    for shift in (0, group // 2):
        ids = (start + shift) // group
        same.append(ids[:, None] == ids)
    half = (heads + 1) // 2
    return g.lists(torch.stack([same[0]] * half + [same[1]] * (heads - half)))


def transient_global(
    seqlen: int, *, radius: int = 127, summaries: int, block: int = 64, device: object = None
) -> BlockSelection:
    """LongT5's TGlobal (arXiv 2112.07916), of a call without causal.

    Queries are the tokens; keys are the tokens and, behind them, ``summaries`` summary tokens
    (means of 16 in the paper, which the caller appends to k and v). A query sees the tokens at most
    ``radius`` away and all summaries. seqlen is a multiple of block.
    """
    op = "patterns.transient_global"
    if _count(op, "seqlen", seqlen) % _count(op, "block", block, 1):
        fail(op, f"seqlen is {seqlen}; want a multiple of block = {block}: summaries begin a block")
    g = _grid(op, seqlen, None, block, block, device)
    near = g.near(_count(op, "radius", radius), radius)
    extra = -(-_count(op, "summaries", summaries) // block)
    return g.lists(torch.cat([near, near.new_ones(near.shape[0], extra)], -1))


def _pieces(op: str, lengths: Sequence[int], block: int) -> tuple[Tensor, int]:
    """The piece of each block and the number of tokens."""
    for n, size in enumerate(lengths):
        _count(op, f"lengths[{n}]", size)
        if size % block and n + 1 < len(lengths):
            fail(
                op, f"lengths[{n}] is {size}; want a multiple of block = {block}, all but the last"
            )
    each = torch.tensor([-(-size // block) for size in lengths])
    return torch.arange(len(lengths)).repeat_interleave(each), sum(lengths)


def documents(
    lengths: Sequence[int], *, block: int = 64, last_sees_all: bool = True, device: object = None
) -> BlockSelection:
    """Documents that see themselves, and a question behind them that sees all.

    Block-Attention (arXiv 2409.15355). lengths: tokens of each piece, multiples of block but for
    the last, which is the question if last_sees_all. Of a causal call.
    """
    op = "patterns.documents"
    piece, total = _pieces(op, lengths, _count(op, "block", block, 1))
    g = _grid(op, total, None, block, block, device)
    piece = piece.to(g.key_lo.device)
    mask = piece[:, None] == piece
    if last_sees_all:
        mask |= (piece == len(lengths) - 1)[:, None]
    return g.lists(mask & g.past())


def anchors(
    seqlen: int, *, piece: int, block: int = 64, query_tokens: int = 0, device: object = None
) -> BlockSelection:
    """Pieces that see themselves and the first one (Star Attention, arXiv 2411.17116), causal.

    piece: tokens of a context piece, a multiple of block. The last ``query_tokens`` see all: its
    second phase. Positions are those of the text; the original gives anchor copies their own.
    """
    op = "patterns.anchors"
    g = _grid(op, seqlen, None, block, block, device)
    if _count(op, "piece", piece, 1) % block:
        fail(op, f"piece is {piece}; want a multiple of block = {block}")
    ids = g.key_lo // piece
    mask = (ids[:, None] == ids) | (ids == 0)
    mask |= g.row_hi >= seqlen - _count(op, "query_tokens", query_tokens)
    return g.lists(mask & g.past())
