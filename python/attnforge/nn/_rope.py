"""Rotary positions of layers whose compressed keys stand at positions of their own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotated"]


def rotated(x: Tensor, positions: Tensor, base: float | None) -> Tensor:
    """x [.., S, H, D] turned by the angles of positions [S]; channel pairs (n, n + D / 2).

    base: None leaves x as it is. Angles are fp32 (fp64 of fp64). Source: Su et al., 2021.
    """
    if base is None:
        return x
    half = x.shape[-1] // 2
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    exponent = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angle = positions.to(torch.float64).unsqueeze(-1) * base**-exponent
    cos, sin = (t.to(wide).unsqueeze(-2) for t in (angle.cos(), angle.sin()))
    x_wide = x.to(wide)
    a, b = x_wide[..., :half], x_wide[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
