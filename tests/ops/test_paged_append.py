"""Writing pages: values, codes, rotation, bounds of pages, and nothing else touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.reference.paged import decoded, encoded
from attnforge.testing.cases import Target
from attnforge.testing.compare import same_bits
from attnforge.testing.paged import CODES

PAGES, HEADS, DIM, DV = 11, 3, 48, 40
LENGTHS, ROWS = (5, 0, 14, 3), (7, 9, 0, 1)


def table(size: int) -> Tensor:
    width = -(-21 // size) + 1
    ids = torch.full((4, width), 2147480000, dtype=torch.int32)
    at = 0
    order = torch.randperm(4 * width).to(torch.int32)
    for b in range(4):
        need = -(-(LENGTHS[b] + ROWS[b]) // size)
        ids[b, :need] = order[at : at + need]
        at += need
    return ids


def pages(size: int, ids: Tensor, dim: int, dtype: torch.dtype, layout: str) -> Tensor:
    count = ids.numel()
    code = dtype in CODES.values()
    x = torch.full((count, size, HEADS, dim // (2 if dtype is torch.uint8 else 1)), 77.0)
    x = x.to(dtype) if code else torch.full_like(x, float("nan"), dtype=dtype)
    return x.transpose(1, 2).contiguous() if layout == "HND" else x


def new_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    total = sum(ROWS) + 2
    k = torch.randn(total, HEADS, DIM).to(dtype)
    v = torch.randn(total, HEADS, DV).to(dtype)
    return k, v, torch.tensor([0, *ROWS]).cumsum(0).to(torch.int32)


def written(x: Tensor, ids: Tensor, size: int, layout: str, b: int) -> Tensor:
    """The slots [rows, HEADS, ..] that sequence b got, as raw bytes for codes."""
    if layout == "HND":
        x = x.transpose(1, 2)
    key = torch.arange(LENGTHS[b], LENGTHS[b] + ROWS[b])
    if x.dtype.itemsize == 1:
        x = x.contiguous().view(torch.uint8)
    return x[ids[b, key // size].long(), key % size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *CODES.values()])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_values(target: Target, dtype: torch.dtype, size: int, layout: str) -> None:
    # dense_paged 5.2, 27: cached values are bit-equal, every other slot is as it was
    ids, code = table(size), dtype in CODES.values()
    k, v, ends = new_rows(torch.bfloat16 if code else dtype)
    k[3, 1, 5], k[4, 0, 2], k[5, 0, 3] = float("nan"), 1e30, -torch.inf
    k_pages, v_pages = (pages(size, ids, d, dtype, layout) for d in (DIM, DV))
    before = [x.clone() for x in (k_pages, v_pages)]
    extra: dict[str, Any] = {}
    if code:
        extra["kv_scales"] = (torch.rand(HEADS) * 0.2 + 0.01, torch.rand(HEADS) * 0.2 + 0.01)
        if dtype is not CODES["fp8"]:
            extra["kv_zeros"] = (torch.rand(HEADS) * 4, torch.rand(HEADS) * 4)
    attnforge.paged_append(
        k, v, k_pages, v_pages, block_table=ids, cu_seqlens=ends, kv_layout=layout,
        cache_seqlens=torch.tensor(LENGTHS, dtype=torch.int32), backend=target.backend, **extra,
    )  # fmt: skip
    for n, (new, held, old) in enumerate(zip((k, v), (k_pages, v_pages), before, strict=True)):
        scale, zero = (extra.get(name, (None, None))[n] for name in ("kv_scales", "kv_zeros"))
        want = encoded(new, dtype, None if scale is None else scale.expand(len(new), HEADS),
                       None if zero is None else zero.expand(len(new), HEADS))  # fmt: skip
        if code:
            want = want.view(torch.uint8)
        count = 0
        for b in range(4):
            got = written(held, ids, size, layout, b)
            assert same_bits(got, want[ends[b] : ends[b + 1]]), (n, b)
            count += got.numel()
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert int((held.view(width) != old.view(width)).sum()) <= count


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_rotation(target: Target, interleaved: bool, own_positions: bool, per_head: bool) -> None:
    ids = table(4)
    k, v, ends = new_rows(torch.float32)
    cos, sin = (torch.rand(HEADS if per_head else 1, 30, 16) * 2 - 1 for _ in range(2))
    positions = torch.randint(-2, 34, (len(k),), dtype=torch.int32)
    k_pages, v_pages = (pages(4, ids, d, torch.float32, "NHD") for d in (DIM, DV))
    attnforge.paged_append(
        k, v, k_pages, v_pages, block_table=ids, cu_seqlens=ends, rope=(cos, sin),
        cache_seqlens=torch.tensor(LENGTHS, dtype=torch.int32), rope_interleaved=interleaved,
        positions=positions if own_positions else None, backend=target.backend,
    )  # fmt: skip
    for b in range(4):
        mine = slice(int(ends[b]), int(ends[b + 1]))
        at = positions[mine] if own_positions else torch.arange(LENGTHS[b], LENGTHS[b] + ROWS[b])
        at = at.long().clamp(0, 29)
        c, s = (x.double()[:, at].transpose(0, 1) for x in (cos, sin))  # [S, H|1, 16]
        x = k[mine].double()
        first, second = (x[..., 0:32:2], x[..., 1:32:2]) if interleaved else (
            x[..., :16], x[..., 16:32]
        )  # fmt: skip
        turned = (first * c - second * s, second * c + first * s)
        joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        got = written(k_pages, ids, 4, "NHD", b)
        torch.testing.assert_close(got[..., :32].double(), joined, rtol=1e-6, atol=1e-6)
        assert same_bits(got[..., 32:], k[mine, :, 32:])
        assert same_bits(written(v_pages, ids, 4, "NHD", b), v[mine])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_page_bounds(target: Target, dtype: torch.dtype) -> None:
    # Token by token and all at once give the same bounds, those of what is stored.
    size, ids = 4, table(4)
    scales = (torch.rand(HEADS) * 0.2 + 0.01,) * 2
    found = []
    for step in (1, 13):
        torch.manual_seed(1)
        k, v = torch.randn(4, 13, HEADS, DIM), torch.randn(4, 13, HEADS, DV)
        if dtype is torch.bfloat16:
            k, v = k.bfloat16(), v.bfloat16()
        k_pages, v_pages = (pages(size, ids, d, dtype, "NHD") for d in (DIM, DV))
        low = torch.full((len(k_pages), HEADS, DIM), float("nan"),
                         dtype=torch.float32 if dtype is torch.int8 else dtype)  # fmt: skip
        high = low.clone()
        rows = torch.arange(ids.numel(), dtype=torch.int32)[: 4 * 4].view(4, 4)
        for first in range(0, 13, step):
            part = slice(first, first + step)
            attnforge.paged_append(
                k[:, part], v[:, part], k_pages, v_pages, block_table=rows, page_min=low,
                cache_seqlens=torch.full((4,), first, dtype=torch.int32), page_max=high,
                kv_scales=scales if dtype is torch.int8 else None, backend=target.backend,
            )  # fmt: skip
        assert same_bits(low[16:], torch.full_like(low[16:], float("nan")))
        value = decoded(k_pages[:16], scales[0].expand(16, size, HEADS), None)
        for b in range(4):
            for n in range(4):
                own = value[4 * b + n, : min(size, 13 - n * size)]
                assert torch.equal(low[4 * b + n], own.amin(0).to(low.dtype))
                assert torch.equal(high[4 * b + n], own.amax(0).to(low.dtype))
        found.append((low, high))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_lengths_per_head_and_latent(target: Target) -> None:
    ids = torch.arange(6, dtype=torch.int32).view(2, 3)
    lengths = torch.tensor([[0, 5, 2], [7, 3, 1]], dtype=torch.int32)
    k = torch.randn(2, 4, HEADS, DIM)
    k_pages = torch.full((6, 4, HEADS, DIM), float("nan"))
    attnforge.paged_append(k, None, k_pages, None, block_table=ids, cache_seqlens=lengths,
                           backend=target.backend)  # fmt: skip
    flat = k_pages.view(2, 12, HEADS, DIM)
    for b in range(2):
        for h in range(HEADS):
            first = int(lengths[b, h])
            assert torch.equal(flat[b, first : first + 4, h], k[b, :, h])
            assert flat[b, :first, h].isnan().all()
            assert flat[b, first + 4 :, h].isnan().all()
