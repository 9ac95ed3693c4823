"""Triton reductions within the bounds of the float64 truth, and the edges of the contract."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge import reductions
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.oracle import Truth
from attnforge.testing.reductions import (
    ReductionInputs,
    check_edges,
    check_topk,
    reduction_inputs,
)

pytestmark = pytest.mark.thinned(3)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(inputs: ReductionInputs) -> dict[str, Tensor]:
    """Every statistic, and the lists."""
    keys = inputs.call("topk_keys", inputs.lse, inputs.topk, backend="triton")[1]
    found = inputs.call("edges", inputs.lse, inputs.threshold, 300, backend="triton")
    return {**inputs.run("triton"), "keys": keys, **found._asdict()}


def only(truth: Truth, names: Iterable[str]) -> Truth:
    """Some of a truth's statistics."""
    return Truth({n: truth.values[n] for n in names}, {n: truth.bounds[n] for n in names})


def check(case: FlashCase, **changes: Any) -> None:
    inputs = reduction_inputs(case, **changes)
    compare(inputs.run("triton"), inputs.truth(), inputs.context).check()
    for with_lse in (True, False):
        check_topk(inputs, "triton", with_lse)
    for room in (100_000, 7):
        check_edges(inputs, "triton", room)


@pytest.mark.parametrize(
    ("sq", "sk", "causal"),
    [(1, 1, False), (1, 70, True), (32, 32, True), (33, 64, False), (45, 16, True)],
)
def test_lengths(sq: int, sk: int, causal: bool) -> None:
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=2, heads_k=1, head_dim=24,
                    causal=causal, dtype=DTYPES[sq % 3]))  # fmt: skip


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (7, 3)},
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "alibi": {"alibi": "head", "causal": True},
    "alibi_batch": {"alibi": "batch"},
    "sinks": {"sinks": "mixed", "causal": True},
    "used": {"used": (0, 30), "causal": True},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (37, 30), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    dtype = DTYPES[list(FEATURES).index(name) % 3]
    several = 2 if "batch" in str(FEATURES[name]) or "used" in FEATURES[name] else 1
    check(FlashCase(batch=several, seqlen_q=18, seqlen_k=37, heads_q=2, heads_k=1, dtype=dtype,
                    **FEATURES[name]))  # fmt: skip


@pytest.mark.parametrize("blocks", [(1, 45), (5, 7), (64, 64)])
def test_block_sizes(blocks: tuple[int, int]) -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=20, seqlen_k=45, heads_q=1,
                                        heads_k=1, causal=True), blocks=blocks)  # fmt: skip
    got = {n: inputs.call("block_max", lse, *blocks, backend="triton")
           for n, lse in (("top_prob", inputs.lse), ("top_logit", None))}  # fmt: skip
    compare(got, only(inputs.truth(), got), inputs.context).check()


@pytest.mark.parametrize("n", [1, 2, 16, 40, 200])
def test_topk_sizes(n: int) -> None:
    """Less than a list holds, several walks, more keys than a row sees."""
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=9, seqlen_k=61, causal=True), topk=n)
    for with_lse in (True, False):
        check_topk(inputs, "triton", with_lse)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 2.0])
def test_thresholds(threshold: float) -> None:
    inputs = reduction_inputs(
        FlashCase(seqlen_q=33, seqlen_k=40, causal=True, spread=3.0), threshold=threshold
    )
    for room in (10_000, 1):
        check_edges(inputs, "triton", room)


def test_no_room_for_edges_counts_them() -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=20, seqlen_k=30))
    found = inputs.call("edges", inputs.lse, 0.0, 1, backend="triton")
    assert int(found.total) == 2 * 20 * 30
    assert found.where.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("spans", [1, 5, 40])
def test_span_counts(spans: int) -> None:
    cuts = torch.linspace(1, 38, spans + 1).to(torch.int32)
    case = FlashCase(seqlen_q=33, seqlen_k=40, heads_q=4, heads_k=2, causal=True, softcap=5.0,
                     used=(40, 25), dtype=torch.bfloat16)  # fmt: skip
    inputs = reduction_inputs(case, boundaries=cuts, dmass=torch.randn(2, 4, 33, spans))
    got = inputs.gradients("triton")
    compare(got, only(inputs.truth(), got), inputs.context).check()


def test_keys_in_no_span_have_no_part_in_the_gradient() -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=20, seqlen_k=60))
    ends = torch.tensor([10, 10, 30], dtype=torch.int32)
    inputs = inputs.with_(boundaries=ends, dmass=torch.randn(1, 2, 20, 2))
    k = inputs.k.clone()
    k[0, 40] = math.nan
    want, got = inputs.gradients("triton"), inputs.with_(k=k).gradients("triton")
    assert_same(got, want)
    assert not got["dk"][:, 30:].any()
    assert not got["dk"][:, :10].any()
    assert got["dk"][:, 10:30].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [1, 7, 200])
def test_head_gradient(device: str, dtype: torch.dtype, dim: int) -> None:
    dout, out = (torch.randn(2, 35, 3, dim).to(dtype) for _ in range(2))
    moved = (dout.to(device), out.to(device))
    terms = dout.double() * out.double()
    rows = reductions.head_gradient(*moved, per_row=True, backend="triton").cpu()
    sums = reductions.head_gradient(*moved, backend="triton").cpu()
    unit = 16 * 2.0**-24
    error = (rows - terms.sum(-1).transpose(1, 2)).abs()
    assert bool((error <= unit * terms.abs().sum(-1).transpose(1, 2)).all())
    assert bool(((sums - terms.sum((1, 3))).abs() <= unit * terms.abs().sum((1, 3))).all())


