"""Attention of a rank's rows to the keys of all ranks, which come one rank at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnforge.distributed._pairs import Mask, Piece, Sum, band, part_bwd, part_fwd
from attnforge.distributed._segments import gather
from attnforge.ops._checks import fail

__all__ = ["Gathered", "Ring", "Share", "pieces"]


def pieces(op: str, layout: str, rank: int, world: int, size: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of a sequence of ``size`` tokens that ``rank`` holds."""
    if layout not in ("zigzag", "contiguous"):
        fail(op, f"layout is {layout!r}; want 'zigzag' or 'contiguous'")
    count = 2 * world if layout == "zigzag" else world
    if size % count:
        fail(op, f"the sequence has {size} tokens; want a multiple of {count} for {world} ranks "
                 f"in layout {layout!r}; pad it")  # fmt: skip
    length = size // count
    mine = (rank, count - 1 - rank) if layout == "zigzag" else (rank,)
    return [(i * length, length) for i in mine]


class Share(NamedTuple):
    """Which tokens of the sequence the ranks hold."""

    op: str
    rank: int
    world: int
    group: Any
    layout: str
    size: int
    cu_seqlens: Tensor | None

    def pieces(self, rank: int) -> list[Piece]:
        """The pieces of ``rank`` as rows of its tensors."""
        found, at = [], 0
        for start, length in pieces(self.op, self.layout, rank, self.world, self.size):
            found.append(Piece(start, slice(at, at + length)))
            at += length
        return found

    def order(self) -> Tensor:
        """Positions of all ranks' tokens, rank by rank."""
        return torch.cat([self.positions(rank) for rank in range(self.world)])

    def positions(self, rank: int) -> Tensor:
        """Positions of ``rank``'s tokens."""
        return torch.cat([torch.arange(p.start, p.start + p.length) for p in self.pieces(rank)])

    def ids(self, source: int) -> tuple[Tensor, Tensor] | None:
        """The documents of this rank's rows and of ``source``'s keys, [1, T] int32; or None.

        Rows and keys past the last boundary belong nowhere: ids -1 and -2.
        """
        if self.cu_seqlens is None:
            return None
        ends = self.cu_seqlens[1:].to(torch.int64).contiguous()

        def of(rank: int, nowhere: int) -> Tensor:
            at = self.positions(rank).to(ends.device)
            found = torch.searchsorted(ends, at, right=True)
            ids = torch.where(found < ends.shape[0], found, nowhere)
            return ids.to(torch.int32).unsqueeze(0)

        return of(self.rank, -1), of(source, -2)


def _attend(
    total: Sum, q: Tensor, kv: tuple[Tensor, Tensor], share: Share, source: int, mask: Mask
) -> None:
    """Add what the rows see of the keys of rank ``source``."""
    ids = share.ids(source)
    for mine in share.pieces(share.rank):
        for theirs in share.pieces(source):
            if (b := band(mine, theirs, mask.left, mask.right)) is not None:
                total.add(b.rows, *part_fwd(q, *kv, b, mask, ids))


