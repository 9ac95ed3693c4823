"""Triton's importance and choice of blocks against float64, and what must not matter.

Launchers are called with the LSE of the reference: attention to compressed keys is flash's.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge._params import FlashParams, NsaSelectParams
from attnforge.backends.triton import nsa
from attnforge.reference import nsa as reference
from attnforge.testing.cases import Target


@pytest.fixture
def target() -> Target:
    """What the shared cases run on."""
    return Target("triton")


def _cases() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "ops" / "test_nsa.py"
    spec = importlib.util.spec_from_file_location("shared_test_nsa", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = _cases()
test_importance_of_known_probabilities = shared.test_importance_of_known_probabilities

# window, stride, block, tokens: one window per block, many, more than a tile; a reach of 1, 4, 20
SIZES = {
    "aligned": (16, 16, 16, 200),
    "paper": (32, 16, 64, 300),
    "wide": (16, 4, 80, 400),
    "reach": (40, 2, 8, 90),
    "block of many": (4, 1, 70, 200),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    rows: int, keys: int, heads: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and an LSE as of some attention over those keys."""
    g = torch.Generator().manual_seed(rows)
    q, k = (torch.randn(2, n, h, 24, generator=g).to(device, dtype)
            for n, h in ((rows, heads[0]), (keys, heads[1])))  # fmt: skip
    wide = k.float().repeat_interleave(heads[0] // heads[1], 2)
    lse = torch.einsum("bqhd,bkhd->bhqk", q.float(), wide).mul(0.2).logsumexp(-1)
    return q, k, lse if keys else lse.fill_(-math.inf)


def asked(
    sizes: tuple[int, int, int], rows: int, keys: int, blocks: int, n: int
) -> NsaSelectParams:
    p = FlashParams(None, None, None, None, None, rows, keys, 0.2, -1, -1, 0.0)
    return NsaSelectParams(p, *sizes, blocks, n, 1, 2)


@pytest.mark.parametrize("name", SIZES)
def test_values(name: str, device: str) -> None:
    *sizes, tokens = SIZES[name]
    keys, blocks = (tokens - sizes[0]) // sizes[1] + 1, -(-tokens // sizes[2])
    for rows, dtype in ((20, DTYPES[len(name) % 3]), (3, torch.float32)):
        q, k, lse = inputs(rows, keys, (3, 1), dtype, device)
        p = asked((sizes[0], sizes[1], sizes[2]), rows, keys, blocks, 4)
        at = torch.linspace(-2, tokens - 1, rows, device=device).int().unsqueeze(0)
        want = torch.empty(2, 1, rows, blocks, dtype=torch.float64, device=device)
        reference.importance(q.double(), k.double(), lse.double(), at, p, want)
        got = torch.full_like(want, math.nan, dtype=torch.float32)
        nsa.importance(q, k, lse, at, p, got)
        torch.testing.assert_close(got.double(), want, rtol=3e-5, atol=1e-6)
        ids = torch.full((2, 1, rows, 4), 99, dtype=torch.int32, device=device)
        nsa.select(q, k, lse, at, p, ids)
        shared.check_lists(ids, want, at[0], sizes[2], 4, 1e-4)


def test_more_blocks_than_are_kept_at_a_time(device: str) -> None:
    """The lists of several walks are those of one sort, whatever their order."""
    sizes, tokens, rows = (2, 2, 2), 170, 17
    q, k, lse = (x[:1] for x in inputs(rows, 85, (1, 1), torch.float32, device))
    at = torch.linspace(30, tokens - 1, rows, device=device).int().unsqueeze(0)
    p = asked(sizes, rows, 85, 85, 68)
    ids = torch.full((1, 1, rows, 68), 99, dtype=torch.int32, device=device)
    nsa.select(q, k, lse, at, p, ids)
    weights = torch.empty(1, 1, rows, 85, dtype=torch.float64, device=device)
    reference.importance(q.double(), k.double(), lse.double(), at, p, weights)
    shared.check_lists(ids, weights, at[0], 2, 68, 1e-4)


def test_ties_go_to_the_right(device: str) -> None:
    """Blocks without any probability, with equal importance, and before the forced ones."""
    q, k, _ = inputs(20, 100, (2, 1), torch.float32, device)
    lse = torch.full((2, 2, 20), -math.inf, device=device)  # no probabilities at all
    at = torch.arange(380, 400, dtype=torch.int32, device=device).unsqueeze(0)
    ids = torch.empty(2, 1, 20, 6, dtype=torch.int32, device=device)
    nsa.select(q, k, lse, at, asked((8, 4, 16), 20, 100, 25, 6), ids)
    assert ids[0, 0, 0].tolist() == [0, 19, 20, 21, 22, 23]
    assert ids[0, 0, 4].tolist() == [0, 20, 21, 22, 23, 24]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_is_of_its_window_alone(value: float, device: str) -> None:
    q, k, lse = inputs(20, 60, (2, 1), torch.float32, device)
    k[:, 20] = value  # tokens 80 .. 87: block 5, and 4 where it reaches in
    at = torch.full((1, 20), 243, dtype=torch.int32, device=device)
    p = asked((8, 4, 16), 20, 60, 16, 4)
    got = torch.empty(2, 1, 20, 16, device=device)
    nsa.importance(q, k, lse, at, p, got)
    lost = got.isnan().flatten(0, 2)
    assert lost[:, 5].any()
    assert not lost[:, :5].any()
    assert not lost[:, 6:].any()
    ids = torch.empty(2, 1, 20, 4, dtype=torch.int32, device=device)
    nsa.select(q, k, lse, at, p, ids)
    chosen = (ids == 5).any(-1)
    assert not (chosen & got[..., 5].isnan()).any()


def test_hidden_windows_do_not_leak(device: str) -> None:
    q, k, lse = inputs(20, 60, (2, 1), torch.bfloat16, device)
    at = torch.arange(100, 120, dtype=torch.int32, device=device).unsqueeze(0)
    p = asked((8, 4, 16), 20, 60, 16, 4)
    results = []
    for value in (0.0, math.nan):
        k[:, 26:] = value  # windows 26.. end at token 111 or later
        weights = torch.empty(2, 1, 20, 16, device=device)
        ids = torch.empty(2, 1, 20, 4, dtype=torch.int32, device=device)
        nsa.importance(q, k, lse, at, p, weights)
        nsa.select(q, k, lse, at, p, ids)
        results.append((weights[:, :, :11], ids[:, :, :11]))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_packed_equals_one_by_one(device: str) -> None:
    rows, keys = (18, 0, 1, 33), (40, 3, 0, 21)
    q, k, _ = (x[0] for x in inputs(sum(rows) + 2, sum(keys), (3, 1), torch.float32, device))
    lse = torch.randn(3, q.shape[0], device=device).add_(2.0)
    at = torch.randint(-1, 170, (q.shape[0],), dtype=torch.int32, device=device)
    ends = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32, device=device)
            for n in (rows, keys)]  # fmt: skip
    p = asked((8, 4, 16), max(rows), max(keys), 11, 3)
    packed = p._replace(flash=p.flash._replace(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1]))
    weights = torch.empty(1, q.shape[0], 11, device=device)
    ids = torch.empty(1, q.shape[0], 3, dtype=torch.int32, device=device)
    nsa.importance(q, k, lse, at, packed, weights)
    nsa.select(q, k, lse, at, packed, ids)
    assert not weights[:, sum(rows) :].any()
    assert (ids[:, sum(rows) :] == -1).all()
    first = [0, 0]
    for n, m in zip(rows, keys, strict=True):
        part, own = slice(first[0], first[0] + n), k[None, first[1] : first[1] + m]
        alone = p._replace(flash=p.flash._replace(max_seqlen_q=n, max_seqlen_k=m))
        one = torch.empty(1, 1, n, 11, device=device)
        nsa.importance(q[None, part], own, lse[None, :, part], at[None, part], alone, one)
        assert torch.equal(weights[:, part], one[0])
        if n > 16:  # fewer choose from the importance
            chosen = torch.empty(1, 1, n, 3, dtype=torch.int32, device=device)
            nsa.select(q[None, part], own, lse[None, :, part], at[None, part], alone, chosen)
            assert torch.equal(ids[:, part], chosen[0])
        first = [first[0] + n, first[1] + m]


@pytest.mark.parametrize("rows", [2, 18], ids=["decode", "prefill"])
def test_whole_method(rows: int, device: str) -> None:
    """nsa_attention by Triton kernels alone, which a forced backend makes sure of."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, rows, 4, 16, generator=g).to(device)
    k, v = torch.randn(2, 1, 40, 2, 16, generator=g).to(device)
    gates = torch.rand(1, rows, 4, 3, generator=g).to(device)
    options: dict[str, Any] = {
        "cmp_block": 8,
        "cmp_stride": 4,
        "slc_block": 16,
        "top_n": 3,
        "window": 9,
    }
    got = attnforge.nsa_attention(q, None, None, k, v, None, None, gates, **options,
                                  backend="triton")  # fmt: skip
    q, k, v, gates = (x.double() for x in (q, k, v, gates))
    want = attnforge.nsa_attention(q, None, None, k, v, None, None, gates, **options,
                                   backend="reference")  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
