"""Pools over blocks of tokens: what selectors and compressed attention read instead of all keys.

    y_i = pool of x over tokens [i * stride, i * stride + block)

Blocks may overlap (stride < block). Cells of gcd(block, stride) tokens are pooled once and then
combined, so the work is one pass over x and not block / stride of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge.ops._checks import _name, _shape, fail, tensor

__all__ = ["packed_blocks", "pool_blocks", "pooled_lengths"]

_OP = "pool_blocks"
_MODES = ("mean", "max", "min")


def pooled_lengths(lengths: Any, block: int, stride: int, partial: bool = False) -> Any:
    """Blocks of sequences of so many tokens, an int or an integer tensor: floor((T - l) / d) + 1.

    partial: a shorter last block counts too.
    """
    if isinstance(lengths, Tensor):
        past = lengths - block
        whole = past.div(stride, rounding_mode="floor") + 1
        if partial:
            whole = (past + stride - 1).div(stride, rounding_mode="floor") + 1
            return torch.where(lengths > 0, whole.clamp_min(1), 0).to(lengths.dtype)
        return whole.clamp_min(0).to(lengths.dtype)
    if partial:
        return max(1, -(-(lengths - block) // stride) + 1) if lengths > 0 else 0
    return max(0, (lengths - block) // stride + 1)


def _combine(mode: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(over a dimension, of two tensors)."""
    if mode == "mean":
        return torch.sum, torch.add
    return (torch.amax, torch.maximum) if mode == "max" else (torch.amin, torch.minimum)


def _whole(x: Tensor, mode: str, block: int, stride: int, count: int) -> Tensor:
    """The first ``count`` complete blocks of [B, T, ...], pooled (means still sums)."""
    over, of_two = _combine(mode)
    cell = math.gcd(block, stride)
    span, step = block // cell, stride // cell
    used = (count - 1) * step + span
    cells = x[:, : used * cell].reshape(x.shape[0], used, cell, *x.shape[2:])
    pooled = over(cells, 2) if cell > 1 else cells.squeeze(2)
    # Doubling: a run of n cells from each place, n = 1, 2, 4, ... and what is left over.
    out: Tensor | None = None
    run, length, done, rest = pooled, 1, 0, span
    while rest:
        if rest & 1:
            last = (count - 1) * step
            part = run[:, done : done + last + 1 : step]
            out = part if out is None else of_two(out, part)
            done += length
        rest >>= 1
        if rest:
            run, length = of_two(run[:, :-length], run[:, length:]), 2 * length
    assert out is not None
    return out


def _pool(x: Tensor, mode: str, block: int, stride: int, partial: bool) -> Tensor:
    """[B, T, ...] in the dtype of accumulation -> [B, N, ...]."""
    tokens = x.shape[1]
    count = pooled_lengths(tokens, block, stride)
    parts = []
    if count:
        whole = _whole(x, mode, block, stride, count)
        parts.append(whole / block if mode == "mean" else whole)
    if partial and pooled_lengths(tokens, block, stride, True) > count:
        over, _ = _combine(mode)
        tail = x[:, count * stride :]
        last = over(tail, 1, keepdim=True)
        parts.append(last / tail.shape[1] if mode == "mean" else last)
    if not parts:
        return x[:, :0]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _pool_packed(
    x: Tensor, mode: str, starts: Tensor, sizes: Tensor, cells: tuple[Tensor, ...]
) -> Tensor:
    """[T, ...] -> pools over tokens [starts, starts + sizes) of each block; 0 for a size of 0.

    cells: runs of 1, 2, 4, ... tokens from each place on, pooled (means still sums); a block is put
    together of one run per bit of its size. What crosses sequences is in no block.
    """
    _, of_two = _combine(mode)
    out: Tensor | None = None
    for bit, run in enumerate(cells):
        has = (sizes >> bit & 1).bool()
        part = run.index_select(0, torch.where(has, starts, 0))
        starts = torch.where(has, starts + (1 << bit), starts)
        has = has.reshape(-1, *[1] * (x.dim() - 1))
        seen = (sizes & ((1 << bit) - 1) != 0).reshape(has.shape)
        if out is None:
            out = torch.where(has, part, 0.0)
        else:
            joined = torch.where(seen, of_two(out, part), part)
            out = torch.where(has, joined, out)
    assert out is not None
    if mode == "mean":
        out = out / sizes.clamp_min(1).reshape(-1, *[1] * (x.dim() - 1))
    return out


def _runs(x: Tensor, mode: str, most: int) -> tuple[Tensor, ...]:
    """Runs of 1, 2, 4, ... <= ``most`` tokens from each place of [T, ...] on; at the end less."""
    _, of_two = _combine(mode)
    runs = [x]
    while 2 << (len(runs) - 1) <= most:
        run, length = runs[-1], 1 << (len(runs) - 1)
        runs.append(torch.cat([of_two(run[:-length], run[length:]), run[-length:]]))
    return tuple(runs)


