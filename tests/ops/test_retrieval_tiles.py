"""Retrieval on levels of matrix tiles: listed keys in bf16, bounds in int8, and what is not theirs.

Shapes are those where tiles end: keys of a chunk, channels of a tile, rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import attnforge
from attnforge import retrieval
from attnforge.testing.cases import Target, use_isa
from attnforge.testing.compare import compare, same_bits
from attnforge.testing.retrieval import IndexedCase

Need = Callable[..., None]  # the fixture of tests/conftest.py
BELOW = {"amx": "avx512", "amx_soft": "avx512_soft"}
BF16 = torch.bfloat16
CASE = IndexedCase(keys=200, entries=150, dtype=BF16)
CASES = [
    *(replace(CASE, lists=lists, order="any") for lists in ("one", "kv", "query")),
    *(replace(CASE, head_dim=d, v_head_dim=dv) for d, dv in ((8, 24), (80, 40), (128, 128))),
    *(replace(CASE, lists="kv", bias=False, entries=n) for n in (1, 31, 33, 64, 65)),
    *(replace(CASE, lists=lists, heads_q=10, rows=5) for lists in ("kv", "query")),
    replace(CASE, page_size=16, used=(170, 41)),
    replace(CASE, page_size=16, layout="HND", heads_q=16, heads_k=8, head_dim=128),
    replace(CASE, batch=1, keys=1200, entries=1100, lists="kv", bias=False),
]


def on(level: str, case: IndexedCase) -> dict[str, torch.Tensor]:
    with use_isa(level):
        return case.make().forward("cpu")


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("level", BELOW)
def test_listed_keys(level: str, case: IndexedCase, need: Need) -> None:
    need(level)
    truth = case.make().truth(gradients=False, rounded=Target("cpu", level).rounded)
    compare(on(level, case), truth, str(case)).check()


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_software_twin_has_the_bits_of_the_hardware(case: IndexedCase, need: Need) -> None:
    need("amx", "amx_soft")
    got, want = on("amx_soft", case), on("amx", case)
    assert all(same_bits(got[name], want[name]) for name in want)


@pytest.mark.parametrize("level", BELOW)
def test_bf16_is_served_by_tiles_and_the_rest_by_the_level_below(level: str, need: Need) -> None:
    need(level, BELOW[level])
    for dtype in (BF16, torch.float16, torch.float32):
        case = replace(CASE, dtype=dtype)
        same = same_bits(on(level, case)["out"], on(BELOW[level], case)["out"])
        assert same == (dtype is not BF16)


@pytest.mark.parametrize("level", BELOW)
def test_rows_far_apart_are_those_of_the_level_below(level: str, need: Need) -> None:
    need(level, BELOW[level])
    for heads, same in ((4, False), (5, True)):  # 1,024 and 1,280 bytes
        case = replace(CASE, heads_q=heads, heads_k=heads, head_dim=128)
        assert same_bits(on(level, case)["out"], on(BELOW[level], case)["out"]) == same


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
@pytest.mark.parametrize("level", BELOW)
def test_any_scale(level: str, scale: float, need: Need) -> None:
    need(level)
    inputs = CASE.make().with_(softmax_scale=scale)
    with use_isa(level):
        got = inputs.forward("cpu")
    rounded = Target("cpu", level).rounded and scale > 0
    compare(got, inputs.truth(gradients=False, rounded=rounded), f"scale {scale}").check()


@pytest.mark.parametrize("level", BELOW)
def test_a_value_that_a_head_does_not_list_never_reaches_it(level: str, need: Need) -> None:
    """A union's values are multiplied together; where one is not finite each row goes alone."""
    need(level)
    q, k, v = (torch.randn(1, n, h, 32).to(BF16) for n, h in ((1, 4), (90, 2), (90, 2)))
    v[0, 7] = math.inf
    ids = torch.stack([torch.arange(40), torch.arange(40) + 40] * 2).int()[None]
    with use_isa(level):
        out = attnforge.indexed_attention(q, k, v, ids=ids, backend="cpu")
    assert out[0, 0, ::2].isinf().any(-1).all()
    assert out[0, 0, 1::2].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dim", [64, 128, 160])