@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (0, 5, 3, 8), (2, 5, 3, 0)], ids=str)
def test_head_gradient_of_nothing(device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device)
    assert not reductions.head_gradient(x, x, per_row=True, backend="triton").any()
    assert not reductions.head_gradient(x, x, backend="triton").any()


@pytest.mark.parametrize("with_lse", [False, True], ids=["logits", "prob"])
def test_ties_go_to_the_smaller_key(device: str, with_lse: bool) -> None:
    """One product per logit, few values, -0 among them."""
    q, k = torch.zeros(1, 20, 2, 8), torch.zeros(1, 150, 1, 8)
    q[..., 0] = torch.tensor([-2.0, -1.0, 1.0, 3.0])[torch.randint(4, (1, 20, 2))]
    k[..., 0] = torch.randint(-5, 6, (1, 150, 1)).float()
    s = torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) * 0.05
    s = s.masked_fill(torch.arange(150) > torch.arange(20).unsqueeze(1) + 130, -math.inf)
    lse = s.logsumexp(-1).to(device) if with_lse else None
    _, keys = reductions.topk_keys(q.to(device), k.to(device), lse, 50, causal=True,
                                   softmax_scale=0.05, backend="triton")  # fmt: skip
    want = s.sort(dim=-1, descending=True, stable=True).indices[..., :50]
    assert torch.equal(keys.cpu().long(), want)


def test_nan_ranks_first_and_a_seen_minus_infinity_counts() -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=3, seqlen_k=40, heads_q=1, heads_k=1))
    q, k = inputs.q.abs() + 1, inputs.k.clone()
    k[0, [17, 30]] = math.nan
    k[0, [3, 5]] = -math.inf
    moved = inputs.with_(q=q, k=k)
    for lse in (inputs.lse, None):
        values, keys = moved.call("topk_keys", lse, 41, backend="triton")
        assert keys[..., :2].tolist() == [[[[17, 30]] * 3]]
        assert keys[..., -3:].tolist() == [[[[3, 5, -1]] * 3]]
        assert bool(values[..., :2].isnan().all())
        assert bool(values[..., 2:-3].isfinite().all())
        assert bool((values[..., -3:] == (-math.inf if lse is None else 0.0)).all())


@pytest.mark.parametrize("size", ["batch", "seqlen_q", "seqlen_k"])
def test_empty(size: str) -> None:
    got = run(reduction_inputs(FlashCase(**{"seqlen_q": 9, "seqlen_k": 20, size: 0})))
    for name in ("sums", "weighted", "mass", "top_prob", "entropy", "dq", "dk", "dlse"):
        assert not got[name].any(), name
    assert bool((got["keys"] == -1).all())
    assert int(got["total"]) == 0
    assert bool((got["where"] == -1).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_hidden_keys_stay_hidden(value: float) -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=34, seqlen_k=34, heads_q=1, heads_k=1,
                                        causal=True))  # fmt: skip
    rows = torch.zeros_like(inputs.lse)
    rows[..., :25] = 1.0
    inputs = inputs.with_(weights=rows)
    k = inputs.k.clone()
    k[0, 25] = value
    want, got = run(inputs), run(inputs.with_(k=k))
    for name in ("mass", "entropy", "largest_prob", "largest_logit", "keys", "dlse"):
        assert torch.equal(got[name][:, :, :25], want[name][:, :, :25]), name
    assert torch.equal(got["dq"][:, :25], want["dq"][:, :25])
    assert torch.equal(got["weighted"], want["weighted"])
    assert torch.equal(got["top_prob"][:, :, :1], want["top_prob"][:, :, :1])


def test_seen_nan_reaches_the_gradients() -> None:
    """Of a key: the rows that see it. Of a row: the keys in spans that it sees."""
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=30, seqlen_k=30, causal=True))
    ends = torch.tensor([0, 25], dtype=torch.int32)
    inputs = inputs.with_(boundaries=ends, dmass=torch.ones(1, 2, 30, 1))
    k, q = inputs.k.clone(), inputs.q.clone()
    k[0, 12, 0, 3] = math.nan
    got = inputs.with_(k=k).gradients("triton")
    assert bool(got["dq"][0, 12:, 0].isnan().all())
    assert bool(got["dq"][0, :12].isfinite().all())
    assert bool(got["dq"][0, :, 1].isfinite().all())
    q[0, 20, 0, 3] = math.nan
    got = inputs.with_(q=q).gradients("triton")
    assert bool(got["dk"][0, :21, 0].isnan().all())
    assert bool(got["dk"][0, 21:].isfinite().all())
    assert bool(got["dk"][0, :, 1].isfinite().all())


def test_rows_without_an_lse_and_nan() -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=20, seqlen_k=30))
    lse, q = inputs.lse.clone(), inputs.q.clone()
    lse[0, 1, 7] = -math.inf
    q[0, 7, 1] = math.nan
    q[0, 9, 0] = math.nan
    got = run(inputs.with_(lse=lse, q=q))
    assert not got["mass"][0, 1, 7].any()
    assert not got["entropy"][0, 1, 7].any()
    assert not got["dq"][0, 7, 1].any()
    assert got["dlse"][0, 1, 7] == 0.0
    assert (got["keys"][0, 1, 7] == -1).all()
    assert bool(got["dk"][0, :, 1].isfinite().all())
    assert bool(got["sums"][0, 1].isfinite().all())
    assert bool(got["sums"][0, 0].isnan().all())
    assert bool(got["entropy"][0, 0, 9].isnan())
    assert bool(got["top_prob"][0, 0, 0].isnan().all())
    assert bool(got["top_prob"][0, 0, 1].isfinite().all())
    assert not bool((got["where"][:, 1:3] == torch.tensor([0, 9])).all(1).any())  # NaN: no edge
