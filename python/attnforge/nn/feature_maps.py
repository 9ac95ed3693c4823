"""Feature maps phi of queries and keys, so that phi(q) . phi(k) stands for exp(q . k).

All take [.., D] and return [.., F] in fp32 (fp64 stays).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnforge.nn._layer import wide

__all__ = ["HedgehogFeatureMap", "normalized_exp", "standardize", "taylor"]


class HedgehogFeatureMap(nn.Module):
    """phi(x) = softmax([W x, -W x]) with a W in R^{D x D} per head, first the identity; F = 2 D.

    x [B, T, H, D]. Source: Zhang et al., Hedgehog (2024).
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bthd,hed->bthe", x, self.weight.to(x.dtype))
        return torch.softmax(wide(torch.cat([y, -y], -1)), -1)


def taylor(x: Tensor, scale: float, order: int = 2) -> Tensor:
    """phi(q) . phi(k) = 1 + s + s^2 / 2 for s = scale q . k; order 1 leaves the square out.

    Each pair of channels is there once: F = 1 + D + D (D + 1) / 2.
    """
    y = wide(x) * scale**0.5
    parts = [torch.ones_like(y[..., :1]), y]
    if order > 1:
        i, j = torch.triu_indices(y.shape[-1], y.shape[-1], 1, device=y.device).unbind()
        parts += [y[..., i] * y[..., j], y.square() * 0.5**0.5]
    return torch.cat(parts, -1)


def normalized_exp(x: Tensor) -> Tensor:
    """D softmax(x) / sqrt(e - 1): positive, bounded, variance about 1 for standard normal x."""
    return torch.softmax(wide(x), -1) * (x.shape[-1] / math.sqrt(math.e - 1))


def standardize(x: Tensor) -> Tensor:
    """(x - mean) / std over the channels of every head."""
    x = wide(x)
    return nn.functional.layer_norm(x, x.shape[-1:])
