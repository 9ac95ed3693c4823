"""Scores and selections: against plain formulas, ties, lengths, forced columns, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnforge import retrieval
from attnforge.testing.cases import Target
from attnforge.testing.compare import same_bits
from attnforge.testing.oracle import unit_roundoff

SHAPES = [(1, 1, 1, 8), (4, 2, 70, 40), (6, 2, 2051, 64), (3, 3, 129, 128)]


def _logits(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """float64 logits [B, Hq, Sq, N] and how far fp32 sums may be from them."""
    group = q.shape[2] // k.shape[2]
    rows = q.double().transpose(1, 2)
    keys = k.double().permute(0, 2, 3, 1).repeat_interleave(group, 1)
    slack = 8 * unit_roundoff(torch.float32) * scale
    return scale * rows @ keys, slack * (rows.abs() @ keys.abs()) + 1e-30


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_score_keys(target: Target, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hq, hk, n, d = shape
    q, k = torch.randn(2, 3, hq, d).to(dtype), torch.randn(2, n, hk, d).to(dtype)
    used = torch.tensor([n, n // 2], dtype=torch.int32)
    k[1, n // 2 :] = math.nan
    got = retrieval.score_keys(q, k, cache_seqlens=used, backend=target.backend)
    want, bound = _logits(q, k, d**-0.5)
    want[1, ..., n // 2 :] = -math.inf
    seen = want.isfinite()
    assert (got[~seen] == -math.inf).all()
    assert ((got.double() - want).abs() <= bound)[seen].all()


@pytest.mark.parametrize("page_size", [1, 16])
def test_score_keys_in_pages(target: Target, page_size: int) -> None:
    q, k = torch.randn(2, 1, 4, 32), torch.randn(2, 48, 2, 32)
    order = torch.randperm(96 // page_size)
    pages = torch.empty(96 // page_size, page_size, 2, 32)
    pages[order] = k.reshape(-1, page_size, 2, 32)
    used = torch.tensor([48, 17], dtype=torch.int32)
    table = order.view(2, -1).int()
    got = retrieval.score_keys(
        q, pages, block_table=table, cache_seqlens=used, backend=target.backend
    )
    want = retrieval.score_keys(q, k, cache_seqlens=used, backend=target.backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_centroid_scores_sum_to_one(target: Target) -> None:
    q, c = 30 * torch.randn(2, 3, 4, 16), torch.randn(2, 33, 2, 16)
    counts = torch.randint(0, 9, (2, 2, 33), dtype=torch.int32)
    got = retrieval.score_centroids(q, c, counts, backend=target.backend)
    size = counts.repeat_interleave(2, 1).unsqueeze(2)
    torch.testing.assert_close((got.exp() * size).sum(-1), torch.ones(2, 4, 3), rtol=1e-4, atol=0)
    assert (got[size.expand_as(got) == 0] == -math.inf).all()
    huge = retrieval.score_centroids(100 * q, c, counts, backend=target.backend)
    assert not huge.isnan().any()
    none = retrieval.score_centroids(q, c, torch.zeros_like(counts), backend=target.backend)
    assert (none == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_scores_bound_every_key(target: Target, dtype: torch.dtype) -> None:
    for n, size in ((70, 16), (5, 1), (300, 64)):
        q, k = torch.randn(2, 2, 4, 24).to(dtype), torch.randn(2, n, 2, 24).to(dtype)
        low, high = retrieval.page_bounds(k, size)
        got = retrieval.score_pages(q, low, high, backend=target.backend)
        keys = retrieval.score_keys(q, k, backend="reference")
        page = torch.arange(n) // size
        assert (got[..., page] >= keys - 1e-5).all()
        scale = 24**-0.5
        a, b = (x.double().transpose(1, 2).repeat_interleave(2, 1) for x in (low, high))
        rows = q.double().transpose(1, 2)
        want = scale * torch.maximum(rows[:, :, :, None] * a[:, :, None],
                                     rows[:, :, :, None] * b[:, :, None]).sum(-1)  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        # a head's bounds in one piece, the two of a page beside each other
        beside = torch.stack((low, high), 3).transpose(1, 2).contiguous().transpose(1, 2).unbind(3)
        assert same_bits(retrieval.score_pages(q, *beside, backend=target.backend), got)


def test_page_scores_through_a_table(target: Target) -> None:
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 64, 2, 16)
    low, high = retrieval.page_bounds(k, 8)
    order = torch.randperm(16)
    stored = [torch.empty(16, 2, 16) for _ in range(2)]
    for x, y in zip(stored, (low, high), strict=True):
        x[order] = y.flatten(0, 1)
    used = torch.tensor([8, 3], dtype=torch.int32)
    got = retrieval.score_pages(
        q, *stored, block_table=order.view(2, 8).int(), used=used, backend=target.backend
    )
    want = retrieval.score_pages(q, low, high, used=used, backend=target.backend)
    assert same_bits(got, want)
    assert (got[1, ..., 3:] == -math.inf).all()


def test_page_scores_of_a_group(target: Target) -> None:
    q, k = torch.randn(2, 3, 6, 24), torch.randn(2, 700, 2, 24)
    bounds = retrieval.page_bounds(k, 16)
    each = retrieval.score_pages(q, *bounds, backend=target.backend)
    got = retrieval.score_pages(q, *bounds, grouped=True, backend=target.backend)
    assert same_bits(got, retrieval.by_group(each, 2).amax(2))


def test_page_scores_of_infinite_bounds(target: Target) -> None:
    """Infinite times 0 is no part of a maximum: a page with an infinite key stays at the front."""
    q, k = torch.randn(1, 1, 4, 40), torch.randn(1, 96, 2, 40)
    q[..., 3] = q[..., 3].abs() + 0.1
    k[:, 17, :, 3] = math.inf
    k[:, 70, :, 5] = math.nan
    got = retrieval.score_pages(q, *retrieval.page_bounds(k, 16), backend=target.backend)
    assert (got[..., 1] == math.inf).all()
    assert got[..., 4].isnan().all()
    assert got[..., [0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_in_int8_are_bounds(target: Target, dtype: torch.dtype) -> None:
    for n, size in ((70, 16), (5, 1), (300, 64)):
        q, k = torch.randn(2, 2, 4, 24).to(dtype), torch.randn(2, n, 2, 24).to(dtype)
        exact = retrieval.page_bounds(k, size)
        low, high, scale = retrieval.quantize_bounds(*exact)
        a, b = (x.double() * scale.double().unsqueeze(-1) for x in (low, high))
        assert (a <= exact[0].double()).all()
        assert (b >= exact[1].double()).all()
        step = 1.01 * scale.unsqueeze(-1)
        assert (exact[0] - a <= step).all()
        assert (b - exact[1] <= step).all()
        got = retrieval.score_pages(q, low, high, page_scale=scale, backend=target.backend)
        rows = q.double().transpose(1, 2).unsqueeze(3)
        ends = [x.transpose(1, 2).repeat_interleave(2, 1).unsqueeze(2) for x in (a, b)]
        want = 24**-0.5 * torch.maximum(rows * ends[0], rows * ends[1])
        slack = 1e-4 * want.abs().sum(-1)
        assert ((got.double() - want.sum(-1)).abs() <= slack).all()
        keys = retrieval.score_keys(q, k, backend="reference")
        assert ((got + slack)[..., torch.arange(n) // size] >= keys).all()
        tops = retrieval.score_pages(
            q, low, high, page_scale=scale, grouped=True, backend=target.backend
        )
        assert same_bits(tops, retrieval.by_group(got, 2).amax(2))


def test_bounds_in_int8_through_a_table(target: Target) -> None:
    q, k = torch.randn(2, 1, 4, 64), torch.randn(2, 320, 2, 64)
    codes = retrieval.quantize_bounds(*retrieval.page_bounds(k, 8))
    order = torch.randperm(80)
    stored = [x.new_empty(80, *x.shape[2:]) for x in codes]
    for x, y in zip(stored, codes, strict=True):
        x[order] = y.flatten(0, 1)
    used = torch.tensor([40, 3], dtype=torch.int32)
    got, want = (
        retrieval.score_pages(q, low, high, page_scale=scale, used=used, backend=target.backend,
                              block_table=table)
        for (low, high, scale), table in ((stored, order.view(2, 40).int()), (codes, None))
    )  # fmt: skip
    assert same_bits(got, want)
    assert (got[1, ..., 3:] == -math.inf).all()


def test_bounds_in_int8_of_keys_and_queries_that_are_not_finite(target: Target) -> None:
    q, k = torch.randn(1, 2, 4, 40), torch.randn(1, 96, 2, 40)
    k[:, 17, :, 3], k[:, 70, :, 5], k[:, 80:] = math.inf, math.nan, 0.0
    q[:, 1, 3, 4] = math.nan
    low, high, scale = retrieval.quantize_bounds(*retrieval.page_bounds(k, 16))
    got = retrieval.score_pages(q, low, high, page_scale=scale, backend=target.backend)
    assert got[:, :, 0, [1, 4]].isnan().all()
    assert got[:, :, 0, [0, 2, 3]].isfinite().all()
    assert (got[:, :, 0, 5] == 0).all()
    assert got[:, 3, 1].isnan().all()
    assert got[:, :3, 1, 0].isfinite().all()


# ---- selection ----


def test_runs_of_columns(target: Target) -> None:
    backend = "reference" if target.backend == "reference" else None
    sizes = torch.randint(0, 40, (2, 9))
    starts = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()
    columns = torch.tensor([[0, 4, 5, 8], [1, 2, -1, -1], [8, 77, 3, 0], [0, 1, 2, 3]]).int()
    lens = torch.tensor([4, 2, 3, 0], dtype=torch.int32)
    for slots in (300, 25):
        ids, count = torch.ops.attnforge.expand_runs(columns, lens, starts, 500, 503, slots,
                                                     backend)  # fmt: skip
        for row in range(4):
            own = [c for c in columns[row, : lens[row]].tolist() if 0 <= c < 9]
            ends = starts[row // 2].tolist()
            want = [i for c in own for i in range(ends[c], ends[c + 1])] + [500, 501, 502]
            assert ids[row, : int(count[row])].tolist() == want[:slots]
            assert int(count[row]) == min(len(want), slots)


VALUES = [0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-40, math.inf, -math.inf, math.nan, 1e30]


def _row(data: st.DataObject) -> Tensor:
    n = data.draw(st.integers(0, 90), "columns")
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    picks = torch.randint(0, len(VALUES), (n,), generator=g)
    return torch.where(
        torch.rand(n, generator=g) < data.draw(st.sampled_from([0.0, 0.5, 1.0]), "special"),
        torch.tensor(VALUES)[picks], torch.randn(n, generator=g),
    )  # fmt: skip


def _expected(row: Tensor, used: int, k: int, first: int, last: int) -> list[int]:
    """The k best by (score, column), forced ones first; as plain Python."""
    forced = {c for c in range(used) if c < first or c >= used - last}
    free = [c for c in range(used) if c not in forced and not math.isnan(row[c])]
    free = [c for c in free if row[c] > -math.inf]
    sign = [(float(row[c]), math.copysign(1, float(row[c])), c) for c in free]
    best = sorted(sign, reverse=True)[: max(0, k - len(forced))]
    return sorted(forced | {c for *_, c in best})


@settings(max_examples=60, suppress_health_check=list(settings().suppress_health_check))
@given(data=st.data())
def _any_topk(target: Target, data: st.DataObject) -> None:
    row = _row(data)
    used = data.draw(st.integers(0, row.numel()), "used")
    k = data.draw(st.integers(0, 100), "k")
    first = data.draw(st.integers(0, min(3, k)), "first")
    last = data.draw(st.integers(0, min(3, k - first)), "last")
    lens = torch.tensor([used], dtype=torch.int32)
    ids, count = retrieval.select_topk(
        row[None], k, lens=lens, first=first, last=last, backend=target.backend
    )
    want = _expected(row, used, k, first, last)
    assert ids.shape == (1, k)
    assert ids[0].tolist() == want + [-1] * (k - len(want))
    assert count.tolist() == [len(want)]


def test_any_topk(target: Target) -> None:
    _any_topk(target)


@pytest.mark.parametrize("k", [1, 7, 513, 8192])
def test_topk_of_long_rows(target: Target, k: int) -> None:
    scores = torch.randn(3, 2, 9001).round(decimals=2)  # many ties
    ids, count = retrieval.select_topk(scores, k, backend=target.backend)
    assert (count == k).all()
    assert (ids.diff() > 0).all()
    got = scores.gather(-1, ids.long()).sort(-1).values
    assert torch.equal(got, scores.topk(k).values.sort(-1).values)


@pytest.mark.parametrize("threshold", [0.5, 0.0, -math.inf, math.inf, math.nan])
def test_threshold(target: Target, threshold: float) -> None:
    row = torch.cat([torch.tensor(VALUES), torch.randn(100)])
    ids, count = retrieval.select_threshold(row, threshold, backend=target.backend)
    want = ((row >= threshold) & (row > -math.inf)).nonzero().flatten()
    assert ids[: int(count)].tolist() == want.tolist()
    assert (ids[int(count) :] == -1).all()
    ids, count = retrieval.select_threshold(
        row, threshold, first=2, last=1, max_selected=4, backend=target.backend
    )
    forced = sorted({0, 1, 110} | set(want.tolist()))[:4]
    assert ids[: int(count)].tolist() == forced


def test_thresholds_of_their_own(target: Target) -> None:
    scores = torch.randn(2, 3, 50)
    limits = torch.tensor([[-1.0, 0.0, 1.0]])
    _, count = retrieval.select_threshold(scores, limits, backend=target.backend)
    assert torch.equal(count, (scores >= limits.unsqueeze(-1)).sum(-1).int())


@settings(max_examples=40, suppress_health_check=list(settings().suppress_health_check))
@given(data=st.data())
def _any_topp(target: Target, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    row = data.draw(st.sampled_from([0.1, 1.0, 20.0]), "spread") * torch.randn(
        data.draw(st.integers(1, 200), "columns"), generator=g
    )
    row = row.round(decimals=data.draw(st.sampled_from([0, 3]), "decimals"))
    p = data.draw(st.sampled_from([0.0, 0.3, 0.9, 0.99]), "p")
    ids, count = retrieval.select_topp(row, p, backend=target.backend)
    chosen = ids[: int(count)].long()
    share = row.double().softmax(0)
    assert float(share[chosen].sum()) >= p * (1 - 1e-6)
    if len(chosen):  # none of them could be left out
        assert float(share[chosen].sum() - share[chosen].min()) <= p * (1 + 1e-6)
        out = torch.ones_like(share, dtype=torch.bool)
        out[chosen] = False
        if out.any():
            assert row[out].max() <= row[chosen].min()


def test_any_topp(target: Target) -> None:
    _any_topp(target)


def test_topp_of_everything(target: Target) -> None:
    row = torch.tensor([*VALUES[:7], -math.inf, math.nan])
    ids, count = retrieval.select_topp(row, 1.0, backend=target.backend)
    assert ids[: int(count)].tolist() == list(range(7))
    ids, count = retrieval.select_topp(row[-2:], 0.5, backend=target.backend)
    assert int(count) == 0


def test_page_tokens() -> None:
    got = retrieval.page_tokens(torch.tensor([0, 3, -1], dtype=torch.int32), 2)
    assert got.tolist() == [0, 1, 6, 7, -1, -1]


def test_errors() -> None:
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 2, 8)
    for call, text in (
        (lambda: retrieval.select_topk(k, -1), "k is -1"),
        (lambda: retrieval.select_topk(k, 2, first=2, last=1), "first .* last is 3"),
        (lambda: retrieval.select_topk(k.int(), 2), "scores is int32"),
        (lambda: retrieval.select_topk(k, 2, lens=torch.ones(1)), "lens is float32"),
        (lambda: retrieval.select_topp(k, math.nan), "p is nan"),
        (lambda: retrieval.score_keys(q, k[..., :4]), "k has shape"),
        (lambda: retrieval.score_keys(q, k.double()), "want one dtype"),
        (lambda: retrieval.score_keys(q[:, :, :1], k), "no multiple"),
        (lambda: retrieval.score_pages(q, k, k[:, :2]), "want one shape"),
        (lambda: retrieval.score_centroids(q, k, torch.ones(1, 2, 5)), "counts must be int32"),
        (lambda: retrieval.page_bounds(k, 0), "page_size is 0"),
        (
            lambda: retrieval.score_pages(q, k.char(), k.char()),
            "page_scale None; want a page_scale",
        ),
        (lambda: retrieval.score_pages(q, k, k, page_scale=k[..., 0]), "page_scale given; want"),
        (
            lambda: retrieval.score_pages(q, k.char(), k.char(), page_scale=k),
            "page_scale is float32",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()
