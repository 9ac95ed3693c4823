"""Cases of the paged family: caches in shuffled pages, poison wherever nothing may be read, truth.

    inputs = PagedCase(lengths=(70, 0, 31), rows=(1, 0, 5), page_size=16).make()
    compare(inputs.forward("cpu"), inputs.truth()).check()

A sequence's truth is that of dense attention over its decoded keys (``oracle``). Unused slots and
pages are NaN (codes: the largest), entries of the table behind a length are nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import attnforge
from attnforge.reference.paged import code_zero, decoded, encoded
from attnforge.testing import oracle
from attnforge.testing.oracle import Truth

__all__ = ["CODES", "PagedCase", "PagedInputs", "planned", "quantised"]

CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
# Where weights that meet a scale are rounded to 16 bits, small ones leave the normal range of fp16
# and are off by a part of a large code.
_ROUNDED_CODES = 4.0
_NONSENSE = (2147480000, -1, -(1 << 31), (1 << 31) - 1)


def quantised(x: Tensor, code: str, per: str, zeros: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of pages ``x`` [P, page_size, Hk, D]; per "head", "page", "token"."""
    dims = {"head": (0, 1, 3), "page": (1, 3), "token": (3,)}[per]
    low, high = x.amin(dims), x.amax(dims)
    if zeros:
        scale = ((high - low) / (255 if code == "int8" else 15)).clamp_min(1e-6)
        zero = (-128 if code == "int8" else 0) - low / scale
    else:
        top = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[code]
        scale, zero = torch.maximum(low.abs(), high.abs()).clamp_min(1e-6) / top, None
    wide = [None if s is None else s.view(_wide(s, x)) for s in (scale, zero)]
    return encoded(x, CODES[code], wide[0], wide[1]), scale, zero


def _wide(s: Tensor, x: Tensor) -> tuple[int, int, int]:
    heads = x.shape[2]
    lead = {1: (1, 1), 2: (x.shape[0], 1)}.get(s.dim(), (x.shape[0], x.shape[1]))
    return (*lead, heads)


