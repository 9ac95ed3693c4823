"""Paged attention against float64: page sizes, groups, dtypes, codes, features, mixed batches."""

from __future__ import annotations

import pytest
import torch

from attnforge.testing.cases import Target
from attnforge.testing.compare import compare
from attnforge.testing.paged import PagedCase

pytestmark = pytest.mark.thinned(3)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(case: PagedCase, target: Target, **more: object) -> None:
    inputs = case.make()
    compare(inputs.forward(target.backend, **more), inputs.truth(target.rounded), str(case)).check()


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 8, 16, 19, 64, 128, 256])
def test_page_sizes(target: Target, page_size: int) -> None:
    # dense_paged 5.2, 10: last pages of one slot and full ones among the lengths
    check(PagedCase(lengths=(70, 1, 64, 0, 33, 257), rows=(1,) * 6, page_size=page_size), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("rows", [(1, 1), (3, 40), (70, 2)], ids=["decode", "mixed", "prefill"])
def test_dtypes_and_layouts(
    target: Target, dtype: torch.dtype, layout: str, rows: tuple[int, ...]
) -> None:
    check(PagedCase(lengths=(300, 47), rows=rows, page_size=8, head_dim=64, dtype=dtype,
                    layout=layout, strided=True), target)  # fmt: skip


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 24])
@pytest.mark.parametrize("rows", [1, 8])
def test_groups(target: Target, group: int, rows: int) -> None:
    check(PagedCase(lengths=(90, 20), rows=(rows, rows), heads_q=2 * group, head_dim=16), target)


@pytest.mark.parametrize("code", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("scales", ["head", "page", "token"])
@pytest.mark.parametrize("rows", [1, 40])
def test_codes(target: Target, code: str, scales: str, rows: int) -> None:
    # dense_paged 5.2, 26
    check(PagedCase(lengths=(75, 41), rows=(rows, rows), page_size=5, head_dim=64, code=code,
                    scales=scales, zeros=code != "fp8" and scales != "head",
                    dtype=torch.bfloat16), target)  # fmt: skip


@pytest.mark.parametrize("rows", [1, 20, 120])
@pytest.mark.parametrize(("code", "zero", "held"), [("int4", 14.95, 255), ("int8", 126.9, 127)])
def test_values_beside_a_zero_point(
    target: Target, code: str, zero: float, held: int, rows: int
) -> None:
    # one key, whose value is what a zero leaves of a code: a twentieth of a step
    inputs = PagedCase(lengths=(1, 1), rows=(rows, rows), causal=False, code=code, scales="page",
                       zeros=True).make()  # fmt: skip
    zeros = (torch.full_like(inputs.options["kv_zeros"][0], zero),) * 2
    inputs = inputs.with_(v_pages=torch.full_like(inputs.v_pages, held), kv_zeros=zeros)
    got, want = inputs.forward(target.backend), inputs.truth(target.rounded)
    compare(got, want).check()
    error = (got["out"].double() - want.values["out"]).abs().max()
    assert error < 2e-5 * inputs.options["kv_scales"][1].max()  # of a step


@pytest.mark.parametrize("code", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [8, 40, 72])
def test_codes_of_odd_dims(target: Target, code: str, head_dim: int) -> None:
    for rows in (2, 30):
        check(PagedCase(rows=(rows, rows), head_dim=head_dim, v_head_dim=head_dim + 24, code=code,
                        layout="HND", strided=True, dtype=torch.float16), target)  # fmt: skip


@pytest.mark.parametrize("options", [
    {"window": (20, 0)}, {"window": (5, 3), "causal": False}, {"causal": False},
    {"softcap": 5.0}, {"alibi": True}, {"sinks": True}, {"tree": True, "rows": (6, 6)},
    {"head_dim": 576, "v_head_dim": 512, "latent": True, "heads_k": 1, "dtype": torch.bfloat16},
    {"head_dim": 48, "v_head_dim": 80}, {"lengths": ((70, 3), (0, 41))},
    {"lengths": ((70, 3), (9, 41)), "code": "int8", "window": (9, 0), "sinks": True},
], ids=lambda o: "_".join(o))  # fmt: skip
@pytest.mark.parametrize("rows", [2, 33])
def test_features(target: Target, options: dict[str, object], rows: int) -> None:
    base: dict[str, object] = {"rows": (rows, rows), "page_size": 4}
    check(PagedCase(**{**base, **options}), target)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_splits", [0, 1, 3, 17, 500])
def test_splits(target: Target, num_splits: int) -> None:
    check(PagedCase(lengths=(150, 71, 2), rows=(1, 1, 1)), target, num_splits=num_splits)


def test_lengths_around_the_fixed_split(target: Target) -> None:
    check(PagedCase(lengths=(2047, 2048, 2049, 4500), rows=(1,) * 4, head_dim=16), target)


def test_more_rows_than_keys(target: Target) -> None:
    inputs = PagedCase(lengths=(2, 0, 6), rows=(5, 5, 5), tree=True).make()
    got = inputs.forward(target.backend)
    compare(got, inputs.truth()).check()
    assert (got["lse"][1] == -torch.inf).all()
    assert not got["out"][1].any()
