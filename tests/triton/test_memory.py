"""Reads and writes of the Triton kernels stay inside tensors; offsets are 64-bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge._params import FlashParams
from attnforge.backends.triton import flash
from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import assert_same
from attnforge.testing.poison import Fenced, fenced, lazy

CASES = [
    FlashCase(seqlen_q=17, seqlen_k=41, heads_q=2, heads_k=1, head_dim=24, causal=True,
              alibi="batch", sinks="normal", softcap=9.0),
    FlashCase(seqlen_q=2, seqlen_k=41, heads_q=4, heads_k=1, head_dim=40, v_head_dim=8,
              decode=True, causal=True, used=(41, 7)),
    FlashCase(batch=1, seqlen_q=33, seqlen_k=35, head_dim=72, window=(17, 3)),
    FlashCase(lengths=((5, 9), (0, 3), (40, 33), (1, 1)), causal=True, used=(9, 0, 20, 1)),
    FlashCase(batch=1, seqlen_q=1, seqlen_k=1, heads_q=1, heads_k=1, head_dim=8),
]  # fmt: skip


def relocated(inputs: FlashInputs, move: Any) -> FlashInputs:
    """Every tensor of a call, index tensors included, through ``move``."""
    options = {n: move(x) if isinstance(x, Tensor) else x for n, x in inputs.options.items()}
    return inputs.with_(
        **{n: move(getattr(inputs, n)) for n in ("q", "k", "v", "dout", "dlse")}, **options
    )


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_fenced_inputs(case: FlashCase) -> None:
    # NaN (or -1) on either side of every input; margins unchanged, results the same
    inputs = case.make()
    fences: list[Fenced] = []

    def move(x: Tensor) -> Tensor:
        fences.append(fenced(x))
        return fences[-1].tensor

    moved = relocated(inputs, move)
    assert_same(moved.run("triton"), inputs.run("triton"), inputs.context)
    assert_same(moved.forward("triton"), inputs.forward("triton"))
    assert all(f.intact() for f in fences)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_writes_stay_inside_outputs(case: FlashCase) -> None:
    inputs = case.make()
    buffers: list[tuple[Tensor, int]] = []
    make = torch.Tensor.new_empty

    def fence(self: Tensor, size: Any, **options: Any) -> Tensor:
        """new_empty in the middle of a buffer of sevens."""
        size = (size,) if isinstance(size, int) else tuple(size)
        numel = torch.Size(size).numel()
        buffer = make(self, (numel + 128,), **options).fill_(7)
        buffers.append((buffer, numel))
        return buffer[64 : 64 + numel].view(size)

    want = inputs.run("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", fence)
        patch.setattr(torch, "empty_like", lambda x, **_: fence(x, x.shape))
        assert_same(inputs.run("triton"), want)
        if case.decode:
            inputs.forward("triton", num_splits=2)
    assert len(buffers) > 5
    for buffer, numel in buffers:
        assert (buffer[:64] == 7).all()
        assert (buffer[64 + numel :] == 7).all()


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "head"])
def test_offsets_past_2_to_the_31(dim: int) -> None:
    # strides of 2^30 elements or more over untouched address space: int32 products would wrap
    case = FlashCase(batch=3, seqlen_q=3, seqlen_k=5, heads_q=3, heads_k=3, head_dim=8)
    inputs = case.make()
    want = inputs.forward("triton")
    decoded = replace(case, decode=True).make().forward("triton")

    def spread(x: Tensor) -> Tensor:
        strides = list(x.stride())
        strides[dim] = (1 << 32) // (x.shape[dim] - 1)
        view = lazy((1 << 32) + (1 << 12), x.dtype).as_strided(x.shape, strides)
        view.copy_(x)
        return view

    q, k, v = map(spread, (inputs.q, inputs.k, inputs.v))
    got = {"out": torch.empty_like(inputs.q), "lse": torch.empty_like(want["lse"])}
    p = FlashParams(None, None, None, None, None, 3, 5, 8**-0.5, -1, -1, 0.0)
    flash.decode(q, k, v, p, *got.values(), 0)
    assert_same(got, decoded)
    flash.fwd(q, k, v, p, *got.values(), q.new_empty(0))
    assert_same(got, want)