def _code_size(codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """|code| + |zero|, both around the centre of their range, times |scale|; of others |x|."""
    size = decoded(codes, None, None).abs()
    if zero is not None:
        size = size + (zero - code_zero(codes.dtype)).abs().unsqueeze(-1)
    return size if scale is None else size * scale.abs().unsqueeze(-1)


def planned(cuts: Sequence[Sequence[int]], room: int, batch: int = 0) -> tuple[Tensor, Tensor]:
    """The tensors of a split plan whose sequences end their pieces at ``cuts``, nonsense behind.

    room: pieces that it has; batch: sequences that it has, at least those of ``cuts``.
    """
    pieces = torch.tensor([[-1], [_NONSENSE[0]], [_NONSENSE[2]]]).repeat(1, room)
    pieces[0, 1::2] = _NONSENSE[3]  # the planner writes -1
    first, at = torch.zeros(max(batch, len(cuts)) + 1, dtype=torch.int32), 0
    for b, ends in enumerate(cuts):
        for begin, end in zip((0, *ends), ends, strict=False):
            pieces[:, at] = torch.tensor([b, begin, end])
            at += 1
        first[b + 1 :] = at
    return pieces.to(torch.int32), first


@dataclass(frozen=True)
class PagedCase:
    """One call. lengths: keys of each sequence, or one tuple per sequence with one per KV head.

    rows: query rows of each sequence; more than one size makes a packed call. layout: NHD or HND;
    ``strided`` cuts the pages out of larger buffers, V's unlike K's.
    """

    lengths: tuple[Any, ...] = (70, 33)
    rows: tuple[int, ...] = (1, 1)
    page_size: int = 16
    heads_q: int = 4
    heads_k: int = 2
    head_dim: int = 32
    v_head_dim: int = 0
    dtype: torch.dtype = torch.float32
    code: str = ""  # a key of CODES, or empty for pages of dtype
    scales: str = "head"
    zeros: bool = False
    layout: str = "NHD"
    strided: bool = False
    packed: bool = False
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    tree: bool = False
    latent: bool = False  # V is the first v_head_dim channels of K
    seed: int = 0

    def make(self) -> PagedInputs:
        """Tensors and keywords."""
        g = torch.Generator().manual_seed(self.seed)
        batch, size, dv = len(self.lengths), self.page_size, self.v_head_dim or self.head_dim
        longest = [x if isinstance(x, int) else max(x) for x in self.lengths]
        need = [-(-n // size) for n in longest]
        count = sum(need) + 3
        order = torch.randperm(count, generator=g)
        width = max([*need, 1]) + 2
        table = torch.tensor(_NONSENSE)[torch.arange(batch * width) % 4].view(batch, width)
        k = torch.randn(count, size, self.heads_k, self.head_dim, generator=g)
        v = torch.randn(count, size, self.heads_k, dv, generator=g) + 0.5
        if self.latent:
            v = k[..., :dv]
        used = torch.zeros(count, size, self.heads_k, dtype=torch.bool)
        at = 0
        for b, n in enumerate(need):
            pages = order[at : at + n]
            table[b, :n] = pages
            at += n
            own = self.lengths[b]
            for h in range(self.heads_k):
                length = own if isinstance(own, int) else own[h]
                key = torch.arange(length)
                used[pages[key // size], key % size, h] = True
        stored, options = self._stored(k, v, used)
        packed = self.packed or len(set(self.rows)) > 1
        total = sum(self.rows) + (3 if packed else 0)
        shape = (total,) if packed else (batch, self.rows[0])
        q = torch.randn(*shape, self.heads_q, self.head_dim, generator=g).to(self.dtype)
        options |= {
            "block_table": table.to(torch.int32),
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32),
            "kv_layout": self.layout,
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
        }
        if packed:
            ends = torch.tensor([0, *self.rows]).cumsum(0)
            options["cu_seqlens_q"] = ends.to(torch.int32)
        if self.alibi:
            options["alibi_slopes"] = torch.rand(batch, self.heads_q, generator=g)
        if self.sinks:
            options["sinks"] = torch.randn(self.heads_q, generator=g)
        if self.tree:
            n = self.rows[0]
            options["tree_mask"] = torch.rand(batch, n, n, generator=g) < 0.5
        return PagedInputs(self, q, *stored, options)

    def _stored(
        self, k: Tensor, v: Tensor, used: Tensor
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        options: dict[str, Any] = {}
        found: list[Tensor] = []
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for x in (k, v):
            if not self.code:
                found.append(x.to(self.dtype).masked_fill(~used.unsqueeze(-1), float("nan")))
                continue
            x, scale, zero = quantised(x, self.code, self.scales, self.zeros)
            raw = x.view(torch.uint8)
            raw[~used] = 0x7F if self.code == "fp8" else 255
            found.append(x)
            pairs.append((scale, zero))
        if pairs:
            options["kv_scales"] = (pairs[0][0], pairs[1][0])
            if self.zeros:
                options["kv_zeros"] = (pairs[0][1], pairs[1][1])
        if self.latent:
            width = v.shape[-1] // (2 if self.code == "int4" else 1)
            found[1] = found[0][..., :width]
        else:
            found = [self._placed(x, n) for n, x in enumerate(found)]
        return (found[0], found[1]), options

    def _placed(self, x: Tensor, extra: int) -> Tensor:
        if self.layout == "HND":
            x = x.transpose(1, 2).contiguous()
        if not self.strided:
            return x
        p, a, b, d = x.shape
        room = x.new_zeros((p, a + 1, b + 1 + extra, d + 8)).view(torch.uint8)
        room.fill_(255)  # NaN in every floating dtype
        view = room.view(x.dtype)[:, :a, 1 : 1 + b, 4 : 4 + d]
        view.view(torch.uint8).copy_(x.view(torch.uint8)) if x.dtype.itemsize == 1 else view.copy_(
            x
        )
        return view


@dataclass(frozen=True)
class PagedInputs:
    """The tensors of a call and its keywords."""

    case: PagedCase
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def forward(self, backend: str, **more: Any) -> dict[str, Tensor]:
        """``out`` and ``lse`` of ``paged_attention``."""
        out, lse = attnforge.paged_attention(
            self.q, self.k_pages, self.v_pages, return_lse=True, backend=backend,
            **{**self.options, **more},
        )  # fmt: skip
        return {"out": out, "lse": lse}

    def with_(self, **more: Any) -> PagedInputs:
        """The same with other tensors (q, k_pages, v_pages) or keywords."""
        own = {n: more.pop(n) for n in ("q", "k_pages", "v_pages") if n in more}
        return replace(self, **own, options={**self.options, **more})

    def keys(self, b: int, head: int) -> tuple[Tensor, Tensor]:
        """Decoded k [N, D] and v [N, Dv] of one KV head of one sequence."""
        k, v = (decoded(*stored).squeeze(1) for stored in self._held(b, head))
        return k, v

    def sizes(self, b: int, head: int) -> tuple[Tensor, Tensor]:
        """What kernels add up of them: codes around 0 and, apart, zeros, each times the scale."""
        k, v = (_code_size(*stored).squeeze(1) for stored in self._held(b, head))
        return k, v

    def _held(self, b: int, head: int) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """K's and V's rows [N, 1, D] as pages hold them, their scales and zeros [N, 1]."""
        o, size = self.options, self.case.page_size
        own = o["cache_seqlens"][b]
        length = int(own if own.dim() == 0 else own[head])
        key = torch.arange(length)
        page, slot = o["block_table"][b, key // size].long(), key % size
        found = []
        for n, pages in enumerate((self.k_pages, self.v_pages)):
            if self.case.layout == "HND":
                pages = pages.transpose(1, 2)
            codes = pages[:, :, head].contiguous()
            if codes.dtype.itemsize == 1:
                rows = codes.view(torch.uint8)[page, slot].view(codes.dtype)
            else:
                rows = codes[page, slot]
            pair = [None if o.get(name) is None else self._at(o[name][n], page, slot, head)
                    for name in ("kv_scales", "kv_zeros")]  # fmt: skip
            found.append((rows.unsqueeze(1), pair[0], pair[1]))
        return found

    def _at(self, x: Tensor, page: Tensor, slot: Tensor, head: int) -> Tensor:
        wide = x.view(_wide(x, self.k_pages.transpose(1, 2) if self.case.layout == "HND"
                            else self.k_pages))  # fmt: skip
        own = wide[page if wide.shape[0] > 1 else 0, slot if wide.shape[1] > 1 else 0, head]
        return own.reshape(-1, 1) if own.dim() else own.expand(page.shape[0], 1)

    def truth(self, rounded: bool | None = None) -> Truth:
        """Values and bounds of ``out`` and ``lse``; rounded: see ``oracle.truth``."""
        if rounded is None:
            rounded = oracle.rounds_weights(self.q, self.k_pages)
        c, o, q = self.case, self.options, self.q
        dv = c.v_head_dim or c.head_dim
        packed = q.dim() == 3
        values = [torch.zeros(*q.shape[:-1], dv, dtype=torch.float64),
                  torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -torch.inf,
                             dtype=torch.float64)]  # fmt: skip
        bounds = [torch.zeros_like(values[0]), torch.zeros_like(values[1])]
        group, at = c.heads_q // c.heads_k, 0
        for b, rows in enumerate(c.rows):
            for h in range(c.heads_k):
                mine = slice(h * group, (h + 1) * group)
                place = (slice(at, at + rows), mine) if packed else (b, slice(None), mine)
                stat = (mine, slice(at, at + rows)) if packed else (b, mine)
                k, v = self.keys(b, h)
                single = {n: o[n] for n in ("causal", "window_size", "softcap")}
                if c.alibi:
                    single["alibi_slopes"] = o["alibi_slopes"][b, mine]
                if c.sinks:
                    single["sinks"] = o["sinks"][mine]
                if c.tree:
                    cut = max(0, rows - k.shape[0])
                    single["mask"] = o["tree_mask"][b, :, cut:].view(1, 1, rows, -1)
                sizes = self.sizes(b, h)
                slack = _ROUNDED_CODES if c.code and rounded else 1.0
                found = oracle.truth(
                    q[place][None], k[None, :, None], v[None, :, None], single, rounded=rounded,
                    sizes=(sizes[0][None, :, None], sizes[1][None, :, None]),
                )  # fmt: skip
                for n, (name, where) in enumerate((("out", place), ("lse", stat))):
                    values[n][where] = found.values[name][0]
                    bounds[n][where] = found.bounds[name][0] * slack
            at += rows
        result = Truth()
        result.put("out", values[0], bounds[0])
        result.put("lse", values[1], bounds[1])
        return result
