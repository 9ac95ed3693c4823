"""Benchmark cases of the `paged` family: caches in shuffled pages against what one would do else.

Peers: our decode over the same cache in one piece; torch, which has to gather the pages first
(plain, and with the heads of a group folded into rows); pages of bf16 for pages of codes; the same
requests without sharing for a cascade; a copy of as many bytes for an append.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

import attnforge
from attnforge.testing.bench import QUICK_REPEATS, REPEATS, Case, ErrorStat, Goal, Workload
from attnforge.testing.oracle import truth
from attnforge.testing.paged import CODES, quantised

__all__ = ["Shape", "build", "sweep", "table"]

_SPARE = 64  # keys of a request beyond a shared prefix
_ERROR_MAX_KEYS = 8192  # of one head in float64


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem: bf16 queries over `batch` sequences of `keys` keys."""

    kind: str  # decode, chunk, cascade, append
    keys: int
    batch: int = 8
    rows: int = 1
    page_size: int = 16
    code: str = ""  # of the pages; empty is bf16
    heads_q: int = 32
    heads_k: int = 8
    head_dim: int = 128
    v_head_dim: int = 128

    @property
    def name(self) -> str:
        heads = (
            "" if (self.heads_q, self.heads_k) == (32, 8) else f"-h{self.heads_q}-{self.heads_k}"
        )
        return (
            f"{self.kind}-{self.code or 'bf16'}-b{self.batch}-s{self.keys}-p{self.page_size}{heads}"
        )

    @property
    def title(self) -> str:
        return (
            f"{self.kind} {self.code or 'bf16'} pages of {self.page_size}, {self.batch} x "
            f"{self.keys} keys, {self.heads_q}q/{self.heads_k}kv D{self.head_dim}"
        )

    @property
    def bytes(self) -> int:
        """K and V of all sequences (a prefix once), as they are stored."""
        keys = self.batch * self.keys
        if self.kind == "cascade":
            keys = self.keys + self.batch * _SPARE
        width = {"": 16, "fp8": 8, "int8": 8, "int4": 4}[self.code]
        values = 0 if self.head_dim == 576 else self.v_head_dim
        return keys * self.heads_k * (self.head_dim + values) * width // 8

    @property
    def flops(self) -> int:
        """Of a chunk of rows at the end of its sequence."""
        pairs = self.rows * self.keys - self.rows * (self.rows - 1) // 2
        return 2 * self.batch * self.heads_q * pairs * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The cache in one piece and in pages."""

    q: torch.Tensor
    k: torch.Tensor  # [B, S, Hk, D]
    v: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None

    def attend(self, backend: str | None) -> torch.Tensor:
        """Paged attention."""
        out: torch.Tensor = attnforge.paged_attention(
            self.q, self.k_pages, self.v_pages, block_table=self.table,
            cache_seqlens=self.lengths, kv_scales=self.scales, backend=backend,
        )  # fmt: skip
        return out

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as torch wants them, [B, Hk, S, D]."""
        index = self.table.long()
        k, v = (x[index].flatten(1, 2).transpose(1, 2) for x in (self.k_pages, self.v_pages))
        return k, v


def _make(shape: Shape) -> Inputs:
    g = torch.Generator().manual_seed(0)
    b, s, hk, d, size = shape.batch, shape.keys, shape.heads_k, shape.head_dim, shape.page_size
    count = b * s // size
    table = torch.randperm(count, generator=g).to(torch.int32).view(b, -1)
    place = torch.empty(count, dtype=torch.int64)
    place[table.flatten().long()] = torch.arange(count)
    q = torch.randn(b, shape.rows, shape.heads_q, d, generator=g).bfloat16()
    k = torch.randn(b, s, hk, d, generator=g).bfloat16()
    v = k[..., : shape.v_head_dim]
    if d != 576:
        v = torch.randn(b, s, hk, shape.v_head_dim, generator=g).bfloat16()
    pages = [x.reshape(count, size, hk, -1)[place] for x in (k, v)]
    scales = None
    if shape.code:
        stored = [quantised(x.float(), shape.code, "head", False) for x in pages]
        pages, scales = [x[0] for x in stored], (stored[0][1], stored[1][1])
    elif d == 576:
        pages[1] = pages[0][..., : shape.v_head_dim]
    lengths = torch.full((b,), s, dtype=torch.int32)
    return Inputs(q, k, v, pages[0], pages[1], table, lengths, scales)


def _errors(t: Inputs, backend: str | None) -> dict[str, ErrorStat]:
    """Of the first KV head of the first sequence, where pages hold what the cache held."""
    if t.scales is not None or t.k.shape[1] > _ERROR_MAX_KEYS:
        return {}
    group = t.q.shape[2] // t.k.shape[2]
    want = truth(t.q[:1, :, :group], t.k[:1, :, :1], t.v[:1, :, :1], {"causal": True})
    error = (t.attend(backend)[:1, :, :group].double() - want.values["out"]).abs()
    return {"attnforge": ErrorStat(float(error.max()), float((error / want.bounds["out"]).max()))}


def _decode(shape: Shape, backend: str | None) -> Workload:
    t = _make(shape)

    def sdpa(fold: bool) -> torch.Tensor:
        k, v = t.gathered()
        if fold:  # heads of a group as rows of one
            q = t.q.view(shape.batch, shape.heads_k, -1, shape.head_dim)
            return scaled_dot_product_attention(q, k, v)
        return scaled_dot_product_attention(t.q.transpose(1, 2), k, v, enable_gqa=True)

    peers: dict[str, Callable[[], object] | str] = {}
    if shape.code:
        plain = _make(replace(shape, code=""))
        peers["bf16 pages"] = lambda: plain.attend(backend)
    else:
        peers["contiguous"] = lambda: attnforge.flash_decode(
            t.q, t.k, t.v, cache_seqlens=t.lengths, backend=backend
        )
        peers["sdpa gathered"] = lambda: sdpa(False)
        peers["sdpa folded"] = lambda: sdpa(True)
    return Workload(lambda: t.attend(backend), peers, lambda: _errors(t, backend))


