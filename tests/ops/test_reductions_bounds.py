"""Every reduction and every gradient within the per-element bound of the float64 truth.

The derivation of the bounds stands in ``attnforge.testing.reductions``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnforge import reductions
from attnforge.testing.cases import LAYOUTS, FlashCase, Target
from attnforge.testing.compare import compare
from attnforge.testing.reductions import check_edges, check_topk, reduction_inputs

pytestmark = pytest.mark.thinned(3)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]

FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "softcap_saturated": {"softcap": 1.5, "spread": 30.0},
    "alibi": {"alibi": "head", "causal": True},
    "alibi_batch": {"alibi": "batch"},
    "sinks": {"sinks": "mixed", "causal": True},
    "scale": {"softmax_scale": 0.37},
    "negative_scale": {"softmax_scale": -0.25},
    "used": {"used": (0, 41), "causal": True},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (70, 33), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3},
    "peaky": {"spread": 8.0},
}  # fmt: skip


def check(case: FlashCase, backend: str, **changes: Any) -> None:
    inputs = reduction_inputs(case, **changes)
    compare(inputs.run(backend), inputs.truth(), inputs.context).check()
    for with_lse in (True, False):
        check_topk(inputs, backend, with_lse)
    for room in (1_000_000 if inputs.scores.prob.numel() > 4000 else 4000, 7):
        check_edges(inputs, backend, room)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("rows", [2, 60])
def test_features(target: Target, name: str, dtype: torch.dtype, rows: int) -> None:
    options = {"seqlen_k": 75, **FEATURES[name]}
    check(FlashCase(seqlen_q=rows, heads_q=6, heads_k=3, head_dim=40, dtype=dtype, **options),
          target.backend)  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("sq", "sk"), [(1, 1), (1, 300), (3, 199), (49, 257), (113, 203), (239, 1), (130, 67)]
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_grid_of_lengths(
    target: Target, dtype: torch.dtype, sq: int, sk: int, causal: bool
) -> None:
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=4, heads_k=2, head_dim=32,
                    dtype=dtype, causal=causal), target.backend)  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_tails(target: Target, causal: bool) -> None:
    for n, size in enumerate([*range(1, 34), 47, 48, 49, 63, 64, 65, 95, 96, 97]):
        sizes = {"seqlen_q": size, "seqlen_k": 1 + (size * 37) % 101, "head_dim": (24, 8)[n % 2]}
        check(FlashCase(batch=1, causal=causal, dtype=DTYPES[n % 3], heads_k=1 + n % 2, **sizes),
              target.backend)  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 16, 64, 72, 128, 256, 576])
def test_head_dims(target: Target, head_dim: int) -> None:
    check(FlashCase(batch=1, seqlen_q=37, seqlen_k=70, head_dim=head_dim, dtype=torch.bfloat16,
                    causal=True), target.backend)  # fmt: skip


@pytest.mark.parametrize(("hq", "hk"), [(1, 1), (3, 1), (7, 1), (9, 3), (14, 2), (24, 1)])
def test_group_sizes(target: Target, hq: int, hk: int) -> None:
    check(FlashCase(seqlen_q=50, seqlen_k=66, heads_q=hq, heads_k=hk, head_dim=24, causal=True,
                    alibi="head"), target.backend)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target: Target, layout: Any, dtype: torch.dtype) -> None:
    check(FlashCase(seqlen_q=21, seqlen_k=70, heads_q=4, heads_k=2, dtype=dtype, layout=layout),
          target.backend)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_long_rows(target: Target, dtype: torch.dtype) -> None:
    # several key blocks, several tiles in each chunk, a tail in each direction
    check(FlashCase(batch=1, seqlen_q=1001, seqlen_k=1111, heads_q=2, heads_k=1, head_dim=64,
                    causal=True, dtype=dtype),
          target.backend, blocks=(64, 64), topk=40)  # fmt: skip


@pytest.mark.parametrize("blocks", [(1, 1), (1, 200), (200, 1), (3, 7), (48, 256), (500, 500)])
def test_block_sizes(target: Target, blocks: tuple[int, int]) -> None:
    check(FlashCase(seqlen_q=150, seqlen_k=170, causal=True), target.backend, blocks=blocks)


@pytest.mark.parametrize("n", [1, 2, 64, 300, 1000])
def test_topk_sizes(target: Target, n: int) -> None:
    # more keys than a row has, than a block has, than there are
    check(FlashCase(batch=1, seqlen_q=31, seqlen_k=301, causal=True), target.backend, topk=n)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.5, 2.0])
def test_thresholds(target: Target, threshold: float) -> None:
    check(FlashCase(batch=2, seqlen_q=33, seqlen_k=60, causal=True, spread=3.0), target.backend,
          threshold=threshold)  # fmt: skip


@pytest.mark.parametrize("spans", [1, 2, 50, 300])
def test_span_counts(target: Target, spans: int) -> None:
    cuts = torch.linspace(0, 290, spans + 1).to(torch.int32)
    dmass = torch.randn(2, 2, 70, spans)
    check(FlashCase(seqlen_q=70, seqlen_k=290, causal=True), target.backend, boundaries=cuts,
          dmass=dmass)  # fmt: skip


def test_float64_reference() -> None:
    for options in FEATURES.values():
        check(FlashCase(**{"seqlen_q": 20, "seqlen_k": 75, "dtype": torch.float64, "head_dim": 5,
                           **options}), "reference")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("dim", [1, 7, 64, 200])
def test_head_gradient(target: Target, dtype: torch.dtype, dim: int) -> None:
    dout, out = (torch.randn(2, 65, 3, dim).to(dtype) for _ in range(2))
    terms = dout.double() * out.double()
    rows = reductions.head_gradient(dout, out, per_row=True, backend=target.backend)
    sums = reductions.head_gradient(dout, out, backend=target.backend)
    assert rows.dtype == sums.dtype == torch.float32
    unit = 16 * 2.0**-24
    assert bool(((rows - terms.sum(-1).transpose(1, 2)).abs()
                 <= unit * terms.abs().sum(-1).transpose(1, 2)).all())  # fmt: skip
    assert bool(((sums - terms.sum((1, 3))).abs() <= unit * terms.abs().sum((1, 3))).all())
