"""Attention between two pieces of one long sequence, and sums of such parts.

A piece is a run of tokens with a global position. Which keys of one piece the rows of another see
is a band, so after trimming rows that see nothing and keys that nobody sees it is an ordinary call
of the flash operators with a window. Parts meet by their LSEs; a part's gradients follow from the
LSE and output of the whole, so the backward needs no partial results of the forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge.ops import _flash_ops
from attnforge.ops.flash import _dense

__all__ = ["Mask", "Piece", "Sum", "band", "part_bwd", "part_fwd"]


class Mask(NamedTuple):
    """What holds for the whole sequence; left and right as in window_size, -1 is unlimited."""

    left: int
    right: int
    softmax_scale: float | None
    softcap: float
    backend: str | None


class Piece(NamedTuple):
    """Tokens ``start`` on of a sequence, as rows ``rows`` of a local tensor."""

    start: int
    rows: slice

    @property
    def length(self) -> int:
        return int(self.rows.stop - self.rows.start)


class Band(NamedTuple):
    """Rows of the one piece, keys of the other, and the window between them."""

    rows: slice
    keys: slice
    window: tuple[int, int]


def band(q: Piece, k: Piece, left: int, right: int) -> Band | None:
    """The visible part of q x k in local rows; None if no row sees a key.

    Row i sees keys i + d - left .. i + d + right of k, where d is how far q starts behind k.
    """
    d = q.start - k.start
    far = q.length + k.length + abs(d)
    left, right = (far if x < 0 else x for x in (left, right))
    first = max(0, -(d + right))
    last = min(q.length, k.length - d + left) - 1
    if first > last:
        return None
    begin = max(0, first + d - left)
    end = min(k.length, last + d + right + 1)
    if begin >= end:
        return None
    rows, keys = last + 1 - first, end - begin
    shift = d + first - begin - (keys - rows)  # against the bottom-right diagonal of what is left
    at, of = q.rows.start, k.rows.start
    return Band(
        slice(at + first, at + last + 1), slice(of + begin, of + end), (left - shift, right + shift)
    )


def _problem(q: Tensor, k: Tensor, v: Tensor, b: Band, m: Mask, ids: Any) -> Any:
    options: dict[str, Any] = {}
    if ids is not None:
        options = {
            "segment_ids_q": ids[0][:, b.rows].contiguous(),
            "segment_ids_k": ids[1][:, b.keys].contiguous(),
        }
    return _dense(
        "flash_attention", q[:, b.rows], k[:, b.keys], v[:, b.keys], "seqused_k", None,
        window_size=b.window, softmax_scale=m.softmax_scale, softcap=m.softcap, **options,
    )  # fmt: skip


def part_fwd(q: Tensor, k: Tensor, v: Tensor, b: Band, m: Mask, ids: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of a band alone."""
    q, k, v, p = _problem(q, k, v, b, m, ids)
    out, lse, _ = _flash_ops.flash_fwd(q, k, v, *p[:11], list(p.mods), *p[12:], False, m.backend)
    return out, lse


def part_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    b: Band, m: Mask, ids: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) that flow through a band; out and lse are those of the whole row."""
    dout, out, lse = dout[:, b.rows], out[:, b.rows], lse[..., b.rows].contiguous()
    dlse = None if dlse is None else dlse[..., b.rows].contiguous()
    q, k, v, p = _problem(q, k, v, b, m, ids)
    grads = _flash_ops.flash_bwd(
        dout, dlse, q, k, v, out, lse, out.new_empty(0), *p[:11], list(p.mods), *p[12:], 0,
        m.backend,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


class Sum:
    """The running union of parts, kept in fp32 (fp64 beside fp64)."""

    def __init__(self, q: Tensor, width: int) -> None:
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        batch, rows, heads, _ = q.shape
        self.out = q.new_zeros(batch, rows, heads, width, dtype=wide)
        self.lse = q.new_full((batch, heads, rows), -torch.inf, dtype=wide)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge a part over new keys into ``rows``."""
        old = self.lse[..., rows]
        new = torch.logaddexp(old, lse)
        base = torch.where(new == -torch.inf, 0.0, new)
        mine, theirs = ((x - base).exp().transpose(1, 2).unsqueeze(-1) for x in (old, lse))
        kept = self.out[:, rows]
        kept.mul_(mine).add_(theirs * out)
        self.lse[..., rows] = new