def _chunk(shape: Shape, backend: str | None) -> Workload:
    t = _make(shape)
    peers: dict[str, Callable[[], object] | str] = {
        "contiguous": lambda: attnforge.flash_attention(t.q, t.k, t.v, causal=True, backend=backend)
    }
    return Workload(lambda: t.attend(backend), peers)


def _cascade(shape: Shape, backend: str | None) -> Workload:
    whole = replace(shape, kind="decode", keys=shape.keys + _SPARE)
    t = _make(whole)
    shared, pages = t.table.clone(), shape.keys // shape.page_size
    shared[:, :pages] = shared[:1, :pages]
    groups = torch.tensor([0, shape.batch], dtype=torch.int32)
    prefix = torch.tensor([shape.keys], dtype=torch.int32)

    def cascade() -> torch.Tensor:
        out: torch.Tensor = attnforge.cascade_attention(
            t.q, t.k_pages, t.v_pages, block_table=shared, cache_seqlens=t.lengths,
            cu_groups=groups, prefix_lens=prefix, backend=backend,
        )  # fmt: skip
        return out

    return Workload(cascade, {"unshared": lambda: t.attend(backend)})


def _append(shape: Shape, backend: str | None) -> Workload:
    t = _make(shape)
    start = torch.zeros(shape.batch, dtype=torch.int32)
    room = [torch.empty_like(x) for x in (t.k, t.v)]

    def append() -> None:
        attnforge.paged_append(
            t.k, t.v, t.k_pages, t.v_pages, block_table=t.table, cache_seqlens=start,
            kv_scales=t.scales, backend=backend,
        )  # fmt: skip

    def copy() -> None:
        room[0].copy_(t.k)
        room[1].copy_(t.v)

    return Workload(append, {"copy": copy})


_BUILD = {"decode": _decode, "chunk": _chunk, "cascade": _cascade, "append": _append}


def build(shape: Shape, backend: str | None = None) -> Workload:
    """Inputs and every side of one case."""
    return _BUILD[shape.kind](shape, backend)


def _peers(shape: Shape) -> tuple[str, ...]:
    if shape.kind == "decode":
        return ("bf16 pages",) if shape.code else ("contiguous", "sdpa gathered", "sdpa folded")
    return {"chunk": ("contiguous",), "cascade": ("unshared",), "append": ("copy",)}[shape.kind]


def _case(
    shape: Shape, repeats: int, goals: dict[str, Goal] | None = None, series: str = "", x: int = 0
) -> Case:
    compute = shape.kind == "chunk"
    return Case(
        name=shape.name,
        title=shape.title,
        family="paged",
        resource="compute" if compute else "read",
        work=float(shape.flops if compute else shape.bytes),
        build=lambda backend: build(shape, backend),
        peers=_peers(shape),
        goals=goals or {},
        series=series,
        x=x,
        repeats=repeats,
    )


def table(quick: bool = False) -> list[Case]:
    """Decode of 8 x 8k in bf16 and codes, a chunk of a prefill, a shared prefix, an append."""
    n = QUICK_REPEATS if quick else REPEATS
    decode = Shape("decode", 8192)
    goals = {"contiguous": Goal(0.83, 0.95), "sdpa gathered": Goal(15, 20),
             "sdpa folded": Goal(3, 5)}  # fmt: skip
    return [
        _case(decode, n, goals),
        _case(replace(decode, code="fp8"), n),
        _case(replace(decode, code="int8"), n, {"bf16 pages": Goal(1.4, 1.7)}),
        _case(replace(decode, code="int4"), n, {"bf16 pages": Goal(2, 2.5)}),
        _case(Shape("chunk", 4096, batch=1, rows=1024), n, {"contiguous": Goal(0.9, 1.0)}),
        _case(Shape("cascade", 4096, batch=16), n, {"unshared": Goal(4, 6)}),
        _case(Shape("cascade", 4096, batch=16, heads_k=32), n, {"unshared": Goal(4, 6)}),
        _case(Shape("append", 2048), n, {"copy": Goal(0.6, 0.9)}),
    ]


def sweep(quick: bool = False) -> list[Case]:
    """Decode over context, batch, page size; over context for each kind of page."""
    cases = []
    contexts = (1024, 8192) if quick else (512, 1024, 2048, 4096, 8192)
    for code in ("", *CODES):
        name = f"paged decode over keys, {code or 'bf16'} pages of 16, 8 requests"
        shapes = [Shape("decode", s, code=code) for s in contexts]
        cases += [_case(x, QUICK_REPEATS, series=name, x=x.keys) for x in shapes]
    shapes = [Shape("decode", 2048, batch=b) for b in ((1, 16) if quick else (1, 2, 4, 8, 16, 32))]
    name = "paged decode over requests, bf16 pages of 16, 2048 keys each"
    cases += [_case(x, QUICK_REPEATS, series=name, x=x.batch) for x in shapes]
    sizes = (4, 64) if quick else (1, 4, 16, 64, 256)
    name = "paged decode over page size, bf16, 8 x 2048 keys"
    shapes = [Shape("decode", 2048, page_size=n) for n in sizes]
    return cases + [_case(x, QUICK_REPEATS, series=name, x=x.page_size) for x in shapes]
