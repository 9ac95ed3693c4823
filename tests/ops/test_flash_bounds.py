"""Forward, LSE and every gradient within the per-element bound of the float64 truth."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import compare

pytestmark = pytest.mark.thinned(3)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]
HEAD_DIMS = [8, 16, 24, 40, 64, 72, 80, 96, 128, 160, 192, 256]


def check(case: FlashCase, target: Target | str) -> None:
    inputs = case.make()
    backend = target if isinstance(target, str) else target.backend
    compare(inputs.run(backend), inputs.truth(), inputs.context).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("sq", "sk"),
    [(1, 1), (1, 128), (3, 199), (16, 500), (64, 128), (113, 203), (239, 1), (130, 67)],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_bounds_on_a_grid_of_lengths(
    target: Target, dtype: torch.dtype, sq: int, sk: int, causal: bool
) -> None:
    # checks 1, 2, 3, 27
    check(FlashCase(seqlen_q=sq, seqlen_k=sk, heads_q=4, heads_k=2, head_dim=32, dtype=dtype,
                    causal=causal), target)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(target: Target, head_dim: int, dtype: torch.dtype) -> None:
    # check 26
    check(FlashCase(batch=1, seqlen_q=37, seqlen_k=70, head_dim=head_dim, dtype=dtype,
                    causal=True), target)  # fmt: skip


@pytest.mark.parametrize(
    ("d", "dv"), [(192, 128), (64, 128), (128, 64), (8, 256), (256, 8), (72, 40), (576, 512)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [2, 35])
def test_v_head_dim_differs(target: Target, d: int, dv: int, dtype: torch.dtype, rows: int) -> None:
    # check 26
    check(FlashCase(batch=1, seqlen_q=rows, seqlen_k=50, heads_q=4, heads_k=1, head_dim=d,
                    v_head_dim=dv, dtype=dtype), target)  # fmt: skip


@pytest.mark.parametrize(
    ("hq", "hk"), [(1, 1), (3, 1), (5, 1), (7, 1), (9, 3), (10, 2), (14, 2), (16, 1), (24, 1)]
)
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_group_sizes(target: Target, hq: int, hk: int, rows: int) -> None:
    check(FlashCase(seqlen_q=rows, seqlen_k=66, heads_q=hq, heads_k=hk, head_dim=24, causal=True,
                    alibi="head"), target)  # fmt: skip


FEATURES = {
    "softcap": {"softcap": 15.0, "spread": 3.0},
    "softcap_saturated": {"softcap": 1.5, "spread": 30.0},
    "alibi": {"alibi": "head", "causal": True},
    "alibi_batch": {"alibi": "batch"},
    "sinks": {"sinks": "normal"},
    "sinks_mixed": {"sinks": "mixed", "causal": True},
    "scale": {"softmax_scale": 0.37},
    "negative_scale": {"softmax_scale": -0.25},
    "zero_scale": {"softmax_scale": 0.0},
    "used": {"used": (0, 41), "causal": True},
    "all": {"softcap": 8.0, "alibi": "batch", "sinks": "mixed", "used": (70, 33), "causal": True,
            "window": (20, 0), "softmax_scale": 0.3},
    "v_mean": {"v_mean": 3.0},
    "peaky": {"spread": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("rows", [2, 60])
def test_features(target: Target, name: str, dtype: torch.dtype, rows: int) -> None:
    options = {"seqlen_k": 75, **FEATURES[name]}
    case = FlashCase(seqlen_q=rows, heads_q=6, heads_k=3, head_dim=40, dtype=dtype, **options)
    check(case, target)


WINDOWS = [(0, 0), (1, 0), (16, 0), (1023, 0), (-1, 17), (3, 5), (0, -1), (-1, 0), (40, 40), (0, 1)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}_{w[1]}")
@pytest.mark.parametrize(("sq", "sk"), [(97, 97), (30, 140), (140, 30)])
def test_windows(target: Target, window: tuple[int, int], sq: int, sk: int) -> None:
    # check 28: also windows larger than Sk and windows with Sq > Sk
    check(FlashCase(batch=1, seqlen_q=sq, seqlen_k=sk, heads_q=2, heads_k=1, head_dim=16,
                    window=window), target)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_long_rows(target: Target, dtype: torch.dtype) -> None:
    # Several key tiles of every kernel, a tail in each direction.
    check(FlashCase(batch=1, seqlen_q=301, seqlen_k=1111, heads_q=2, heads_k=1, head_dim=64,
                    causal=True, dtype=dtype), target)  # fmt: skip


def test_float64_reference() -> None:
    for options in (*FEATURES.values(), {"causal": True, "seqlen_q": 90}):
        check(FlashCase(**{"seqlen_k": 75, "dtype": torch.float64, "head_dim": 5, "v_head_dim": 3,
                           **options}), "reference")  # fmt: skip


def tails() -> list[tuple[int, int]]:
    """Every Sq and every Sk of 1..130 at least once, and the neighbours of each tile edge."""
    rng = random.Random(0)
    columns = list(range(1, 131))
    rng.shuffle(columns)
    pairs = list(zip(range(1, 131), columns, strict=True))
    edges = [n + d for n in (8, 16, 32, 64, 128) for d in (-1, 0, 1)]
    return pairs + rng.sample(list(itertools.product(edges, edges)), 60)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_tails(target: Target, causal: bool) -> None:
    # check 25, sampled
    for n, (sq, sk) in enumerate(tails()):
        sizes = {
            "seqlen_q": sq,
            "seqlen_k": sk,
            "heads_k": 1 + n % 2,
            "head_dim": (24, 8)[n % 4 > 0],
        }
        check(FlashCase(batch=1, causal=causal, dtype=DTYPES[n % 3], **sizes), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_gradient_of_lse_alone_leaves_v(target: Target, dtype: torch.dtype) -> None:
    # dO = 0: dV is exactly 0, dQ and dK carry the gradient of the LSE
    inputs = FlashCase(seqlen_q=20, seqlen_k=45, causal=True, dtype=dtype).make()
    inputs = inputs.with_(dout=torch.zeros_like(inputs.dout))
    got = inputs.run(target.backend)
    assert not got["dv"].any()
    assert got["dq"].any()
    compare(got, inputs.truth(), inputs.context).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_delta_comes_from_unrounded_output(target: Target, dtype: torch.dtype) -> None:
    # check 5: with V of mean 3 a delta from the rounded O gives up to 3e-2
    inputs = FlashCase(batch=1, seqlen_q=256, seqlen_k=256, head_dim=64, v_mean=3.0, dtype=dtype,
                       lse_grad=False).make()  # fmt: skip
    got, want = inputs.run(target.backend), inputs.truth()
    for name in ("dq", "dk"):
        error = (got[name].double() - want.values[name]).abs().max() / want.values[name].abs().max()
        assert error <= 5e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounding_has_no_bias(level: Target, dtype: torch.dtype) -> None:
    # check 4: 2^20 output elements; the mean error within 3 standard errors. Truncation gives 500.
    inputs = FlashCase(batch=4, seqlen_q=512, seqlen_k=32, heads_q=8, heads_k=8, head_dim=64,
                       dtype=dtype).make()  # fmt: skip
    got, want = inputs.forward(level.backend), inputs.truth(grad=False)
    assert want.values["out"].numel() == 1 << 20
    stats = {s.name: s for s in compare(got, want).check().stats}
    assert abs(stats["out"].bias) <= 3
