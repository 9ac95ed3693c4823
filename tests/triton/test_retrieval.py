"""Triton's retrieval kernels: values within the bounds of float64, and what must not matter."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge import LSHIndex, retrieval
from attnforge.backends import _gpu
from attnforge.backends.triton import retrieval as launchers
from attnforge.testing.cases import Target
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.retrieval import IndexedCase, IndexedInputs, grown_tables

TRITON = Target("triton")


def _shared(name: str) -> ModuleType:
    """A module of ``tests/ops``, whose checks take a target."""
    path = Path(__file__).resolve().parents[1] / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"shared_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


indexed, scores_and_choices = _shared("test_indexed"), _shared("test_retrieval")
SMALL = IndexedCase(batch=1, keys=40, entries=22, head_dim=24, v_head_dim=40)


@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, lists="one", order="any", rows=3),
        replace(SMALL, lists="kv", bias=False),
        replace(SMALL, lists="kv", order="any", rows=9, dtype=torch.bfloat16),
        replace(SMALL, lists="query", order="any", bias=False, rows=2),
        replace(SMALL, lists="query", dtype=torch.float16),
        replace(SMALL, heads_q=6, lists="kv", batch=2, used=(31, 0), head_dim=8),
        replace(SMALL, heads_q=2, order="any", entries=70, keys=5),
    ],
    ids=lambda case: f"{case.lists}-{case.order}-{case.rows}",
)
def test_indexed_values(case: IndexedCase) -> None:
    indexed.check(case, TRITON)


@pytest.mark.parametrize(("page_size", "layout"), [(1, "NHD"), (16, "HND"), (3, "HND")])
def test_indexed_pages(page_size: int, layout: str) -> None:
    case = replace(SMALL, batch=2, page_size=page_size, layout=layout, used=(40, 23))
    lists = "query" if page_size == 16 else "kv"
    indexed.check(replace(case, lists=lists, dtype=torch.bfloat16), TRITON)


def test_indexed_latent() -> None:
    case = IndexedCase(batch=1, keys=20, entries=9, heads_k=1, head_dim=576, v_head_dim=512,
                       lists="kv", page_size=4, used=(20,))  # fmt: skip
    indexed.check(case, TRITON)


def few_entries(patch: pytest.MonkeyPatch) -> None:
    """Short splits, so that lists of the tests have several, and longer ones at that."""
    patch.setattr(_gpu, "ENTRIES", 16)
    patch.setattr(_gpu, "PARTS", 3)


@pytest.mark.parametrize(("entries", "lists"), [(17, "query"), (48, "kv"), (90, "kv")])
def test_splits(monkeypatch: pytest.MonkeyPatch, entries: int, lists: str) -> None:
    few_entries(monkeypatch)
    inputs = replace(SMALL, keys=99, entries=entries, rows=2, lists=lists).make()
    compare(inputs.forward("triton"), inputs.truth(gradients=False)).check()


def padded(inputs: IndexedInputs, slots: int) -> IndexedInputs:
    """The same lists with room behind them, of which the lengths say nothing to read."""
    ids, bias = inputs.options["ids"], inputs.options["log_bias"]
    room = (*ids.shape[:2], slots)
    return inputs.with_(ids=torch.cat([ids, ids.new_full(room, 3)], -1),
                        log_bias=torch.cat([bias, bias.new_full(room, math.nan)], -1))  # fmt: skip


def test_neighbours_and_room_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    few_entries(monkeypatch)
    inputs = replace(SMALL, batch=2, heads_q=2, heads_k=1, entries=20, order="any").make()
    both, among = inputs.run("triton"), inputs.forward("triton")
    wide = padded(inputs, 20)
    found = wide.run("triton")
    assert same_bits(found.pop("dlog_bias")[..., :20], both["dlog_bias"])
    assert_same(found, {name: both[name] for name in found})
    assert_same(wide.forward("triton"), among)
    one = {name: x[1:].contiguous() for name, x in inputs.options.items()}
    single = inputs.with_(q=inputs.q[1:], k=inputs.k[1:], v=inputs.v[1:], dout=inputs.dout[1:],
                          dlse=inputs.dlse[1:], **one)  # fmt: skip
    for name, got in single.run("triton").items():
        assert same_bits(got, both[name][1:]), name
    assert_same(single.forward("triton"), {name: x[1:] for name, x in among.items()})


def test_nothing_listed() -> None:
    inputs = SMALL.make()
    got = inputs.with_(ids=torch.full_like(inputs.options["ids"], -1)).run("triton")
    assert (got.pop("lse") == -math.inf).all()
    for name, x in got.items():
        assert not x.any(), name


def test_keys_of_other_heads_do_not_leak(device: str) -> None:
    inputs = replace(SMALL, bias=False, heads_q=4, heads_k=1, keys=24).make()
    k, v = inputs.k.nan_to_num(0.1), inputs.v.nan_to_num(0.1)
    ids = torch.arange(24, dtype=torch.int32, device=device).view(6, 4).T.contiguous()
    inputs = inputs.with_(k=k, v=v, ids=ids.unsqueeze(0), lens=None)
    clean = inputs.run("triton")
    k, v = k.clone(), v.clone()
    k[:, 1::4], v[:, 1::4] = math.nan, math.inf  # keys of head 1
    dirty = inputs.with_(k=k, v=v).run("triton")
    others = [0, 2, 3]
    for name, dim in (("out", 2), ("dq", 2), ("lse", 1)):
        pick = torch.tensor(others, device=device)
        assert same_bits(clean[name].index_select(dim, pick), dirty[name].index_select(dim, pick))
    for name in ("dk", "dv"):
        for key in others:
            assert same_bits(clean[name][:, key::4], dirty[name][:, key::4])
    assert not bool(dirty["out"][:, :, 1].isfinite().all())


def test_a_list_without_rows_or_keys() -> None:
    """Empty problems give empty results, and zeros where there is something to write."""
    inputs = SMALL.make()
    none = {n: inputs.options[n][..., :0] for n in ("ids", "log_bias")}
    got = inputs.with_(**none, lens=None).run("triton")
    assert not got["out"].any()
    assert not got["dk"].any()
    case = replace(SMALL, rows=0)
    assert case.make().run("triton")["dk"].shape == inputs.k.shape


# ---- scores ----


# query heads, KV heads, keys, head dim
SHAPES = {
    torch.float32: (4, 2, 70, 40),
    torch.bfloat16: (3, 3, 9, 136),
    torch.float16: (6, 1, 65, 8),
}


@pytest.mark.parametrize("dtype", SHAPES, ids=["fp32", "bf16", "fp16"])
def test_key_scores(dtype: torch.dtype, device: str) -> None:
    hq, hk, n, d = SHAPES[dtype]
    q, k = (torch.randn(2, m, h, d, device=device).to(dtype) for m, h in ((2, hq), (n, hk)))
    used = torch.tensor([n, n // 2], dtype=torch.int32, device=device)
    k[1, n // 2 :] = math.nan
    got = retrieval.score_keys(q, k, cache_seqlens=used, backend="triton")
    want, bound = scores_and_choices._logits(q, k, d**-0.5)
    assert (got[1, ..., n // 2 :] == -math.inf).all()
    hidden = torch.zeros_like(want, dtype=torch.bool)
    hidden[1, ..., n // 2 :] = True
    assert ((got.double() - want).abs() <= bound)[~hidden].all()


@pytest.mark.parametrize("page_size", [3, 16])
def test_key_scores_in_pages(page_size: int, device: str) -> None:
    q, k = torch.randn(2, 1, 4, 16, device=device), torch.randn(2, 48, 2, 16, device=device)
    order = torch.randperm(96 // page_size, device=device)
    pages = torch.empty(96 // page_size, page_size, 2, 16, device=device)
    pages[order] = k.reshape(-1, page_size, 2, 16)
    used = torch.tensor([48, 17], dtype=torch.int32, device=device)
    table = order.view(2, -1).int()
    got = retrieval.score_keys(q, pages, block_table=table, cache_seqlens=used, backend="triton")
    want = retrieval.score_keys(q, k, cache_seqlens=used, backend="triton")
    assert same_bits(got, want)


def test_centroid_scores(device: str) -> None:
    q, c = (torch.randn(1, n, h, 16, device=device) for n, h in ((2, 4), (200, 2)))
    counts = torch.randint(0, 9, (1, 2, 200), dtype=torch.int32, device=device)
    size = counts.repeat_interleave(2, 1).unsqueeze(2).expand(1, 4, 2, 200)
    for scale, digits in ((30.0, 1e-4), (3000.0, 1e-2)):  # of logits of 8000 few are left
        got = retrieval.score_centroids(scale * q, c, counts, backend="triton")
        total = (got.exp() * size).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=digits, atol=0)
        assert (got[size == 0] == -math.inf).all()
    none = retrieval.score_centroids(q, c, torch.zeros_like(counts), backend="triton")
    assert (none == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_page_scores(dtype: torch.dtype, device: str) -> None:
    q, k = (torch.randn(2, n, h, 24, device=device).to(dtype) for n, h in ((2, 4), (70, 2)))
    k[0, 3, 0, 5], k[0, 40, 1, 2] = math.inf, -math.inf
    low, high = retrieval.page_bounds(k, 16)
    used = torch.tensor([5, 2], dtype=torch.int32, device=device)
    got = retrieval.score_pages(q, low, high, used=used, backend="triton")
    want = retrieval.score_pages(
        *(x.double() for x in (q, low, high)), used=used, backend="reference"
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    tops = retrieval.score_pages(q, low, high, used=used, grouped=True, backend="triton")
    assert same_bits(tops, got.unflatten(1, (2, 2)).amax(2))
    beside = torch.stack((low, high), 3).transpose(1, 2).contiguous().transpose(1, 2).unbind(3)
    assert same_bits(retrieval.score_pages(q, *beside, used=used, backend="triton"), got)
    order = torch.randperm(10, device=device)
    stored = [torch.empty(10, 2, 24, device=device, dtype=dtype) for _ in range(2)]
    for x, y in zip(stored, (low, high), strict=True):
        x[order] = y.flatten(0, 1)
    codes = retrieval.quantize_bounds(low, high)
    of_codes = retrieval.score_pages(
        q, *codes[:2], page_scale=codes[2], used=used, backend="triton"
    )
    wide = (x * codes[2].unsqueeze(-1) for x in codes[:2])
    assert same_bits(of_codes, retrieval.score_pages(q, *wide, used=used, backend="triton"))
    by_table = retrieval.score_pages(
        q, *stored, block_table=order.view(2, 5).int(), used=used, backend="triton"
    )
    assert same_bits(by_table, got)


# ---- selections: the reference is a sort, and both say the same ----

ODD = [0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-40, math.inf, -math.inf, math.nan, 1e30]


def same_choice(select: Any, scores: Tensor, *args: Any, **options: Any) -> None:
    got, want = (select(scores, *args, **options, backend=name) for name in ("triton", "reference"))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), (select.__name__, args, options)


def choices(device: str) -> Tensor:
    """Rows with odd values, ties, nothing but ties, and nothing at all."""
    rows = torch.randn(5, 150, device=device).round(decimals=1)
    rows[0, 17 : 17 + len(ODD)] = torch.tensor(ODD, device=device)
    rows[2], rows[3] = 0.5, -math.inf
    return rows


@pytest.mark.parametrize(
    ("k", "first", "last"), [(0, 0, 0), (1, 0, 0), (37, 2, 3), (5, 2, 3), (149, 0, 1), (200, 1, 1)]
)
def test_topk(monkeypatch: pytest.MonkeyPatch, k: int, first: int, last: int, device: str) -> None:
    monkeypatch.setattr(launchers, "_columns", lambda columns: 128)  # several steps of a row
    used = torch.tensor([150, 130, 150, 9, 0], dtype=torch.int32, device=device)
    same_choice(retrieval.select_topk, choices(device), k, lens=used, first=first, last=last)


def test_threshold(device: str) -> None:
    for limit in (0.5, 0.0, -math.inf, math.nan):
        same_choice(retrieval.select_threshold, choices(device), limit, first=1, max_selected=100)
    limits = torch.linspace(-1, 1, 5, device=device)
    same_choice(retrieval.select_threshold, choices(device), limits)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_topp(monkeypatch: pytest.MonkeyPatch, p: float, device: str) -> None:
    monkeypatch.setattr(launchers, "_columns", lambda columns: 128)
    rows = choices(device)
    rows[1] *= 20  # weights that vanish
    same_choice(retrieval.select_topp, rows, p, last=2)


def test_no_columns(device: str) -> None:
    same_choice(retrieval.select_topk, torch.empty(3, 0, device=device), 4)
    same_choice(retrieval.select_topp, torch.empty(0, 5, device=device), 0.5)


# ---- LSH ----


@pytest.mark.parametrize(("bits", "tables"), [(1, 3), (5, 18), (10, 7), (15, 2)])
def test_codes_are_signs(bits: int, tables: int, device: str) -> None:
    x = torch.randint(-3, 4, (1, 37, 2, 40), device=device).float()  # exact sums
    planes = torch.randint(-4, 5, (40, bits * tables), device=device).float()
    mean = torch.randint(-2, 3, (1, 2, 40), device=device).float()
    for centre in (mean, None):
        got, want = (
            torch.ops.attnforge.lsh_encode(x, centre, planes, bits, tables, name)
            for name in ("triton", "reference")
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize(("bits", "skewed"), [(0, False), (4, False), (4, True), (9, False)])
def test_tables(monkeypatch: pytest.MonkeyPatch, bits: int, skewed: bool, device: str) -> None:
    """Two segments of 64 keys, filled in two steps that straddle them, then cut down; the second
    sequence gets more than there is room for. Tables go in together, or one at a time."""
    if skewed:
        monkeypatch.setattr(launchers, "_SORTED", 256)
    most = 1 << (1 if skewed else bits)
    codes = torch.randint(0, most, (2, 1, 100, 2), dtype=torch.int16, device=device)
    codes[..., 1] |= 1 << bits  # higher bits do not count
    grown = (codes, bits, (2, 64), ((70, 45), (20, 99)), ((500, 70), (64, 0)))
    got, want = (grown_tables(name, *grown) for name in ("triton", "reference"))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("min_hits", [1, 2])
def test_retrieval(min_hits: int, device: str) -> None:
    """Lists are those of the reference over the same tables, of several segments, and so is u."""
    k, q = torch.randn(2, 300, 1, 16, device=device), torch.randn(2, 1, 2, 16, device=device)
    lengths = torch.tensor([300, 211], dtype=torch.int32, device=device)
    index = LSHIndex(k, k, num_bits=3, num_tables=5, sink=3, window=20, min_hits=min_hits,
                     lengths=lengths, backend="reference")  # fmt: skip
    index._tables(128, 3)
    index.hashed = [0, 0]
    index._hash([280, 191])
    want = index.retrieve(q, clip=0.01)
    index._backend = "triton"
    got = index.retrieve(q, clip=0.01)
    assert bool(want[1].all())
    assert torch.equal(got[1], want[1])
    behind = torch.arange(300, device=device) >= want[1].unsqueeze(-1)
    assert torch.equal(got[0].masked_fill(behind, -1), want[0])
    mine, true = (x[2].masked_fill(behind, 0.0) for x in (got, want))
    torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "hits"), [("zero", 40), ("parallel", 40), ("opposite", 0)])
def test_strange_vectors_have_finite_weights(kind: str, hits: int, device: str) -> None:
    q = torch.randn(1, 1, 2, 16, device=device) * (kind != "zero")
    k = q[:, :, :1].expand(1, 40, 1, 16) * (-1 if kind == "opposite" else 1)
    index = LSHIndex(k, k, num_bits=8, num_tables=30, sink=0, window=0, center=False,
                     backend="reference")  # fmt: skip
    index._backend = "triton"
    _, lens, bias = index.retrieve(q)
    assert int(lens[0, 0]) == hits
    for n, row in zip(lens[0].tolist(), bias[0], strict=True):
        assert bool(row[:n].isfinite().all())
    if kind == "parallel":
        assert not bias[0, 0].any()  # u is 1