def packed_blocks(
    ends: Tensor, tokens: int, block: int, stride: int, partial: bool, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(first token and tokens of each of ``total`` blocks, boundaries of blocks), read nowhere."""
    cu = ends.long().clamp(0, tokens)
    counts = pooled_lengths(cu.diff(), block, stride, partial)
    blocks = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    number = torch.arange(total, device=ends.device)
    sequence = torch.searchsorted(blocks[1:].contiguous(), number, right=True)
    real = sequence < counts.shape[0]
    sequence = sequence.clamp_max(max(0, counts.shape[0] - 1))
    first = cu[sequence] + (number - blocks[sequence]) * stride
    sizes = (cu[1:][sequence] - first).clamp(0, block)
    return torch.where(real, first, 0), torch.where(real, sizes, 0), blocks.int()


def pool_blocks(
    x: Tensor,
    *,
    block: int,
    stride: int | None = None,
    mode: str | Sequence[str] = "mean",
    partial: bool = False,
    cu_seqlens: Tensor | None = None,
    total_blocks: int | None = None,
) -> Any:
    """Pools of x over blocks of tokens; differentiable.

    x [B, T, H, D], or packed [T, H, D] with cu_seqlens [B + 1] int32: blocks do not cross
    sequences. block: tokens of a block; stride: from one block to the next (default: block).
    mode: "mean", "max" or "min", or several of them, whose pools stand side by side in the last
    dimension (SeerAttention takes ("max", "min", "mean")). partial: a last block that is shorter
    than ``block`` is pooled over the tokens it has; without it such tokens are left out.

    Returns y [B, N, H, D * modes] of x's dtype with N = floor((T - block) / stride) + 1 complete
    blocks; packed (y [N, H, D * modes], cu_blocks [B + 1] int32). Sums are fp32 (fp64 of fp64).
    total_blocks: of packed calls, how many blocks y has room for; those behind the last one are 0.
    T // stride is enough where block >= stride, without ``partial``. Boundaries then are not read
    on the host: a GPU is not waited for. Without it they are read and checked.
    Equal extremes share the gradient. Memory and work are linear in x, with total_blocks times
    log2(block). Raises ValueError or TypeError on arguments that do not fit.
    """
    tensor(_OP, "x", x)
    stride = block if stride is None else stride
    for name, value in (("block", block), ("stride", stride)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fail(_OP, f"{name} is {value!r}; want an int >= 1")
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    if not modes or any(m not in _MODES for m in modes):
        fail(_OP, f"mode is {mode!r}; want one or several of {', '.join(_MODES)}")
    if not x.dtype.is_floating_point:
        fail(_OP, f"x has dtype {_name(x.dtype)}; want a floating dtype; convert it", TypeError)
    if total_blocks is not None and cu_seqlens is None:
        fail(_OP, "total_blocks is for packed calls; got it without cu_seqlens; leave it out")
    if x.dim() != (4 if cu_seqlens is None else 3):
        want = "[batch, seq, heads, dim]" if cu_seqlens is None else "[total, heads, dim]"
        fail(_OP, f"x has shape {_shape(x)}; want {want}; packed tensors come with cu_seqlens")
    wide = x if x.dtype is torch.float64 else x.float()
    if cu_seqlens is None:
        pools = [_pool(wide, m, block, stride, partial) for m in modes]
        return (pools[0] if len(pools) == 1 else torch.cat(pools, -1)).to(x.dtype)
    if total_blocks is not None:
        if isinstance(total_blocks, bool) or not isinstance(total_blocks, int) or total_blocks < 0:
            fail(_OP, f"total_blocks is {total_blocks!r}; want an int >= 0")
        starts, sizes, cu = packed_blocks(
            cu_seqlens, x.shape[0], block, stride, partial, total_blocks
        )
        if x.shape[0] == 0:
            return x.new_zeros((total_blocks, x.shape[1], len(modes) * x.shape[2])), cu
        pools = [
            _pool_packed(wide, m, starts, sizes, _runs(wide, m, min(block, x.shape[0])))
            for m in modes
        ]
        return (pools[0] if len(pools) == 1 else torch.cat(pools, -1)).to(x.dtype), cu
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] > x.shape[0] or sorted(ends) != ends:
        fail(_OP, f"cu_seqlens is {ends}; want rising boundaries from 0 to at most {x.shape[0]}")
    counts = [pooled_lengths(b - a, block, stride, partial) for a, b in itertools.pairwise(ends)]
    pools = [
        torch.cat([_pool(wide[None, a:b], m, block, stride, partial)[0]
                   for a, b in itertools.pairwise(ends)] or [wide[:0]])
        for m in modes
    ]  # fmt: skip
    cu = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=x.device)
    return (pools[0] if len(pools) == 1 else torch.cat(pools, -1)).to(x.dtype), cu
