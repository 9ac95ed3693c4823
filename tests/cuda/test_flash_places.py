"""Where tensors lie, what else is in a batch and how threads are scheduled change no bit."""

from __future__ import annotations

import pytest
import torch

from attnforge.backends.cuda.flash import HEAD_DIMS
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import assert_same
from attnforge.testing.poison import far_view

pytestmark = pytest.mark.usefixtures("twin")

BACKENDS = ["emulated", "emulated90"]


@pytest.mark.parametrize("strides", [(1 << 26, 1 << 8), (1 << 8, 1 << 32)], ids=["seq", "head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_2_31(backend: str, strides: tuple[int, int]) -> None:
    # q, k, v and dO; 40 rows in tiles of the forward, 2 in those of the decode
    inputs = FlashCase(batch=1, seqlen_q=40, seqlen_k=45, dtype=torch.bfloat16, causal=True).make()
    names = ("q", "k", "v", "dout")
    moved = inputs.with_(**{n: far_view(getattr(inputs, n), *strides, beyond=64) for n in names})
    assert_same(moved.run(backend), inputs.run(backend))
    inputs = FlashCase(batch=1, seqlen_q=2, seqlen_k=45, dtype=torch.bfloat16, decode=True).make()
    moved = inputs.with_(**{n: far_view(getattr(inputs, n), *strides, beyond=64) for n in "qkv"})
    assert_same(moved.forward(backend), inputs.forward(backend))


@pytest.mark.parametrize("rows", [2, 9], ids=["by warp", "by block"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_has_the_same_bits_in_any_batch_and_cache(backend: str, rows: int) -> None:
    lengths = (2150, 40, 700)
    inputs = FlashCase(batch=3, seqlen_q=rows, seqlen_k=2300, heads_q=3, heads_k=1, causal=True,
                       dtype=torch.bfloat16, decode=True, used=lengths).make()  # fmt: skip
    whole = inputs.forward(backend)
    for b, used in enumerate(lengths):
        alone = inputs.with_(
            q=inputs.q[b : b + 1], k=inputs.k[b : b + 1, :used], v=inputs.v[b : b + 1, :used],
            cache_seqlens=torch.tensor([used], dtype=torch.int32),
        )  # fmt: skip
        assert_same(alone.forward(backend), {n: x[b : b + 1] for n, x in whole.items()})


@pytest.mark.parametrize(("d", "dv"), HEAD_DIMS)
def test_gradients_have_the_same_bits_under_every_schedule(d: int, dv: int) -> None:
    # each launch has a schedule of its own; that of sm_90a: test_flash_sm90_bwd.py
    inputs = FlashCase(batch=1, seqlen_q=70, seqlen_k=90, heads_q=2, heads_k=1, head_dim=d,
                       v_head_dim=dv, causal=True, dtype=torch.bfloat16).make()  # fmt: skip
    assert_same(inputs.run("emulated"), inputs.run("emulated"))
