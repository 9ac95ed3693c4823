"""Split-KV decode and merge of the Triton kernels, on poisoned workspaces."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnforge
from attnforge.registry import Request, list_kernels
from attnforge.testing import cases
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.oracle import merged_truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(**options: Any) -> FlashCase:
    return FlashCase(**{"seqlen_q": 1, "seqlen_k": 150, "heads_q": 4, "heads_k": 2, "decode": True,
                        "causal": True, **options})  # fmt: skip


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 8, 5000])
@pytest.mark.parametrize("rows", [1, 5])
def test_splits(check: Any, num_splits: int, rows: int) -> None:
    dtype = DTYPES[num_splits % 3]
    check(
        case(seqlen_q=rows, head_dim=40, used=(150, 71), dtype=dtype), False, num_splits=num_splits
    )


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 4500])
def test_lengths_around_the_fixed_split(check: Any, length: int) -> None:
    check(case(batch=1, seqlen_k=4500, heads_q=1, heads_k=1, used=(length,)), grad=False)


@pytest.mark.parametrize("group", [1, 3, 7, 8, 24])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_groups(check: Any, group: int, rows: int) -> None:
    check(case(batch=1, seqlen_q=rows, seqlen_k=70, heads_q=2 * group), grad=False)


@pytest.mark.parametrize("options", [
    {"softcap": 10.0, "spread": 4.0}, {"alibi": "batch"}, {"sinks": "mixed"}, {"window": (30, 0)},
    {"window": (0, 0)}, {"window": (5, 3), "causal": False}, {"causal": False},
    {"head_dim": 72, "v_head_dim": 136}, {"softmax_scale": -0.4},
    {"softcap": 9.0, "alibi": "head", "sinks": "normal", "window": (50, 0)},
], ids=lambda o: "_".join(o))  # fmt: skip
@pytest.mark.parametrize("num_splits", [0, 3])
def test_features(check: Any, options: dict[str, Any], num_splits: int) -> None:
    check(case(**{"seqlen_q": 3, "seqlen_k": 110, "heads_q": 6, "used": (110, 2), **options}),
          grad=False, num_splits=num_splits)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mods", [(), ("key_bias", "score_fn:softplus")], ids=["plain", "mods"])
def test_latent_vectors(check: Any, dtype: torch.dtype, mods: tuple[str, ...]) -> None:
    """The head dims of MLA: 576 channels in two tiles."""
    check(case(seqlen_q=2, seqlen_k=70, heads_q=5, heads_k=1, head_dim=576, v_head_dim=512,
               used=(70, 33), dtype=dtype, mods=mods), grad=False, num_splits=2)  # fmt: skip


@pytest.mark.parametrize(("d", "dv", "text"), [
    (576, 256, "head_dim 576 is not served"), (512, 512, "head_dim 512 is not served"),
    (64, 520, "v_head_dim 520 is not served"), (576, 512, "rope is not served with head_dim 576"),
])  # fmt: skip
def test_head_dims_that_are_refused(d: int, dv: int, text: str) -> None:
    spec = next(s for s in list_kernels("flash_decode") if s.backend == "triton")
    request = Request("flash_decode", "cuda", "sm_90", torch.bfloat16,
                      (("head_dim", d), ("v_head_dim", dv)), frozenset({"rope"}))  # fmt: skip
    assert any(text in reason for reason in spec.reasons(request))


def test_more_rows_than_keys(check: Any) -> None:
    check(case(batch=3, seqlen_q=6, seqlen_k=40, used=(2, 0, 6)), grad=False)


def test_is_the_forward() -> None:
    inputs = case(seqlen_q=3, seqlen_k=90, dtype=torch.bfloat16).make()
    whole = replace(inputs, call=attnforge.flash_attention).forward("triton")
    got = inputs.forward("triton", num_splits=3)
    assert (got["out"].double() - whole["out"].double()).abs().max() <= 2.0**-7
    assert (got["lse"] - whole["lse"]).abs().max() <= 1e-6


def test_default_split_ignores_batch_and_capacity() -> None:
    inputs = case(batch=3, seqlen_k=4200, heads_q=2, heads_k=1, used=(4200, 1, 2500),
                  sinks="normal").make()  # fmt: skip
    whole = inputs.forward("triton")
    for b, length in enumerate((4200, 1, 2500)):
        one = inputs.with_(q=inputs.q[b : b + 1], k=inputs.k[b : b + 1, :length],
                           v=inputs.v[b : b + 1, :length],
                           cache_seqlens=torch.tensor([length], dtype=torch.int32))  # fmt: skip
        assert_same(one.forward("triton"), {n: x[b : b + 1] for n, x in whole.items()}, str(b))


def test_gradients(check: Any) -> None:
    check(case(seqlen_q=3, seqlen_k=70, used=(70, 20), sinks="normal"))


def parts(n: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    g = torch.Generator().manual_seed(n)
    stat = (*shape[:-3], shape[-2], shape[-3])
    outs = [torch.randn(shape, generator=g).to(dtype) for _ in range(n)]
    return outs, [3 * torch.randn(stat, generator=g) for _ in range(n)]


def merged(outs: list[Any], lses: list[Any]) -> dict[str, torch.Tensor]:
    parts = ([x.to(cases.DEVICE) for x in xs] for xs in (outs, lses))
    results = attnforge.merge_states(*parts, backend="triton")
    return {name: x.cpu() for name, x in zip(("out", "lse"), results, strict=True)}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("n", [1, 2, 5, 17])
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 16), (7, 3, 24), (1, 1, 1, 3), (2, 300, 1, 40)], ids=str
)
def test_merge(n: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    outs, lses = parts(n, dtype, shape)
    compare(merged(outs, lses), merged_truth(outs, lses)).check()


@pytest.mark.parametrize("marker", [-math.inf, math.inf], ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf], ids=str)
def test_merge_of_empty_parts(marker: float, garbage: float) -> None:
    outs, lses = parts(4, torch.float32, (2, 5, 3, 16))
    for n in (0, 2):
        outs[n][0, 1], lses[n][0, :, 1] = garbage, marker
    for n in range(4):
        outs[n][1, 3], lses[n][1, :, 3] = garbage, marker
    got = merged(outs, lses)
    compare(got, merged_truth(outs, lses)).check()
    assert not got["out"][1, 3].any()
    assert (got["lse"][1, :, 3] == -math.inf).all()


def test_merge_keeps_nan() -> None:
    outs, lses = parts(3, torch.float32, (2, 5, 3, 16))
    lses[1][0, 2, 4] = math.nan
    outs[2][1, 0, 0, 7] = math.nan
    got = merged(outs, lses)
    assert got["out"][0, 4, 2].isnan().all()
    assert got["out"][1, 0, 0, 7].isnan()
    assert int(got["out"].isnan().sum()) == 17
    assert int(got["lse"].isnan().sum()) == 1
