"""YOSO: the sample is unbiased for the expectation, both are their formulas, gradients too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.ops import _retrieval_ops

TAU, HASHES = 4, 8


def tensors(queries: int = 20, keys: int = 24, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Some queries near keys, so that chances range widely."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(2, keys, heads, 16, generator=g)
    near = torch.linspace(0, 3, queries).view(1, -1, 1, 1)
    q = near * k[:, :queries] + torch.randn(2, queries, heads, 16, generator=g)
    return q, k, torch.randn(2, keys, heads, 8, generator=g)


def cosines(q: Tensor, k: Tensor) -> Tensor:
    """float64 [B, H, Sq, Sk]."""
    q, k = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (q, k))
    return torch.einsum("bihd,bjhd->bhij", q, k)


def chances(q: Tensor, k: Tensor, tau: int = TAU) -> Tensor:
    return (1 - torch.acos(cosines(q, k).clamp(-1, 1)) / math.pi) ** tau


def collisions(q: Tensor, k: Tensor, seed: int) -> Tensor:
    """B of a seed, from the codes alone: [B, H, Sq, Sk]."""
    planes = torch.randn(16, TAU * HASHES, generator=torch.Generator().manual_seed(seed))
    a, b = (
        _retrieval_ops.lsh_encode(x / x.norm(dim=-1, keepdim=True), None, planes, TAU, HASHES, None)
        for x in (q, k)
    )
    return (a.unsqueeze(3) == b.unsqueeze(2)).double().mean(-1)


def slopes(x: Tensor) -> Tensor:
    """dE/dx with 1 / sqrt(1 - x^2) at most 10."""
    p = 1 - torch.acos(x.clamp(-1, 1)) / math.pi
    return TAU * p ** (TAU - 1) / math.pi * (1 - x * x).clamp_min(0.01).rsqrt()


def sampled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attnforge.yoso_attention(q, k, v, num_hashes=HASHES, tau=TAU, **options)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("expectation", [False, True])
def test_forward_is_its_formula(expectation: bool, normalize: bool) -> None:
    q, k, v = tensors()
    weights = chances(q, k) if expectation else collisions(q, k, 5)
    want = torch.einsum("bhij,bjhd->bihd", weights, v.double())
    if normalize:
        norm = want.norm(dim=-1, keepdim=True)
        want = want / norm.where(norm > 0, 1.0)
    got = sampled(q, k, v, seed=5, expectation=expectation, normalize=normalize)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_the_mean_over_seeds_is_the_expectation() -> None:
    """z of each output over 400 seeds; and the variance falls as one over the hashes."""
    q, k, v = tensors(6, 6, 1)
    want = sampled(q, k, v, expectation=True, normalize=False).double()
    spread = {}
    for hashes in (2, 16):
        runs = torch.stack([
            attnforge.yoso_attention(q, k, v, num_hashes=hashes, tau=TAU, seed=s, normalize=False)
            for s in range(400)
        ]).double()  # fmt: skip
        z = (runs.mean(0) - want) / (runs.std(0) / 20)
        assert float(z.abs().max()) < 4.5  # of 96 correlated ones
        spread[hashes] = float(runs.var(0).mean())
    assert 6.0 < spread[2] / spread[16] < 10.5


def test_seeds_and_scales() -> None:
    q, k, v = tensors()
    first = sampled(q, k, v, seed=1)
    assert torch.equal(first, sampled(q, k, v, seed=1))
    assert not torch.equal(first, sampled(q, k, v, seed=2))
    torch.testing.assert_close(first, sampled(64 * q, k / 8, v, seed=1))


def gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of unit q and k: what is orthogonal to them is all that passes the normalisation."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sampled(*inputs, normalize=False, **options)
    return torch.autograd.grad(out, inputs, g)  # type: ignore[return-value]


@pytest.mark.parametrize("gradient", ["lower_bound", "derivative"])
@pytest.mark.parametrize("expectation", [False, True])
def test_gradients_are_the_surrogates(expectation: bool, gradient: str) -> None:
    q, k, v = tensors()
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    g = torch.randn(2, 20, 2, 8, generator=torch.Generator().manual_seed(1))
    weights = chances(q, k) if expectation else collisions(q, k, 5)
    slope = TAU / 2 * weights
    if gradient == "derivative":
        slope = slopes(cosines(q, k)) * (1 if expectation else weights > 0)
    dx = torch.einsum("bihd,bjhd->bhij", g.double(), v.double()) * slope
    want = [
        torch.einsum("bhij,bjhd->bihd", dx, k.double()),
        torch.einsum("bhij,bihd->bjhd", dx, q.double()),
        torch.einsum("bhij,bihd->bjhd", weights, g.double()),
    ]
    for n, x in enumerate((q, k)):  # through x / |x| at |x| = 1
        want[n] = want[n] - x * (want[n] * x).sum(-1, keepdim=True)
    got = gradients(q, k, v, g, seed=5, expectation=expectation, gradient=gradient)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)


def test_the_expectation_with_its_derivative_passes_gradcheck() -> None:
    """Away from the pole, where the slope is not cut off."""
    g = torch.Generator().manual_seed(2)
    shape = (1, 5, 1, 8)
    inputs = [
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)
    ]
    assert cosines(inputs[0].detach(), inputs[1].detach()).abs().max() < 0.99
    assert torch.autograd.gradcheck(
        lambda *x: sampled(*x, expectation=True, gradient="derivative"), inputs
    )


def test_the_sampled_gradient_means_its_expectation() -> None:
    q, k, v = tensors(6, 6, 1)
    g = torch.randn(2, 6, 1, 8, generator=torch.Generator().manual_seed(1))
    want = gradients(q, k, v, g, expectation=True)
    runs = [gradients(q, k, v, g, seed=s) for s in range(300)]
    for n in range(3):
        own = torch.stack([run[n] for run in runs]).double()
        z = (own.mean(0) - want[n].double()) / (own.std(0) / 300**0.5).clamp_min(1e-6)
        assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("gradient", ["lower_bound", "derivative"])
@pytest.mark.parametrize("expectation", [False, True])
def test_cosines_at_the_ends(expectation: bool, gradient: str) -> None:
    """Equal, opposite and zero rows: finite, and a key always collides with itself."""
    q, _, v = tensors(24, 24)
    q = q.clone()
    q[:, 0] = 0
    k = torch.cat([q[:, :12], -q[:, 12:]], 1)
    options: dict[str, Any] = {"expectation": expectation, "gradient": gradient}
    for x in (sampled(q, k, v, **options), *gradients(q, k, v, v, **options)):
        assert bool(x.isfinite().all())


def test_masks() -> None:
    """Padding is as if it were not there; nothing to see gives 0 and no gradient."""
    q, k, v = tensors()
    sees, there = torch.ones(2, 20, dtype=torch.bool), torch.ones(2, 24, dtype=torch.bool)
    sees[:, 15:] = there[0, 18:] = False
    there[1] = False
    v = v.masked_fill(~there.view(2, 24, 1, 1), torch.nan)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sampled(*inputs, query_mask=sees, key_mask=there)
    want = sampled(q[:1, :15], k[:1, :18], v[:1, :18])
    torch.testing.assert_close(out[:1, :15], want)
    assert not out[:, 15:].any()
    assert not out[1].any()
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(bool(x.isfinite().all()) for x in grads)
    assert not grads[0][:, 15:].any()
    assert not any(x[1].any() for x in grads)
    assert not any(x[0, 18:].any() for x in grads[1:])


def test_groups_are_repeated_heads() -> None:
    q, k, v = tensors()
    q = torch.cat([q, q.flip(1)], 2)
    got = sampled(q, k, v)
    assert torch.equal(got, sampled(q, *(x.repeat_interleave(2, 2) for x in (k, v))))
    half = sampled(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 16}, "tau is 16"),
        ({"num_hashes": 0}, "num_hashes is 0"),
        ({"gradient": "exact"}, "gradient is 'exact'"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, "key_mask is bool"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attnforge.yoso_attention(*tensors(), **arguments)
