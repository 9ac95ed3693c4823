"""``BlockSelection``: which blocks of keys each block of query rows attends to.

One descriptor for NSA, MoBA, SeerAttention and static patterns: lists of key-block ids. Entries
are a set: their order does not matter, repeated ids count once, and ids that name no block of the
sequence (-1 and everything past its end) are ignored wherever they stand.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnforge.ops._checks import _name, _shape, fail

__all__ = ["BlockSelection"]

_CLASS = "BlockSelection"


def _block(name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        fail(_CLASS, f"{name} is {value!r}; want an int in 1 .. {most}")
    return value


def _pack(mask: Tensor, slots: int | None) -> tuple[Tensor, Tensor]:
    """bool [.., N] -> the ids of the true ones, ascending and first, -1 behind; their counts.

    slots: room for them (the first so many are kept); None: read from the fullest row.
    """
    counts = mask.sum(-1, dtype=torch.int32)
    ids = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    ids = torch.where(mask, ids, mask.shape[-1]).sort(-1).values
    if slots is None:
        slots = max(1, int(counts.max())) if counts.numel() else 1
    else:
        counts = counts.clamp_max(slots)
    ids = ids[..., :slots]
    return torch.where(ids < mask.shape[-1], ids, -1).contiguous(), counts


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """Lists of key blocks, one for each block of query rows and head.

    indices: int32 [B | 1, H, R, S], or [H, R, S] for packed sequences, whose list rows follow each
        other (each sequence starts a new one). H is 1, the KV heads or the query heads; row r
        covers queries r * q_block .. of a sequence; ids are local to the sequence.
    q_block: queries of a list row, 1 .. 128. kv_block: keys of a block, 1 .. 4096.
    counts: int32, ``indices.shape[:-1]``, or None; slots at and past it are not read.

    The attention functions add what is visible by position: a causal call never sees the future,
    whatever the lists say.
    """

    indices: Tensor
    q_block: int
    kv_block: int
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        x = self.indices
        if not isinstance(x, Tensor):
            kind = type(x).__name__
            fail(_CLASS, f"indices must be a tensor; got {kind}; want int32", TypeError)
        if x.dtype is not torch.int32:
            fail(
                _CLASS,
                f"indices has dtype {_name(x.dtype)}; want int32; convert with .to(torch.int32)",
                TypeError,
            )
        if x.dim() not in (3, 4):
            fail(
                _CLASS,
                f"indices has shape {_shape(x)}; want [batch, heads, rows, slots], or [heads, "
                "rows, slots] for packed sequences",
            )
        _block("q_block", self.q_block, 128)
        _block("kv_block", self.kv_block, 4096)
        c = self.counts
        if c is not None and (c.dtype is not torch.int32 or c.shape != x.shape[:-1]):
            fail(
                _CLASS,
                f"counts is {_name(c.dtype)} {_shape(c)}; want int32 {tuple(x.shape[:-1])}: how "
                "many slots of each list are used",
            )
        if c is not None and c.device != x.device:
            fail(_CLASS, f"counts is on {c.device}; want {x.device} like indices")

    @classmethod
    def from_indices(
        cls, indices: Tensor, *, q_block: int, kv_block: int, counts: Tensor | None = None
    ) -> BlockSelection:
        """Of lists of any integer dtype; see the class for their layout."""
        if isinstance(indices, Tensor) and not indices.dtype.is_floating_point:
            indices = indices.to(torch.int32)
        if counts is not None:
            counts = counts.to(torch.int32)
        return cls(indices, q_block, kv_block, counts)

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, q_block: int, kv_block: int, slots: int | None = None
    ) -> BlockSelection:
        """Of a bool mask [B | 1, H, R, blocks] or [H, R, blocks]: true where a block is seen.

        slots: entries of a list; of a row with more the first so many are kept. Without it the
        fullest row is read, for which a GPU is waited for.
        """
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            got = _name(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            fail(_CLASS, f"mask is {got}; want a bool tensor; compare scores first", TypeError)
        if slots is not None and (
            isinstance(slots, bool) or not isinstance(slots, int) or slots < 1
        ):
            fail(_CLASS, f"slots is {slots!r}; want an int >= 1")
        indices, counts = _pack(mask, slots)
        return cls(indices, q_block, kv_block, counts)

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        *,
        q_block: int,
        kv_block: int,
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> BlockSelection:
        """Of block scores [B | 1, H, R, blocks] or [H, R, blocks]: the best or the large enough.

        top_k: so many blocks per row; of equal scores the block further right wins. threshold:
        blocks whose score is at least it. -inf is never chosen; NaN neither. Exactly one of both.
        """
        if (top_k is None) == (threshold is None):
            fail(_CLASS, "want exactly one of top_k and threshold; pass one of them")
        scores = torch.where(scores.isnan(), -torch.inf, scores.float())
        if threshold is not None:
            mask = (scores >= threshold) & (scores > -torch.inf)
            return cls.from_mask(mask, q_block=q_block, kv_block=kv_block)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            fail(_CLASS, f"top_k is {top_k!r}; want an int >= 1")
        return cls(top_blocks(scores, top_k), q_block, kv_block)

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockSelection:
        """Of a ``torch.nn.attention.flex_attention.BlockMask`` whose partial blocks are causal.

        Partial and full blocks are both taken: the token mask of a partial block is not carried
        over, so pass ``causal`` or a window to the attention function where it was one.
        """
        for name in ("kv_num_blocks", "kv_indices", "BLOCK_SIZE"):
            if not hasattr(block_mask, name):
                kind = type(block_mask).__name__
                fail(_CLASS, f"block_mask is {kind}; want a flex_attention BlockMask", TypeError)
        mask = block_mask.to_dense().to(torch.bool)
        q_block, kv_block = block_mask.BLOCK_SIZE
        if q_block > 128:
            if q_block % 128:
                fail(_CLASS, f"BLOCK_SIZE is {block_mask.BLOCK_SIZE}; want a multiple of 128 rows")
            mask, q_block = mask.repeat_interleave(q_block // 128, -2), 128
        return cls.from_mask(mask, q_block=q_block, kv_block=kv_block)

    @classmethod
    def from_bsr(
        cls, crow_indices: Tensor, col_indices: Tensor, *, q_block: int, kv_block: int
    ) -> BlockSelection:
        """Of the index tensors of a BSR matrix, [R + 1] and [nnz]: one list for all heads."""
        lengths = crow_indices.diff()
        slots = max(1, int(lengths.max())) if lengths.numel() else 1
        column = torch.arange(slots, device=col_indices.device)
        place = crow_indices[:-1, None] + column
        inside = column < lengths[:, None]
        padded = torch.cat([col_indices, col_indices.new_full((1,), -1)])
        ids = torch.where(inside, padded[place.clamp_max(col_indices.numel())], -1)
        return cls.from_indices(
            ids[None, None], q_block=q_block, kv_block=kv_block, counts=lengths[None, None]
        )

    @property
    def packed(self) -> bool:
        """Whether the lists are those of packed sequences."""
        return self.indices.dim() == 3

    @property
    def heads(self) -> int:
        """List heads."""
        return self.indices.shape[-3]

    @property
    def rows(self) -> int:
        """List rows."""
        return self.indices.shape[-2]

    def to_mask(self, blocks: int) -> Tensor:
        """bool [.., H, R, blocks]: true where a list names the block."""
        ids = self.indices.long()
        valid = (ids >= 0) & (ids < blocks)
        if self.counts is not None:
            slot = torch.arange(ids.shape[-1], device=ids.device)
            valid &= slot < self.counts.unsqueeze(-1)
        mask = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool, device=ids.device)
        mask.scatter_(-1, torch.where(valid, ids, blocks), True)
        return mask[..., :blocks]

    def density(self, seqlen_q: int, seqlen_k: int, causal: bool = True) -> float:
        """Listed share of the (query, key) pairs that a dense call would see; not packed."""
        if self.packed:
            fail(_CLASS, "density of packed lists is not defined; ask for one sequence at a time")
        blocks = -(-seqlen_k // self.kv_block)
        first = torch.arange(min(self.rows, -(-seqlen_q // self.q_block))) * self.q_block
        if causal:  # queries of a row see keys up to ends that follow each other
            ends = (first, (first + self.q_block).clamp_max(seqlen_q))
            before, behind = (_keys_up_to(x + seqlen_k - seqlen_q, blocks, self.kv_block)
                              for x in ends)  # fmt: skip
            pairs = behind - before
        else:
            queries = (seqlen_q - first).clamp_max(self.q_block)
            keys = (seqlen_k - torch.arange(blocks) * self.kv_block).clamp_max(self.kv_block)
            pairs = queries[:, None] * keys
        total = int(pairs.sum())
        listed = self.to_mask(blocks)[..., : len(first), :].double().mean((0, 1)).cpu()
        return float((pairs * listed).sum()) / total if total else 0.0

    def plot(self, blocks: int | None = None, head: int = 0, batch: int = 0) -> Any:
        """A matplotlib figure of one head's lists: rows down, key blocks right, listed ones black.

        blocks: how many key blocks there are (default: up to the last one that a list names); ids
        past them are not drawn. ``figure.savefig(path)`` writes it. Needs matplotlib, an optional
        extra.
        """
        try:  # the core itself needs torch alone
            figures = importlib.import_module("matplotlib.figure")
        except ImportError:
            raise ImportError(
                "attnforge.BlockSelection.plot: matplotlib is missing; "
                "run: pip install 'attnforge[bench]'"
            ) from None
        lists = self.indices if self.packed else self.indices[_place("batch", batch, self.indices)]
        lists = lists[_place("head", head, lists)]
        counts = self.counts
        if counts is not None:
            counts = (counts if self.packed else counts[batch])[head][None]
        one = BlockSelection(lists[None], self.q_block, self.kv_block, counts)
        if blocks is None:
            slot = torch.arange(lists.shape[-1], device=lists.device)
            used = lists if counts is None else lists.where(slot < counts[0, :, None], -1)
            blocks = max(1, int(used.max()) + 1) if used.numel() else 1
        figure = figures.Figure(figsize=(5, 5))
        axes = figure.subplots()
        shown = one.to_mask(blocks)[0].cpu().numpy()
        axes.imshow(shown, aspect="auto", cmap="Greys", vmin=0, vmax=1)  # full lists are black too
        axes.set(
            xlabel=f"key block ({self.kv_block} keys)", ylabel=f"row of {self.q_block} queries"
        )
        return figure


def _place(name: str, value: int, of: Tensor) -> int:
    if not 0 <= value < of.shape[0]:
        fail(_CLASS, f"{name} is {value}; want 0 .. {of.shape[0] - 1}: the lists have no other")
    return value


def _keys_up_to(ends: Tensor, blocks: int, size: int) -> Tensor:
    """int64 [R, blocks]: the (query, key) pairs in each block of queries that see e keys, summed
    over e <= ends: the triangle of the own block, then whole rows of ``size`` keys."""
    inside = (ends[:, None] - torch.arange(blocks) * size).clamp_min(0)
    part = inside.clamp_max(size)
    return part * (part + 1) // 2 + (inside - part) * size


def top_blocks(scores: Tensor, top_k: int) -> Tensor:
    """int32 ids [.., top_k] of the best blocks of fp32 scores [.., N], ascending, -1 for none.

    Of equal scores the larger id wins: score and id are compared as one 64-bit integer, so that
    the answer does not depend on how ``torch.topk`` breaks ties.
    """
    blocks = scores.shape[-1]
    bits = scores.contiguous().view(torch.int32)
    # Floats in two's complement order: the magnitude bits of negative ones are inverted.
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(blocks, device=scores.device)
    keys = (bits.long() << 32) + ids
    best = keys.topk(min(top_k, blocks), dim=-1).values
    chosen = best & 0xFFFFFFFF
    chosen = torch.where((best >> 32) > _MINUS_INFINITY, chosen, blocks).sort(-1).values
    return torch.where(chosen < blocks, chosen, -1).to(torch.int32)


_MINUS_INFINITY = -0x7F800000 - 1  # its bits 0xFF800000, in the order that top_blocks compares
