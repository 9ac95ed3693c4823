"""Decays and mappings of models onto the additive recurrence: plain PyTorch, differentiable."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnforge.ops._checks import fail

__all__ = ["additive_gates", "lightning_decay", "retention_decay"]


def retention_decay(heads: int, device: torch.device | str | None = None) -> Tensor:
    """log(1 - 2^(-5 - h)) for h = 0 .. heads - 1, fp32 (RetNet, Sun et al., 2023, section 2.3)."""
    h = torch.arange(heads, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(-5.0 - h)).float()


def lightning_decay(
    heads: int, layer_idx: int = 0, num_layers: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """-2^(-8 h / heads) (1 - layer_idx / num_layers), h = 1 .. heads, fp32 (Qin et al., 2024)."""
    if not 0 <= layer_idx < num_layers:
        fail(
            "lightning_attention",
            f"layer_idx is {layer_idx} of {num_layers} layers; want 0 <= layer_idx < num_layers",
        )
    h = torch.arange(1, heads + 1, dtype=torch.float64, device=device)
    return (-torch.exp2(-8.0 * h / heads) * (1 - layer_idx / num_layers)).float()


# Below every logit, and still a number: differences of it never make a NaN.
_NOTHING_YET, _NO_LOGIT = -1e30, -3e38


def additive_gates(
    k: Tensor, z0: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax-over-the-past weights of logits k [B, T, H, K] as keys and gates of ``gla``.

        z_t = logaddexp(z_{t-1}, k_t)      keys e^{k_t - z_t}      gates z_{t-1} - z_t <= 0

    z0 [N, H, K]: z before the first token, by default nothing. Returns keys, gates and z of every
    token in fp32 (fp64 beside fp64) and the last z [N, H, K]. A logit of -inf writes nothing, also
    before the first finite one, whose gate resets a state that is still empty.
    """
    wide = (k if k.dtype is torch.float64 else k.float()).clamp_min(_NO_LOGIT)
    if cu_seqlens is None:
        return _additive(wide, z0)
    bounds = cu_seqlens.tolist()
    parts = [
        _additive(wide[:, lo:hi], None if z0 is None else z0[n : n + 1])
        for n, (lo, hi) in enumerate(itertools.pairwise(bounds))
    ]
    tail = torch.zeros_like(wide[:, bounds[-1] :])
    keys = torch.cat([*(p[0] for p in parts), tail], 1)
    gates = torch.cat([*(p[1] for p in parts), tail], 1)
    z = torch.cat([*(p[2] for p in parts), tail], 1)
    last = torch.cat([p[3] for p in parts]) if parts else wide.new_empty((0, *wide.shape[2:]))
    return keys, gates, z, last


def _additive(k: Tensor, z0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = k.new_full((k.shape[0], *k.shape[2:]), _NOTHING_YET)
    if z0 is not None:
        first = z0.to(k.dtype).clamp_min(_NOTHING_YET)
    z = torch.logcumsumexp(torch.cat([first.unsqueeze(1), k], 1), 1)
    above = k - z[:, :-1]  # sigmoids of it keep what z_{t-1} - z_t would cancel
    gates = torch.nn.functional.logsigmoid(-above)
    return torch.sigmoid(above), gates, z[:, 1:], z[:, -1]
