"""Attention masks as descriptions, and their decomposition into plain kernel calls.

A model's mask is nearly always a band (causal, sliding window, bidirectional) cut by padding,
packing or chunks. `MaskSpec` says that in a few integers and at most a [B, Sk] padding mask;
`MaskSpec.plan()` turns it into *pieces*: rectangles of query rows and key slots of one batch entry
inside which the mask is exactly what one `flash_attention` call can do (bottom-right causal,
window). No [Sq, Sk] tensor exists on this path. `plan_from_dense` makes the same pieces from a
mask that somebody else materialised, when every row of it is one interval.

Notation: query row i has its own key in slot i + delta; slots hold consecutive positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Band", "MaskSpec", "Piece", "Plan", "plan_from_dense"]

_WHERE = "attnforge.integrations.transformers"


class Band(NamedTuple):
    """Which keys a query may see by distance alone.

    Key slot j is visible to a query with own slot s when ``j <= s`` (causal), ``j >= s - left``,
    ``j <= s + right``, and, with chunks, when both lie in the same chunk. -1 is unlimited.
    """

    causal: bool
    left: int = -1
    right: int = -1
    chunk: int = 0


class Piece(NamedTuple):
    """One attention problem inside one batch entry: query rows x key slots, aligned bottom-right.

    With `q_index` and `k_index` (int64, on the CPU) the rows and slots are those listed, not the
    whole range: padding in the middle of a sequence.
    """

    batch: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    left: int
    right: int
    q_index: Tensor | None = None
    k_index: Tensor | None = None


class Group(NamedTuple):
    """Pieces with the same band, packed for one varlen call.

    `q_at` and `k_at` are (batch, row) index tensors of the packed tokens, or None where the packed
    tokens are the rows [q0, q1) / slots [k0, k1) of the only batch entry. `unique_keys` is False
    when pieces share keys, so that gradients of a gather must be summed.
    """

    pieces: list[Piece]
    q_at: tuple[Tensor, Tensor] | None
    k_at: tuple[Tensor, Tensor] | None
    q_range: tuple[int, int]
    k_range: tuple[int, int]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    unique_keys: bool


@dataclass(slots=True)
class Plan:
    """What to run: one batched call (`uniform`), or pieces. Rows in no piece have output 0."""

    uniform: Piece | None
    pieces: list[Piece]
    _groups: dict[torch.device, list[Group]] = field(default_factory=dict)

    def groups(self, device: torch.device) -> list[Group]:
        """The pieces packed by band, with their index tensors on `device` (built once)."""
        found = self._groups.get(device)
        if found is None:
            bands: dict[tuple[bool, int, int], list[Piece]] = {}
            for p in self.pieces:
                bands.setdefault((p.causal, p.left, p.right), []).append(p)
            found = [_pack(pieces, device) for pieces in bands.values()]
            self._groups[device] = found
        return found


def _indices(pieces: list[Piece], side: str) -> list[tuple[int, Tensor]]:
    out = []
    for p in pieces:
        index = p.q_index if side == "q" else p.k_index
        if index is None:
            index = torch.arange(p.q0, p.q1) if side == "q" else torch.arange(p.k0, p.k1)
        out.append((p.batch, index))
    return out


def _pack(pieces: list[Piece], device: torch.device) -> Group:
    def side(name: str) -> tuple[tuple[Tensor, Tensor] | None, tuple[int, int], Tensor, int, bool]:
        runs = _indices(pieces, name)
        sizes = [i.numel() for _, i in runs]
        rows = torch.cat([i for _, i in runs])
        batch = torch.cat([torch.full_like(i, b) for b, i in runs])
        cu = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        first = int(rows[0])
        whole = (first, first + rows.numel())
        # Packed sequences of one batch entry tile it: read it in place instead of gathering.
        in_place = int(batch.max()) == 0 and torch.equal(rows, torch.arange(*whole))
        flat = batch * (int(rows.max()) + 1) + rows
        unique = in_place or len(set(flat.tolist())) == flat.numel()
        at = None if in_place else (batch.to(device), rows.to(device))
        return at, whole, cu.to(device), max(sizes), unique

    q_at, q_range, cu_q, max_q, _ = side("q")
    k_at, k_range, cu_k, max_k, unique = side("k")
    return Group(pieces, q_at, k_at, q_range, k_range, cu_q, cu_k, max_q, max_k, unique)


@dataclass(slots=True)
class MaskSpec:
    """A mask by description.

    Attributes:
        batch, q_len, kv_len: sizes; kv_len counts key slots, used or not.
        band: visibility by distance.
        delta: own slot of query row 0. A 0-d integer tensor where its value is not known yet
            (a static cache inside a compiled graph); then padding, segments and chunks are absent.
        padding: [B, kv_len] bool, True for real keys, or None.
        segments: [B, q_len] integers, equal within one packed sequence, or None (q_len == kv_len).
        chunk_origin: [B] slot at which chunk 0 begins, when `band.chunk` is set.
        device: where the model runs.
    """

    batch: int
    q_len: int
    kv_len: int
    band: Band
    delta: int | Tensor = 0
    padding: Tensor | None = None
    segments: Tensor | None = None
    chunk_origin: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _plan: Plan | None = None
    _positions_seen: bool = False

    def plan(self) -> Plan:
        """The pieces of this mask; computed once and shared by all layers that use the mask."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def split_at_restarts(self, position_ids: Tensor | None) -> None:
        """Separate packed sequences where `position_ids` [B, q_len] restart at zero.

        Only where the mask says nothing else: no padding, no packing, an empty cache.
        """
        if self._positions_seen or position_ids is None:
            return
        self._positions_seen = True
        plain = self.padding is None and self.segments is None and self.band.causal
        if not plain or self.q_len != self.kv_len or self.q_len < 2 or position_ids.ndim != 2:
            return
        if position_ids.shape[1] != self.q_len:
            return
        restarts = position_ids[:, 1:] == 0
        if bool(restarts.any()):
            ids = torch.nn.functional.pad(restarts.long().cumsum(-1), (1, 0))
            self.segments = ids.expand(self.batch, -1)
            self._plan = None

    def _make_plan(self) -> Plan:
        delta = int(self.delta)
        if self.band.causal and delta + self.q_len > self.kv_len:
            raise ValueError(
                f"{_WHERE}: causal mask of {self.q_len} queries at key slot {delta} needs "
                f"{delta + self.q_len} key slots, but the cache has {self.kv_len}"
            )
        if self.segments is not None and (self.q_len != self.kv_len or delta != 0):
            raise ValueError(
                f"{_WHERE}: packed sequences need as many keys as queries, got "
                f"{self.kv_len} keys for {self.q_len} queries; pass cu_seq_lens_q and cu_seq_lens_k"
            )
        if self.padding is None and self.segments is None and not self.band.chunk:
            whole = self._align(0, 0, self.q_len, 0, self.kv_len, delta)
            return Plan(whole, [] if whole is None else [whole])
        pieces = [p for b in range(self.batch) for p in self._row_pieces(b, delta)]
        return Plan(_uniform(pieces, self.batch), pieces)

    def _row_pieces(self, b: int, delta: int) -> Iterator[Piece]:
        """The pieces of batch entry b."""
        if self.segments is not None:
            ids = self.segments[b].cpu()
            cuts = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
            edges = [0, *cuts.tolist(), self.q_len]
            ranges = [(s, e) for s, e in pairwise(edges) if e > s]
        else:
            ranges = [(0, self.kv_len)]
        if self.padding is not None:
            seen = self.kv_len
            if self.band.causal:
                seen = min(seen, delta + self.q_len)
            slots = self.padding[b, :seen].cpu().nonzero().flatten()
            if slots.numel() == 0:
                return
            first, last = int(slots[0]), int(slots[-1])
            if slots.numel() != last - first + 1:
                yield from self._with_holes(b, slots, delta)
                return
            ranges = [(first, last + 1)]
        for k0, k1 in ranges:
            if self.band.causal or self.segments is not None or self._windowed_self:
                q0, q1 = max(0, k0 - delta), min(self.q_len, k1 - delta)
            else:
                q0, q1 = 0, self.q_len
            for piece_k0, piece_k1 in self._chunks(b, k0, k1):
                lo, hi = q0, q1
                if self.band.chunk:
                    lo, hi = max(q0, piece_k0 - delta), min(q1, piece_k1 - delta)
                piece = self._align(b, lo, hi, piece_k0, piece_k1, delta)
                if piece is not None:
                    yield piece

    @property
    def _windowed_self(self) -> bool:
        """A bidirectional window over the tokens themselves: padding rows need not be computed."""
        return not self.band.causal and self.band.left >= 0 and self.q_len == self.kv_len

    def _chunks(self, b: int, k0: int, k1: int) -> Iterator[tuple[int, int]]:
        size = self.band.chunk
        if not size:
            yield k0, k1
            return
        origin = 0 if self.chunk_origin is None else int(self.chunk_origin[b])
        start = k0
        while start < k1:
            stop = min(k1, origin + ((start - origin) // size + 1) * size)
            yield start, stop
            start = stop

    def _align(self, b: int, q0: int, q1: int, k0: int, k1: int, delta: int) -> Piece | None:
        """Trim a rectangle so that bottom-right alignment is the mask's own; None if empty."""
        left, right = self.band.left, self.band.right
        if self.band.causal:
            q0 = max(q0, k0 - delta)  # rows before the first key see nothing
            k1 = min(k1, q1 + delta)  # keys after the last row's own are seen by nobody
            q1 = k1 - delta
            if left >= 0:
                k0 = max(k0, q0 + delta - left)
            right = 0
        elif left >= 0 or right >= 0:
            # The kernel centres row i on slot i + (keys - rows); here the centre is i + delta.
            shift = (k1 - k0) - (q1 - q0) - (delta + q0 - k0)
            left = left + shift if left >= 0 else -1
            right = right - shift if right >= 0 else -1
            if left < -1 or right < -1 or (shift and -1 in (left, right)):
                raise ValueError(
                    f"{_WHERE}: a bidirectional window with {self.q_len} queries over "
                    f"{self.kv_len} keys and padding cannot be expressed as a window"
                )
        if q1 <= q0 or k1 <= k0:
            return None
        return Piece(b, q0, q1, k0, k1, self.band.causal, left, right)

    def _with_holes(self, b: int, slots: Tensor, delta: int) -> Iterator[Piece]:
        """Padding between real tokens: list the real ones. Exact unless distances matter."""
        if self.band.left >= 0 or self.band.right >= 0 or self.band.chunk:
            raise ValueError(
                f"{_WHERE}: batch entry {b} has padding between its tokens, and a sliding window "
                "or chunked mask counts those slots; pad only at the ends of each sequence, or use "
                'attn_implementation="sdpa"'
            )
        if not self.band.causal:
            rows = torch.arange(self.q_len)
            yield Piece(b, 0, self.q_len, 0, self.kv_len, False, -1, -1, rows, slots)
            return
        rows = slots[slots >= delta] - delta
        if rows.numel():
            k1 = delta + self.q_len
            yield Piece(b, 0, self.q_len, 0, k1, True, -1, 0, rows, slots)

    def dense(self) -> Tensor:
        """The mask as a bool tensor [B, 1, q_len, kv_len], True where visible.

        Only for code that reads the mask itself; the attention function never calls this.
        """
        device = self.device
        own = torch.arange(self.q_len, device=device)[:, None] + self.delta
        slot = torch.arange(self.kv_len, device=device)[None, :]
        seen = (slot <= own) if self.band.causal else torch.ones_like(slot <= own)
        if self.band.left >= 0:
            seen = seen & (slot >= own - self.band.left)
        if self.band.right >= 0:
            seen = seen & (slot <= own + self.band.right)
        out = seen.expand(self.batch, 1, self.q_len, self.kv_len)
        if self.band.chunk:
            origin = torch.zeros(self.batch, dtype=torch.long, device=device)
            if self.chunk_origin is not None:
                origin = self.chunk_origin.to(device)
            at = origin[:, None, None, None]
            out = out & ((slot - at) // self.band.chunk == (own - at) // self.band.chunk)
        if self.padding is not None:
            out = out & self.padding.to(device)[:, None, None, :]
        if self.segments is not None:
            ids = self.segments.to(device)
            out = out & (ids[:, None, :, None] == ids[:, None, None, :])
        return out.contiguous()


def _uniform(pieces: list[Piece], batch: int) -> Piece | None:
    """The piece that every batch entry shares, if they all do: then one batched call serves."""
    if len(pieces) != batch or any(p.q_index is not None for p in pieces):
        return None
    first = pieces[0]
    same = all(p.batch == b and p[1:8] == first[1:8] for b, p in enumerate(pieces))
    return first if same else None


def plan_from_dense(mask: Tensor, batch: int, q_len: int, kv_len: int) -> Plan:
    """Pieces of a materialised mask in which every row is one interval of keys.

    Args:
        mask: [B or 1, 1, q_len, kv_len], bool (True = visible), or floating point with 0 for
            visible and the dtype's minimum or -inf for hidden.
        batch, q_len, kv_len: sizes of the call.

    Rows that see nothing get output 0. O(B Sq Sk) once per mask, against O(B H Sq Sk D) for the
    attention itself.

    Raises:
        ValueError: the mask differs between heads, is an additive bias, or has a row whose visible
            keys are not one interval.
    """
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, q_len):
        raise ValueError(
            f"{_WHERE}: attention_mask of shape {tuple(mask.shape)} does not fit {batch} sequences "
            f"of {q_len} queries and {kv_len} keys; expected [batch, 1, queries, keys]"
        )
    if mask.shape[1] != 1 and mask.stride(1) != 0:
        raise ValueError(
            f"{_WHERE}: attention_mask has {mask.shape[1]} heads; masks that differ between heads "
            'are not supported; use attn_implementation="sdpa"'
        )
    if mask.shape[3] != kv_len:
        raise ValueError(
            f"{_WHERE}: attention_mask covers {mask.shape[3]} keys, but there are {kv_len}"
        )
    mask = mask[:, 0].expand(-1, q_len, kv_len).detach()
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.is_floating_point():
        # Hidden is dtype.min by convention; sums of two such masks reach -inf. Half of it leaves
        # room for masks made in one dtype and cast to a wider one.
        seen = mask == 0
        hidden = mask <= torch.finfo(torch.float16).min / 2
        if not bool((seen | hidden).all()):
            raise ValueError(
                f"{_WHERE}: attention_mask holds values other than 0 and the dtype's minimum, an "
                'additive bias, which is not supported; use attn_implementation="sdpa"'
            )
    else:
        raise ValueError(
            f"{_WHERE}: attention_mask must be bool or floating point, got {mask.dtype}"
        )
    if kv_len == 0 or q_len == 0:
        return Plan(None, [])
    count = seen.sum(-1)
    lo = seen.to(torch.uint8).argmax(-1)
    hi = kv_len - seen.flip(-1).to(torch.uint8).argmax(-1)
    holes = (count > 0) & (hi - lo != count)
    if bool(holes.any()):
        b, i = holes.nonzero()[0].tolist()
        raise ValueError(
            f"{_WHERE}: row {i} of batch entry {b} of the 4-D attention_mask sees keys with gaps "
            "between them; only masks whose rows are intervals are supported (causal, windows, "
            'padding, packing, prefix); use attn_implementation="sdpa"'
        )
    lo, hi = torch.where(count > 0, lo, -1), torch.where(count > 0, hi, -1)
    rows = [list(_runs(b, lo[b].tolist(), hi[b].tolist())) for b in range(mask.shape[0])]
    pieces = [p._replace(batch=b) for b in range(batch) for p in rows[b % len(rows)]]
    return Plan(_uniform(pieces, batch), pieces)


def _runs(b: int, lo: list[int], hi: list[int]) -> Iterator[Piece]:
    """Maximal runs of rows whose interval ends both move by a constant 0 or 1 per row."""
    start = 0
    n = len(lo)
    while start < n:
        if lo[start] < 0:
            start += 1
            continue
        stop, step = start + 1, None
        while stop < n and lo[stop] >= 0:
            move = (lo[stop] - lo[stop - 1], hi[stop] - hi[stop - 1])
            if move not in ((0, 0), (0, 1), (1, 0), (1, 1)) or (step is not None and move != step):
                break
            step = move
            stop += 1
        lo_step, hi_step = step or (0, 0)
        k0, k1, rows = lo[start], hi[stop - 1], stop - start
        # Bottom-right: row r is centred on slot r + (k1 - k0 - rows) of the piece.
        left = k1 - k0 - rows if lo_step else -1
        causal = bool(hi_step)
        yield Piece(b, start, stop, k0, k1, causal, left, 0 if causal else -1)
        start = stop
