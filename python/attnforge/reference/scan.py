"""The diagonal scan token by token: the definition of ``diag_scan_*``.

    h_t = e^{g_t} h_{t-1} + x_t               channel by channel, [B, T, D]

Accumulation is float64 for float64 inputs and float32 otherwise; the backward is autograd through
the recurrence.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["backward", "forward", "recurrence"]


def recurrence(
    x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable: h and final states. Rows that no sequence has are 0."""
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    x, g = x.to(acc), g.to(acc)
    batch, time, dim = x.shape
    spans = [(0, time)] if cu_seqlens is None else list(itertools.pairwise(cu_seqlens.tolist()))
    n = batch if cu_seqlens is None else len(spans)
    h0 = x.new_zeros((n, dim)) if initial_state is None else initial_state.to(acc)
    outs, states = [x.new_zeros((batch, 0, dim))], [h0[:0]]
    for i, (lo, hi) in enumerate(spans):
        h = h0 if cu_seqlens is None else h0[i : i + 1]
        for t in range(lo, hi):
            h = torch.exp(g[:, t]) * h + x[:, t]
            outs.append(h.unsqueeze(1))
        states.append(h)
    covered = spans[-1][1] if spans else 0
    outs.append(x.new_zeros((batch, time - covered, dim)))
    return torch.cat(outs, 1), torch.cat(states)


def forward(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    final_state: Tensor,
) -> None:
    """Fill the outputs of ``diag_scan_fwd``."""
    found, state = recurrence(x, g, initial_state, cu_seqlens)
    out.copy_(found)
    if final_state.dim() > 1:
        final_state.copy_(state)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill the gradients of ``diag_scan_bwd``: autograd through ``recurrence``."""
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    given = (x, g, initial_state)
    leaves = [None if y is None else y.detach().to(acc).requires_grad_() for y in given]
    with torch.enable_grad():
        x, g, state = leaves  # type: ignore[assignment]
        out, final = recurrence(x, g, state, cu_seqlens)
        outs, douts = [out], [dout.to(acc)]
        if dfinal_state is not None:
            outs, douts = [out, final], [*douts, dfinal_state.to(acc)]
        some = [(y, d) for y, d in zip(outs, douts, strict=True) if y.requires_grad]
        inputs = [y for y in leaves if y is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in some], inputs, [d for _, d in some], allow_unused=True
            )
            if some
            else [None] * len(inputs)
        )
    for leaf, target in zip(leaves, grads, strict=True):
        if leaf is not None:
            value = next(found)
            target.copy_(torch.zeros_like(leaf) if value is None else value)
