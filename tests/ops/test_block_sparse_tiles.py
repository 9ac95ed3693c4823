"""Block-sparse attention on levels of matrix tiles: what they serve, and their software twin.

Values, options, hidden keys and packed sequences of bf16 are tested with every other level in
``test_block_sparse.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge.testing.block_sparse import check, random_lists
from attnforge.testing.cases import FlashCase, use_isa
from attnforge.testing.compare import same_bits

Need = Callable[..., None]  # the fixture of tests/conftest.py
BELOW = {"amx": "avx512", "amx_soft": "avx512_soft"}
BF16 = torch.bfloat16
LISTS = [(1, 64), (1, 512), (64, 64), (128, 300), (16, 8)]  # q_block, kv_block
SHAPE: dict[str, Any] = {"seqlen_q": 300, "seqlen_k": 700, "heads_q": 4, "heads_k": 2}


def on(level: str, case: FlashCase, lists: BlockSelection) -> tuple[Tensor, Tensor]:
    inputs = case.make()
    with use_isa(level):
        out: tuple[Tensor, Tensor] = attnforge.block_sparse_attention(
            inputs.q, inputs.k, inputs.v, lists, causal=case.causal, return_lse=True, backend="cpu"
        )
    return out


@pytest.mark.parametrize("level", BELOW)
def test_bf16_is_served_by_tiles_and_the_rest_by_the_level_below(level: str, need: Need) -> None:
    need(level, BELOW[level])
    for dtype in (BF16, torch.float16, torch.float32):
        case = FlashCase(dtype=dtype, head_dim=64, causal=True, **SHAPE)
        lists = random_lists(case, 2, 64, 64, 0.5)
        got, below = on(level, case, lists), on(BELOW[level], case, lists)
        assert same_bits(got[0], below[0]) == (dtype is not BF16)
        assert same_bits(got[1], below[1]) == (dtype is not BF16)


@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("lists", LISTS, ids=str)
def test_the_software_twin_has_the_bits_of_the_hardware(
    head_dim: int, lists: tuple[int, int], need: Need
) -> None:
    need("amx", "amx_soft")
    case = FlashCase(head_dim=head_dim, dtype=BF16, causal=True, **SHAPE)
    selection = random_lists(case, 4, *lists, 0.5)
    for got, want in zip(on("amx_soft", case, selection), on("amx", case, selection), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30, 3.0])
@pytest.mark.parametrize("level", BELOW)
def test_any_scale(level: str, scale: float, need: Need) -> None:
    """Scores are scaled as part of softmax only where that keeps the maximum."""
    need(level)
    case = FlashCase(dtype=BF16, softmax_scale=scale, causal=True, seqlen_q=70, seqlen_k=130)
    with use_isa(level):
        for q_block in (1, 64):
            check(case, random_lists(case, 1, q_block, 32, 0.6), "cpu")


@pytest.mark.parametrize("lists", LISTS, ids=str)
@pytest.mark.parametrize("level", BELOW)
def test_a_row_does_not_depend_on_its_neighbours(
    level: str, lists: tuple[int, int], need: Need
) -> None:
    """In a batch or alone, and whatever the values of others behind it are."""
    need(level)
    case = FlashCase(batch=2, dtype=BF16, causal=True, **SHAPE)
    selection = random_lists(case, 2, *lists, 0.5)
    inputs = case.make()
    v = inputs.v.clone()
    v[:, 650:] = float("nan")  # keys that the last 50 rows alone may see
    alone = BlockSelection.from_indices(
        selection.indices[1:], q_block=selection.q_block, kv_block=selection.kv_block
    )
    with use_isa(level):
        args = {"causal": True, "backend": "cpu"}
        whole = attnforge.block_sparse_attention(inputs.q, inputs.k, inputs.v, selection, **args)
        one = attnforge.block_sparse_attention(
            inputs.q[1:], inputs.k[1:], inputs.v[1:], alone, **args
        )
        spoiled = attnforge.block_sparse_attention(inputs.q, inputs.k, v, selection, **args)
    assert same_bits(one, whole[1:])
    assert same_bits(spoiled[:, :250], whole[:, :250])
