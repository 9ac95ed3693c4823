"""Triton reductions within the bounds of the float64 truth, and the edges of the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge import reductions
from attnforge.testing import cases
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare
from attnforge.testing.oracle import Truth
from attnforge.testing.reductions import ReductionInputs, reduction_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("sums", "weighted", "mass", "top_prob", "top_logit", "entropy")


def run(inputs: ReductionInputs) -> dict[str, Tensor]:
    """The statistics that have a Triton kernel."""

    def put(x: Any) -> Any:
        return x.to(cases.DEVICE) if isinstance(x, Tensor) else x

    q, k, lse = put(inputs.q), put(inputs.k), put(inputs.lse)
    o: Any = {**{name: put(x) for name, x in inputs.options.items()}, "backend": "triton"}
    results = (
        reductions.column_sums(q, k, lse, **o),
        reductions.column_sums(q, k, lse, row_weights=put(inputs.weights), **o),
        reductions.span_mass(q, k, lse, put(inputs.boundaries), **o),
        reductions.block_max(q, k, lse, *inputs.blocks, **o),
        reductions.block_max(q, k, None, *inputs.blocks, **o),
        reductions.row_entropy(q, k, lse, **o),
    )
    return {name: x.cpu() for name, x in zip(NAMES, results, strict=True)}


def check(case: FlashCase, **changes: Any) -> dict[str, Tensor]:
    inputs = reduction_inputs(case, **changes)
    got, want = run(inputs), inputs.truth()
    mine = Truth({n: want.values[n] for n in NAMES}, {n: want.bounds[n] for n in NAMES})
    compare(got, mine, inputs.context).check()
    return got


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 70), (32, 32), (33, 64), (65, 16), (70, 47)])
def test_lengths(sq: int, sk: int, causal: bool) -> None:
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=2, heads_k=1, head_dim=24,
                    causal=causal, dtype=DTYPES[(sq + causal) % 3]))  # fmt: skip


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (7, 3)},
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "alibi": {"alibi": "head", "causal": True},
    "alibi_batch": {"alibi": "batch"},
    "sinks": {"sinks": "mixed", "causal": True},
    "used": {"used": (0, 31), "causal": True},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (40, 33), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, dtype: torch.dtype) -> None:
    check(FlashCase(seqlen_q=37, seqlen_k=45, heads_q=4, heads_k=2, dtype=dtype,
                    **FEATURES[name]))  # fmt: skip


@pytest.mark.parametrize("blocks", [(1, 45), (5, 7), (64, 64)])
def test_block_sizes(blocks: tuple[int, int]) -> None:
    check(FlashCase(batch=1, seqlen_q=20, seqlen_k=45, causal=True), blocks=blocks)


@pytest.mark.parametrize("size", ["batch", "seqlen_q", "seqlen_k"])
def test_empty(size: str) -> None:
    got = run(reduction_inputs(FlashCase(**{"seqlen_q": 9, "seqlen_k": 20, size: 0})))
    assert not any(got[n].any() for n in ("sums", "weighted", "mass", "top_prob", "entropy"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_hidden_keys_stay_hidden(value: float) -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=50, seqlen_k=50, causal=True))
    rows = torch.zeros_like(inputs.lse)
    rows[..., :40] = 1.0
    inputs = inputs.with_(weights=rows)
    k = inputs.k.clone()
    k[0, 40] = value
    want, got = run(inputs), run(inputs.with_(k=k))
    for name in ("mass", "entropy"):
        assert torch.equal(got[name][:, :, :40], want[name][:, :, :40]), name
    assert torch.equal(got["weighted"], want["weighted"])
    assert torch.equal(got["top_prob"][:, :, :2], want["top_prob"][:, :, :2])


def test_rows_without_an_lse_and_nan() -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=20, seqlen_k=30))
    lse, q = inputs.lse.clone(), inputs.q.clone()
    lse[0, 1, 7] = -math.inf
    q[0, 7, 1] = math.nan
    q[0, 9, 0] = math.nan
    got = run(inputs.with_(lse=lse, q=q))
    assert not got["mass"][0, 1, 7].any()
    assert not got["entropy"][0, 1, 7].any()
    assert bool(got["sums"][0, 1].isfinite().all())
    assert bool(got["sums"][0, 0].isnan().all())
    assert bool(got["entropy"][0, 0, 9].isnan())
    assert bool(got["top_prob"][0, 0, 0].isnan().all())
    assert bool(got["top_prob"][0, 0, 1].isfinite().all())