def _differentiate(
    ctx: Any, tops: tuple[Tensor, Tensor | None], kv: tuple[Tensor, Tensor], source: int,
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Add the gradients through the keys of rank ``source`` to sums (dq, dk, dv)."""
    q, _, _, out, lse = ctx.saved_tensors
    share, mask = ctx.share, ctx.mask
    ids = share.ids(source)
    for mine in share.pieces(share.rank):
        for theirs in share.pieces(source):
            b = band(mine, theirs, mask.left, mask.right)
            if b is None:
                continue
            grads = part_bwd(*tops, q, *kv, out, lse, b, mask, ids)
            for total, part, at in zip(sums, grads, (b.rows, b.keys, b.keys), strict=True):
                total[:, at] += part


class _Hop(NamedTuple):
    """Tensors on their way to the next rank."""

    arriving: list[Tensor]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.arriving


def _send(tensors: list[Tensor], share: Share) -> _Hop:
    """Start sending to the next rank and receiving from the one before."""
    arriving = [torch.empty_like(x) for x in tensors]
    ranks = dist.get_process_group_ranks(share.group or dist.group.WORLD)
    after, before = (ranks[(share.rank + s) % share.world] for s in (1, -1))
    ops = [dist.P2POp(dist.isend, x, after, share.group) for x in tensors]
    ops += [dist.P2POp(dist.irecv, x, before, share.group) for x in arriving]
    return _Hop(arriving, dist.batch_isend_irecv(ops))


def _rounds(kv: tuple[Tensor, Tensor], share: Share) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """(rank, its keys and values), this rank's first; the next ones travel while these are used."""
    for step in range(share.world):
        hop = _send(list(kv), share) if step + 1 < share.world else None
        yield (share.rank - step) % share.world, kv
        if hop is not None:
            k, v = hop.wait()
            kv = (k, v)


def _begin(ctx: Any, q: Tensor, k: Tensor, v: Tensor, share: Share, mask: Mask) -> Any:
    ctx.share, ctx.mask = share, mask
    ctx.set_materialize_grads(False)
    return Sum(q, v.shape[-1]), (k.contiguous(), v.contiguous())


def _finish(ctx: Any, total: Sum, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = total.out.to(q.dtype)
    ctx.save_for_backward(q, k, v, out, total.lse)
    return out, total.lse


def _sums(ctx: Any, grads: tuple[Tensor | None, Tensor | None]) -> Any:
    """(gradients of out and lse, zeros for dq, dk, dv) in the dtype of the statistics."""
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if grads[0] is None else grads[0]
    return (dout, grads[1]), tuple(torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))


class Ring(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """(q, k, v, share, mask) -> (out, lse); keys go round in both directions of time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, share: Share, mask: Mask) -> Any:
        total, kv = _begin(ctx, q, k, v, share, mask)
        for source, held in _rounds(kv, share):
            _attend(total, q, held, share, source, mask)
        return _finish(ctx, total, q, *kv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        share = ctx.share
        tops, (dq, *own) = _sums(ctx, (dout, dlse))
        hop = None
        # Gradients of the keys at hand follow them one step behind and end at their owner. They
        # travel while the next part is computed, to which they are added when both are there.
        for source, held in _rounds((k, v), share):
            grads = [torch.zeros_like(x) for x in own]
            _differentiate(ctx, tops, held, source, (dq, *grads))
            if hop is not None:
                own = hop.wait()
            for total, part in zip(own, grads, strict=True):
                total += part
            hop = _send(own, share) if share.world > 1 else None
        own = own if hop is None else hop.wait()
        return dq.to(q.dtype), own[0].to(k.dtype), own[1].to(v.dtype), None, None


class Gathered(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """``Ring`` with all keys at once: an all-gather, and one all-to-all of their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, share: Share, mask: Mask) -> Any:
        total, kv = _begin(ctx, q, k, v, share, mask)
        ctx.every = gather(kv, share.group)
        for source, held in enumerate(ctx.every):
            _attend(total, q, held, share, source, mask)
        return _finish(ctx, total, q, *kv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        tops, (dq, *_) = _sums(ctx, (dout, dlse))
        grads = []
        for source, held in enumerate(ctx.every):
            parts = [torch.zeros_like(x, dtype=dq.dtype) for x in held]
            _differentiate(ctx, tops, held, source, (dq, *parts))
            grads.append(torch.cat([x.reshape(-1) for x in parts]))
        flat = torch.stack(grads)
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat, group=ctx.share.group)
        mine = received.sum(0)
        dk = mine[: k.numel()].view(k.shape).to(k.dtype)
        dv = mine[k.numel() :].view(v.shape).to(v.dtype)
        return dq.to(q.dtype), dk, dv, None, None
