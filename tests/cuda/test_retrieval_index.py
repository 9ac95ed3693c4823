"""CUDA scores, selections and LSH under the emulator: what the reference says, bit by bit where
results are integers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge import LSHIndex, retrieval
from attnforge.testing.compare import same_bits
from attnforge.testing.retrieval import grown_tables

pytestmark = pytest.mark.usefixtures("twin")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both(call: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Of the emulated kernels and of the reference."""
    return tuple(call(*args, **options, backend=name) for name in ("emulated", "reference"))


# ---- scores ----


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_key_scores_of_every_kernel(dim: int, dtype: torch.dtype) -> None:
    """40 or 10 rows of a KV head past 70 keys; what is not in use is not read."""
    q, k = torch.randn(2, 10, 4, dim - 8).to(dtype), torch.randn(2, 70, 1, dim - 8).to(dtype)
    if dim == 64:
        q, k = q[:, :5, :2], k.expand(-1, -1, 2, -1)
    used = torch.tensor([70, 23], dtype=torch.int32)
    k = k.clone()
    k[1, 23:] = math.nan
    got, _ = both(retrieval.score_keys, q, k, cache_seqlens=used)
    rows = q.double().transpose(1, 2)
    keys = k.double().permute(0, 2, 3, 1).repeat_interleave(q.shape[2] // k.shape[2], 1)
    want, size = rows @ keys, rows.abs() @ keys.abs()
    scale = q.shape[3] ** -0.5
    assert (got[1, ..., 23:] == -math.inf).all()
    hidden = torch.zeros_like(got, dtype=torch.bool)
    hidden[1, ..., 23:] = True
    assert ((got - scale * want).abs() <= 2e-6 * scale * size + 1e-30)[~hidden].all()


@pytest.mark.parametrize("page_size", [3, 16])
def test_key_scores_in_pages(page_size: int) -> None:
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 48, 2, 16)
    order = torch.randperm(96 // page_size)
    pages = torch.empty(96 // page_size, page_size, 2, 16)
    pages[order] = k.reshape(-1, page_size, 2, 16)
    used = torch.tensor([48, 17], dtype=torch.int32)
    table = order.view(2, -1).int()
    table[1, -1] = 999  # of no page, and behind what is in use
    got = retrieval.score_keys(q, pages, block_table=table, cache_seqlens=used, backend="emulated")
    want = retrieval.score_keys(q, k, cache_seqlens=used, backend="emulated")
    assert same_bits(got, want)
    table[0, 0] = -1
    got = retrieval.score_keys(q, pages, block_table=table, cache_seqlens=used, backend="emulated")
    assert (got[0, ..., :page_size] == -math.inf).all()
    assert same_bits(got[..., page_size:], want[..., page_size:])


def test_centroid_scores() -> None:
    q, c = torch.randn(1, 2, 4, 16), torch.randn(1, 300, 2, 16)
    counts = torch.randint(0, 9, (1, 2, 300), dtype=torch.int32)
    size = counts.repeat_interleave(2, 1).unsqueeze(2).expand(1, 4, 2, 300)
    for scale, digits in ((30.0, 1e-4), (3000.0, 1e-2)):  # of logits of 8000 few are left
        got = retrieval.score_centroids(scale * q, c, counts, backend="emulated")
        total = (got.exp() * size).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=digits, atol=0)
        assert (got[size == 0] == -math.inf).all()
    none = retrieval.score_centroids(q, c, torch.zeros_like(counts), backend="emulated")
    assert (none == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [24, 136, 264])
def test_page_scores_of_every_kernel(dim: int, dtype: torch.dtype) -> None:
    """18 rows, in tiles of 16, past 36 pages, of which a block has 32; infinities count."""
    q, k = torch.randn(2, 9, 4, dim).to(dtype), torch.randn(2, 70, 2, dim).to(dtype)
    k[0, 3, 0, 5], k[0, 40, 1, 2] = math.inf, -math.inf
    low, high = retrieval.page_bounds(k, 2)
    used = torch.tensor([35, 20], dtype=torch.int32)
    got = retrieval.score_pages(q, low, high, used=used, backend="emulated")
    want = retrieval.score_pages(
        *(x.double() for x in (q, low, high)), used=used, backend="reference"
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    beside = torch.stack((low, high), 3).transpose(1, 2).contiguous().transpose(1, 2).unbind(3)
    assert same_bits(retrieval.score_pages(q, *beside, used=used, backend="emulated"), got)


def test_page_scores_through_a_table() -> None:
    """Bounds of fp32 beside queries of 16 bits; pages that are not there are clamped."""
    q, k = torch.randn(2, 1, 4, 24).half(), torch.randn(2, 70, 2, 24)
    low, high = retrieval.page_bounds(k, 16)
    order = torch.randperm(10)
    stored = [torch.empty(10, 2, 24) for _ in range(2)]
    for x, y in zip(stored, (low, high), strict=True):
        x[order] = y.flatten(0, 1)
    table = order.view(2, 5).int()
    got = retrieval.score_pages(q, *stored, block_table=table, backend="emulated")
    assert same_bits(got, retrieval.score_pages(q, low, high, backend="emulated"))
    tops = retrieval.score_pages(q, *stored, block_table=table, grouped=True, backend="emulated")
    assert same_bits(tops, got.unflatten(1, (2, 2)).amax(2))
    table[1, 2] = 1 << 20
    for a, b in zip(*both(retrieval.score_pages, q, *stored, block_table=table), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- selections: the reference is a sort, and both say the same ----

ODD = [0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-40, math.inf, -math.inf, math.nan, 1e30]


def choices() -> Tensor:
    """Rows with odd values, ties, nothing but ties, and nothing at all; two steps of a block."""
    rows = torch.randn(5, 2100).round(decimals=1)
    rows[0, 17 : 17 + len(ODD)] = torch.tensor(ODD)
    rows[2], rows[3] = 0.5, -math.inf
    return rows


def same_choice(select: Any, scores: Tensor, *args: Any, **options: Any) -> None:
    for a, b in zip(*both(select, scores, *args, **options), strict=True):
        assert torch.equal(a, b), (select.__name__, args, options)


@pytest.mark.parametrize(
    ("k", "first", "last"), [(0, 0, 0), (1, 0, 0), (537, 2, 3), (5, 2, 3), (2099, 0, 1)]
)
def test_topk(k: int, first: int, last: int) -> None:
    used = torch.tensor([2100, 130, 2077, 9, 0], dtype=torch.int32)
    same_choice(retrieval.select_topk, choices(), k, lens=used, first=first, last=last)


def test_threshold() -> None:
    for limit in (0.5, 0.0, -math.inf, math.inf, math.nan):
        same_choice(retrieval.select_threshold, choices(), limit, first=1, max_selected=700)
    same_choice(retrieval.select_threshold, choices(), torch.linspace(-1, 1, 5), last=2)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_topp(p: float) -> None:
    rows = choices()[:, :900]
    rows[1] *= 20  # weights that vanish
    same_choice(retrieval.select_topp, rows, p, last=2)


def test_no_columns() -> None:
    same_choice(retrieval.select_topk, torch.empty(3, 0), 4)
    same_choice(retrieval.select_topp, torch.empty(0, 5), 0.5)


# ---- LSH ----


@pytest.mark.parametrize(("bits", "tables"), [(1, 130), (5, 18), (10, 13), (15, 2), (0, 3)])
def test_codes_are_signs(bits: int, tables: int) -> None:
    """Small integers, whose sums are exact: 74 rows in tiles of 64, 40 channels in steps of 32."""
    x = torch.randint(-3, 4, (1, 37, 2, 40)).bfloat16()
    planes = torch.randint(-4, 5, (40, bits * tables)).float()
    mean = torch.randint(-2, 3, (1, 2, 40)).float()
    for rows, centre in ((x, mean), (x.float(), None), (x.half(), mean)):
        got, want = (
            torch.ops.attnforge.lsh_encode(rows, centre, planes, bits, tables, name)
            for name in ("emulated", "reference")
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize(("bits", "skewed"), [(0, False), (4, False), (4, True), (13, False)])
def test_tables(bits: int, skewed: bool) -> None:
    """Two segments of 64 keys, filled in two steps that straddle them, then cut down; the second
    sequence gets more than there is room for. Higher bits of a code do not count."""
    codes = torch.randint(0, 1 << (1 if skewed else bits), (2, 1, 100, 2), dtype=torch.int16)
    codes[..., 1] |= 1 << bits
    grown = (codes, bits, (2, 64), ((70, 45), (20, 99)), ((500, 70), (64, 0)))
    got, want = (grown_tables(name, *grown) for name in ("emulated", "reference"))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("min_hits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_retrieval(min_hits: int, dtype: torch.dtype) -> None:
    """Lists are those of the reference over the same tables, of several segments, and so is u."""
    k, q = torch.randn(2, 300, 1, 16).to(dtype), torch.randn(2, 1, 2, 16).to(dtype)
    lengths = torch.tensor([300, 211], dtype=torch.int32)
    index = LSHIndex(k, k, num_bits=3, num_tables=5, sink=3, window=20, min_hits=min_hits,
                     lengths=lengths, backend="reference")  # fmt: skip
    index._tables(128, 3)
    index.hashed = [0, 0]
    index._hash([280, 191])
    rows = q.float().reshape(1, -1, 1, 16)
    codes = index.encode(rows).view(2, 2, 5)
    begin, end = (torch.tensor(x, dtype=torch.int32) for x in ([3, 3], [280, 191]))
    got, want = (
        torch.ops.attnforge.lsh_retrieve(
            index.starts, index.ids, 3, codes, q, k, index.mean, index.norms, begin, end,
            min_hits, 0.01, name,
        )
        for name in ("emulated", "reference")
    )  # fmt: skip
    assert bool(want[1].all())
    assert torch.equal(got[1], want[1])
    behind = torch.arange(300) >= want[1].unsqueeze(-1)
    assert torch.equal(got[0].masked_fill(behind, -1), want[0])
    mine, true = (x[2].masked_fill(behind, 0.0) for x in (got, want))
    torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "hits"), [("zero", 40), ("parallel", 40), ("opposite", 0)])
def test_strange_vectors_have_finite_weights(kind: str, hits: int) -> None:
    """An index that the kernels build and ask."""
    q = torch.randn(1, 1, 2, 16) * (kind != "zero")
    k = q[:, :, :1].expand(1, 40, 1, 16) * (-1 if kind == "opposite" else 1)
    index = LSHIndex(k, k, num_bits=8, num_tables=30, sink=0, window=0, center=False,
                     backend="emulated")  # fmt: skip
    _, lens, bias = index.retrieve(q)
    assert int(lens[0, 0]) == hits
    for n, row in zip(lens[0].tolist(), bias[0], strict=True):
        assert bool(row[:n].isfinite().all())
    if kind == "parallel":
        assert not bias[0, 0].any()  # u is 1
