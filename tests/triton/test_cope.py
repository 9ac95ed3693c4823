"""Contextual positions in Triton, within the bounds of the float64 truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnforge.backends.triton import cope
from attnforge.testing.compare import compare
from attnforge.testing.cope import CopeCase
from attnforge.triton_kernels.cope import positions

CASES: dict[str, dict[str, Any]] = {
    "causal": {"seqlen_q": 20, "seqlen_k": 37},
    "full": {"causal": False, "seqlen_q": 20, "seqlen_k": 37, "heads_q": 4, "table_heads": None},
    "window": {"batch": 1, "seqlen_q": 20, "seqlen_k": 70, "window": (30, 0), "positions": 30,
               "head_dim": 24, "v_head_dim": 8},
    "one_position": {"batch": 1, "seqlen_q": 17, "positions": 1},
    "sixteen_bits": {"seqlen_q": 17, "seqlen_k": 60, "used": (60, 13), "positions": 5,
                     "dtype": torch.bfloat16},
    "packed": {"lengths": ((9, 20), (0, 5), (17, 12), (3, 0)), "heads_q": 4, "table_heads": None,
               "causal": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in each direction, and row tiles that are not key tiles."""
    tile = {**positions.BLOCKS, "BLOCK_M": 16, "BLOCK_N": 32}
    monkeypatch.setattr(positions, "blocks", lambda *_: dict(tile))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("edges", [1, 1 << 24], ids=["row_by_row", "at_once"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_formula(monkeypatch: pytest.MonkeyPatch, name: str, edges: int) -> None:
    monkeypatch.setattr(cope, "_EDGES", edges)
    inputs = CopeCase(**CASES[name]).make()
    compare(inputs.run("triton"), inputs.truth(rounded=True), inputs.context).check()


@pytest.mark.parametrize("which", ["k", "v"])
def test_hidden_nan_stays_hidden(which: str) -> None:
    inputs = CopeCase(batch=1, seqlen_q=60, seqlen_k=60, window=(20, 0)).make()
    bad = getattr(inputs, which).clone()
    bad[:, 20] = math.nan
    got, want = inputs.with_(**{which: bad}).run("triton"), inputs.run("triton")
    clean = (torch.arange(60) < 20) | (torch.arange(60) > 40)
    for name in ("out", "dq"):
        assert torch.allclose(got[name][:, clean], want[name][:, clean], atol=1e-5)
        assert got[name][:, 20:41].isnan().any(-1).all()
