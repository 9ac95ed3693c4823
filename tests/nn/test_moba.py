"""nn.MoBA: cached and packed calls, block means, gradients."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge import nn as anf


def layer() -> anf.MoBA:
    return anf.MoBA(32, 4, 2, block_size=16, top_k=3)


@pytest.mark.parametrize("prompt", [1, 16, 41])
def test_cached_calls_are_the_whole_call(prompt: int) -> None:
    net = layer()
    x = torch.randn(2, 90, 32)
    with torch.no_grad():
        want = net(x)
        cache = anf.MoBACache()
        parts = [net(x[:, :prompt], cache=cache)]
        while cache.length < 90:
            step = {0: 1, 1: 19, 2: 4}[len(parts) % 3]
            parts.append(net(x[:, cache.length : cache.length + step], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=2e-5, atol=2e-6)


def test_means_of_the_cache() -> None:
    cache = anf.MoBACache()
    k = torch.randn(2, 50, 2, 8)
    for first, last in ((0, 3), (3, 16), (16, 40), (40, 41), (41, 50)):
        means = cache.add(k[:, first:last], k[:, first:last], 16)[2]
        want = attnforge.pool_blocks(k[:, :last], block=16, partial=True)
        torch.testing.assert_close(means, want)


def test_packed_and_gradients() -> None:
    net = layer().double()
    cu = torch.tensor([0, 40, 40, 75], dtype=torch.int32)
    x = torch.randn(1, 75, 32, dtype=torch.float64, requires_grad=True)
    got = net(x, cu_seqlens=cu)
    want = torch.cat([net(x[:, :40]), net(x[:, 40:])], 1)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    for p in net.parameters():
        assert p.grad is not None
        assert p.grad.any()


def test_errors() -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 40, 2, 8)
    with pytest.raises(ValueError, match="means has shape"):
        attnforge.moba_select(q, k, block_size=16, top_k=2, means=k[:, :2])
    with pytest.raises(ValueError, match="num_heads is 3"):
        anf.MoBA(32, 3, 2)
    with pytest.raises(ValueError, match="cache serves inference"):
        layer()(torch.zeros(1, 4, 32), cache=anf.MoBACache())
