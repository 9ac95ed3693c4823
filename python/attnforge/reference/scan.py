"""The diagonal scan token by token: the definition of ``diag_scan_*``.

    h_t = e^{g_t} h_{t-1} + x_t               channel by channel, [B, T, D]

Accumulation is float64 for float64 inputs and float32 otherwise. The backward writes the formulas
out, since an operator may run where autograd records nothing, and is checked against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["backward", "forward", "recurrence"]


Span = tuple[slice, slice, Tensor]  # rows, states, initial states [N, D]


def _spans(x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Iterator[Span]:
    """Sequences that are walked together."""
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    n = x.shape[0] if cu_seqlens is None else len(ends) - 1
    h0 = x.new_zeros((n, x.shape[2])) if initial_state is None else initial_state
    for i, (lo, hi) in enumerate(itertools.pairwise(ends)):
        own = slice(None) if cu_seqlens is None else slice(i, i + 1)
        yield slice(lo, hi), own, h0[own].to(acc)


def recurrence(
    x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable: h and final states. Rows that no sequence has are 0."""
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    outs, states, covered = [x[:, :0].to(acc)], [], 0
    for rows, _, h in _spans(x, initial_state, cu_seqlens):
        for t in range(rows.start, rows.stop):
            h = torch.exp(g[:, t].to(acc)) * h + x[:, t].to(acc)
            outs.append(h.unsqueeze(1))
        states.append(h)
        covered = rows.stop
    outs.append(x.new_zeros(x[:, covered:].shape, dtype=acc))
    if not states:
        states.append(x.new_zeros((0, x.shape[2]), dtype=acc))
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
    """Fill the gradients of ``diag_scan_bwd``, token by token from the end."""
    dx, dg, dinitial = grads
    dx.zero_()
    dg.zero_()
    for rows, own, h in _spans(x, initial_state, cu_seqlens):
        carried = torch.zeros_like(h) if dfinal_state is None else dfinal_state[own].to(h.dtype)
        before = []
        for t in range(rows.start, rows.stop):
            before.append(h)
            h = torch.exp(g[:, t].to(h.dtype)) * h + x[:, t].to(h.dtype)
        for t in range(rows.stop - 1, rows.start - 1, -1):
            own_dx = dout[:, t].to(h.dtype) + carried
            carried = torch.exp(g[:, t].to(h.dtype)) * own_dx
            dx[:, t] = own_dx.to(x.dtype)
            dg[:, t] = before[t - rows.start] * carried
        if initial_state is not None:
            dinitial[own] = carried