@pytest.mark.parametrize("level", BELOW)
def test_rows_a_fixed_way_apart_are_read_where_they_lie(
    level: str, dim: int, rows: int, need: Need
) -> None:
    """Pages, backwards, every second key, one key sixteen times; and the same keys scattered."""
    need(level)
    heads, keys = 4, 400
    q = torch.randn(1, rows, 4 * heads, dim).to(BF16)
    k, v = (torch.randn(1, heads, keys, dim).to(BF16).transpose(1, 2) for _ in range(2))
    runs = [retrieval.page_tokens(torch.tensor([1, 4, 9, 20]), 16), torch.arange(95, 79, -1)]
    runs += [torch.arange(200, 232, 2), torch.full((16,), 7), torch.tensor([399])]
    ids = torch.cat(runs).int().expand(1, heads, -1).contiguous()
    scattered = ids.clone()
    scattered[..., :112] = ids[..., torch.randperm(112)]
    truth = attnforge.indexed_attention(
        q.double(), k.double(), v.double(), ids=ids, backend="reference"
    )
    for lists in (ids, scattered):
        with use_isa(level):
            out = attnforge.indexed_attention(q, k, v, ids=lists, backend="cpu")
        assert (out - truth).abs().max() < 2**-7 * v.double().abs().max()


@pytest.mark.parametrize("level", BELOW)
def test_a_channel_that_is_not_finite_never_reaches_its_neighbour(level: str, need: Need) -> None:
    need(level)
    q, k, v = (torch.randn(1, n, h, 64).to(BF16) for n, h in ((1, 4), (90, 2), (90, 2)))
    v[0, 7, 0, 8], v[0, 9, 1, 33] = math.inf, math.nan
    ids = torch.arange(64, dtype=torch.int32).expand(1, 1, -1).contiguous()
    with use_isa(level):
        out = attnforge.indexed_attention(q, k, v, ids=ids, backend="cpu")
    bad = ~out[0, 0].isfinite()
    want = torch.zeros(4, 64, dtype=torch.bool)
    want[:2, 8], want[2:, 33] = True, True
    assert torch.equal(bad, want)


@pytest.mark.parametrize("dim", [8, 64, 72, 128, 576])
@pytest.mark.parametrize("level", BELOW)
def test_bounds_in_int8(level: str, dim: int, need: Need) -> None:
    """Q in two codes is right to a part in 32,000 of its largest element."""
    need(level, BELOW[level])
    for heads, rows, pages in ((4, 1, 70), (2, 2, 33), (18, 1, 5)):
        q, k = torch.randn(2, rows, heads, dim), torch.randn(2, 4 * pages, 2, dim)
        low, high, scale = retrieval.quantize_bounds(*retrieval.page_bounds(k, 4))
        found = []
        for isa in (level, BELOW[level]):
            with use_isa(isa):
                found.append(retrieval.score_pages(q, low, high, page_scale=scale, backend="cpu"))
        most = (q.abs().amax(-1).transpose(1, 2).unsqueeze(-1) * dim**-0.5) * (
            torch.maximum(low.abs(), high.abs()).sum(-1) * scale
        ).transpose(1, 2).repeat_interleave(heads // 2, 1).unsqueeze(2)
        assert ((found[0] - found[1]).abs() <= most / 32_000).all()
        assert not same_bits(*found)


def test_bounds_on_the_software_twin_have_the_bits_of_the_hardware(need: Need) -> None:
    need("amx", "amx_soft")
    q, k = torch.randn(2, 3, 6, 72), torch.randn(2, 300, 2, 72)
    q[0, 0, 0] = 0.0
    low, high, scale = retrieval.quantize_bounds(*retrieval.page_bounds(k, 4))
    found = []
    for isa in ("amx", "amx_soft"):
        with use_isa(isa):
            found.append(retrieval.score_pages(q, low, high, page_scale=scale, backend="cpu"))
    assert same_bits(*found)
