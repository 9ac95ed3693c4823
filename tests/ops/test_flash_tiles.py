"""Levels of matrix tiles: what they serve, their software twin, and other users of the tiles.

Bounds, masks, features, layouts and non-finite values of these levels are tested with every other
level in the files beside this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnforge.testing.cases import FlashCase, FlashInputs, use_isa
from attnforge.testing.compare import assert_same, compare, same_bits

Need = Callable[..., None]  # the fixture of tests/conftest.py
BELOW = {"amx": "avx512", "amx_soft": "avx512_soft"}
BF16 = torch.bfloat16
SHAPE: dict[str, Any] = {"seqlen_q": 70, "seqlen_k": 130, "heads_q": 4, "head_dim": 40}


def on(level: str, inputs: FlashInputs) -> dict[str, Tensor]:
    with use_isa(level):
        return inputs.forward("cpu")


@pytest.mark.parametrize("level", BELOW)
def test_bf16_is_served_by_tiles_and_the_rest_by_the_level_below(level: str, need: Need) -> None:
    need(level, BELOW[level])
    tiles = FlashCase(dtype=BF16, **SHAPE).make()
    assert not same_bits(on(level, tiles)["out"], on(BELOW[level], tiles)["out"])
    for case in (
        FlashCase(dtype=torch.float32, **SHAPE),
        FlashCase(dtype=torch.float16, **SHAPE),
        FlashCase(dtype=torch.float8_e4m3fn, q_dtype=BF16, **SHAPE),
        FlashCase(dtype=BF16, mods=("rope",), **SHAPE),
    ):
        inputs = case.make()
        assert_same(on(level, inputs), on(BELOW[level], inputs), inputs.context)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_the_software_twin_has_the_bits_of_the_hardware(
    head_dim: int, causal: bool, need: Need
) -> None:
    need("amx", "amx_soft")
    inputs = FlashCase(seqlen_q=300, seqlen_k=700, heads_q=2, heads_k=1, head_dim=head_dim,
                       dtype=BF16, causal=causal).make()  # fmt: skip
    assert_same(on("amx_soft", inputs), on("amx", inputs), inputs.context)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30, 3.0])
@pytest.mark.parametrize("level", BELOW)
def test_any_scale(level: str, scale: float, need: Need) -> None:
    """Scores are scaled as part of softmax only where that keeps the maximum."""
    need(level)
    with use_isa(level):
        inputs = FlashCase(dtype=BF16, softmax_scale=scale, causal=True, **SHAPE).make()
        compare(inputs.forward("cpu"), inputs.truth(grad=False), inputs.context).check()


@pytest.mark.parametrize("level", BELOW)
def test_a_row_does_not_depend_on_its_neighbours(level: str, need: Need) -> None:
    """Alone, in a batch, and beside keys with a NaN that it does not see."""
    need(level)
    inputs = FlashCase(batch=3, dtype=BF16, causal=True, **SHAPE).make()
    whole = on(level, inputs)
    q, k, v = (x[1:2] for x in (inputs.q, inputs.k, inputs.v))
    alone = on(level, inputs.with_(q=q, k=k, v=v))
    assert same_bits(alone["out"], whole["out"][1:2])
    spoiled = v.clone()
    for n, x in enumerate((float("nan"), float("inf"), -float("inf"))):
        spoiled[:, -9 + n :: 3] = x
    rows = SHAPE["seqlen_q"] - 9
    got = on(level, inputs.with_(q=q, k=k, v=spoiled))["out"][:, :rows]
    assert same_bits(got, alone["out"][:, :rows])
    last = on(level, inputs.with_(q=q[:, :rows], k=k[:, :-9], v=v[:, :-9]))
    assert same_bits(last["out"], alone["out"][:, :rows])


def _others() -> list[Callable[[], Tensor]]:
    """bf16 of torch, which runs on tiles too where the CPU has them, in shapes of many kinds."""
    a, b = torch.randn(257, 136).to(BF16), torch.randn(136, 72).to(BF16)
    q, k, v = (torch.randn(1, 2, 129, 64).to(BF16) for _ in range(3))
    big = torch.randn(512, 512).to(BF16)
    return [
        lambda: a @ b,
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: big @ big,
        lambda: torch.nn.functional.linear(a, b.T.contiguous()),
    ]


def test_torch_and_we_share_the_tiles_of_a_thread(need: Need) -> None:
    """Each finds the tiles as it needs them, whoever used them last on that thread."""
    need("amx")
    inputs = FlashCase(dtype=BF16, seqlen_q=200, seqlen_k=200, heads_q=4, head_dim=64).make()
    wrong: list[str] = []

    def alternate(threads: int) -> None:
        torch.set_num_threads(threads)
        others = _others()
        want, ours = [f() for f in others], inputs.forward("cpu")["out"]
        for turn in range(6):
            for f, expected in zip(others, want, strict=True):
                if not same_bits(f(), expected):
                    wrong.append(f"torch, turn {turn}, {threads} threads")
                if not same_bits(inputs.forward("cpu")["out"], ours):
                    wrong.append(f"attnforge, turn {turn}, {threads} threads")

    with use_isa("amx"):
        for threads in (1, 2):
            alternate(threads)
        workers = [threading.Thread(target=alternate, args=(1,)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []
