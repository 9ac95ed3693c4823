"""Linear layers against their papers' recurrences in float64, token by token."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge import nn as anf

_spec = importlib.util.spec_from_file_location(
    "linear_oracles", Path(__file__).with_name("linear_oracles.py")
)
assert _spec is not None
assert _spec.loader is not None
oracles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracles)

NAMES = list(oracles.LAYERS)
LENGTHS = (0, 1, 9, 0, 4, 2)


def layer_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A layer with every parameter off its first value."""
    layer = oracles.LAYERS[name][0]().double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
        for b in layer.buffers():
            b += torch.rand_like(b)
    return layer.to(dtype)


def truth(name: str, layer: Any, x: Tensor) -> Tensor:
    """Every sequence of a batch by the oracle."""
    return torch.stack([oracles.LAYERS[name][1](layer, row) for row in x])


def close(got: Tensor, want: Tensor, part: float) -> None:
    """Within ``part`` of the largest element: a layer's output mixes all of its channels."""
    assert got.shape == want.shape
    gap = (got.double() - want).abs().max() if want.numel() else torch.zeros(())
    size = want.abs().max() if want.numel() else torch.zeros(())
    assert torch.isfinite(got).all()
    assert gap <= part * size + 1e-30, f"{gap:.3g} of {size:.3g}"


def gradients(y: Tensor, top: Tensor, x: Tensor, layer: Any) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *layer.parameters()], top))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(2, 11, oracles.HIDDEN, dtype=torch.float64, requires_grad=True)
    want, (y, state) = truth(name, layer, x), layer(x)
    close(y, want, 1e-11)
    assert state is None
    top = torch.randn_like(want)
    for got, exact in zip(gradients(y, top, x, layer), gradients(want, top, x, layer), strict=True):
        close(got, exact, 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)],
                         ids=["fp32", "bf16"])  # fmt: skip
def test_cpu_kernels(name: str, dtype: torch.dtype, part: float) -> None:
    rounded = layer_of(name, dtype)
    exact = oracles.LAYERS[name][0]().double()
    exact.load_state_dict(rounded.state_dict())
    x = torch.randn(2, 20, oracles.HIDDEN).to(dtype)
    wide = x.double().requires_grad_()
    x.requires_grad_()
    y, _ = rounded(x)
    assert y.dtype is dtype
    want = truth(name, exact, wide)
    close(y, want, part)
    top = torch.randn_like(y)
    got, best = gradients(y, top, x, rounded), gradients(want, top.double(), wide, exact)
    for a, b in zip(got, best, strict=True):
        assert a.dtype is dtype
        close(a, b, 20 * part if dtype is torch.float32 else 3 * part)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences(name: str) -> None:
    layer, total = layer_of(name), sum(LENGTHS)
    x = torch.randn(1, total + 3, oracles.HIDDEN, dtype=torch.float64)  # 3 rows behind the end
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    y, state = layer(x, cu_seqlens=cu, output_final_state=True)
    for n, (lo, hi) in enumerate(itertools.pairwise(cu.tolist())):
        own, last = layer(x[:, lo:hi], output_final_state=True)
        close(y[:, lo:hi], truth(name, layer, x[:, lo:hi]), 1e-11)
        for a, b in zip(state, last, strict=True):
            close(a[n : n + 1], b, 1e-12)
        close(own, y[:, lo:hi], 1e-12)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", NAMES)
def test_prefill_is_decoding_token_by_token(name: str) -> None:
    # 5 tokens, then 1, 1, 4 and 0, each from the state before, with one pass's outputs and states;
    # gradients pass through the states.
    layer = layer_of(name)
    x = torch.randn(2, 11, oracles.HIDDEN, dtype=torch.float64, requires_grad=True)
    whole, end = layer(x, output_final_state=True)
    parts, state = [], None
    for lo, hi in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 11)):
        y, state = layer(x[:, lo:hi], state=state, output_final_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), whole, 1e-11)
    assert len(state) == layer.parts
    for a, b in zip(state, end, strict=True):
        close(a, b, 1e-11)
    top = torch.randn_like(whole)
    for a, b in zip(
        gradients(torch.cat(parts, 1), top, x, layer), gradients(whole, top, x, layer), strict=True
    ):
        close(a, b, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_packed_prefill_then_a_batch_of_tokens(name: str) -> None:
    # prompts of different lengths as one packed batch, then one token for each at once
    layer = layer_of(name, torch.float32)
    x = torch.randn(1, sum(LENGTHS), oracles.HIDDEN)
    nexts = torch.randn(len(LENGTHS), 1, oracles.HIDDEN)
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    with torch.no_grad():
        _, state = layer(x, cu_seqlens=cu, output_final_state=True)
        y, _ = layer(nexts, state=state)
        exact = layer.double()
        for n, (lo, hi) in enumerate(itertools.pairwise(cu.tolist())):
            rows = torch.cat([x[0, lo:hi], nexts[n]]).double()
            close(y[n, -1], oracles.LAYERS[name][1](exact, rows)[-1], 2e-5)


def test_log_normal_follows_its_inputs() -> None:
    layer = anf.LinearLogNormal(oracles.HIDDEN, oracles.HEADS, momentum=1.0)
    x = torch.randn(4, 50, oracles.HIDDEN)
    layer(x)
    q = x @ layer.q_proj.weight.T
    torch.testing.assert_close(layer.q_std, q.unflatten(-1, (2, -1)).std((0, 1, 3)))
    layer.eval()
    kept = layer.q_std.clone()
    layer(3 * x)
    assert torch.equal(layer.q_std, kept)


def test_log_normal_does_not_overflow() -> None:
    layer = anf.LinearLogNormal(oracles.HIDDEN, oracles.HEADS)
    y, _ = layer(1e4 * torch.randn(1, 40, oracles.HIDDEN))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_short_convolution(width: int, bias: bool) -> None:
    conv = anf.ShortConvolution(6, width, bias=bias, activation="silu" if bias else None).double()
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    y, _ = conv(x)
    close(y, torch.stack([oracles.conv(conv, row) for row in x]), 1e-12)


def test_errors() -> None:
    layer = anf.GatedLinearAttention(8, 2)
    with pytest.raises(ValueError, match=r"nn.GatedLinearAttention: x is \(2, 3, 4\); want"):
        layer(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="state is a tuple of 1 tensors; got Tensor"):
        layer(torch.zeros(2, 3, 8), state=torch.zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match="hidden_size 8 is no multiple of 3 heads"):
        anf.Hedgehog(8, 3)
    with pytest.raises(ValueError, match="order is 3; want 1 or 2"):
        anf.FAST(8, 2, order=3)
    with pytest.raises(ValueError, match="lower_bound is 1"):
        anf.HGRN2(8, 2, lower_bound=1.0)
    with pytest.raises(ValueError, match="num_groups is 3; want a divisor of 4 heads"):
        anf.Mamba2(8, 4, num_groups=3)
    conv = anf.ShortConvolution(4)
    with pytest.raises(ValueError, match=r"state is \(1, 4, 4\); want \[2, 3, 4\]"):
        conv(torch.zeros(2, 5, 4), state=torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 2"):
        conv(torch.zeros(1, 5, 4), cu_seqlens=torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match="kernel_size is 0"):
        anf.ShortConvolution(4, 0)
