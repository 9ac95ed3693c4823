"""How SeerAttention's gates learn: samples of one layer, and the loop over them.

The model stays as it is. Its attention gives, for each layer, queries and keys before rotation and
the largest probability of each block; a gate learns to predict the latter from the former.
Gao et al., 2024 (arXiv 2410.13276) and 2025 (arXiv 2506.08889).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from attnforge.nn.seer_gate import SeerAttentionGate
from attnforge.ops._checks import fail
from attnforge.ops.flash import flash_attention
from attnforge.ops.seer import seer_loss, seer_targets

__all__ = ["SeerSample", "distil_seer_gate", "seer_sample"]


class SeerSample(NamedTuple):
    """What a gate learns from: q [B, S, Hq, D] and k [B, S, Hk, D] before rotation, and targets of
    ``seer_targets`` [B, Hq, blocks, blocks], of a decode gate [B, Hk, S, blocks]."""

    q: Tensor
    k: Tensor
    targets: Tensor


def seer_sample(
    gate: SeerAttentionGate,
    q_raw: Tensor,
    k_raw: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float | None = None,
) -> SeerSample:
    """The sample of causal attention with q and k, whose values before rotation are q_raw, k_raw.

    Costs a dense forward and its scores again; nothing of size S x S is held.
    """
    with torch.no_grad():
        _, lse = flash_attention(q, k, k, causal=True, softmax_scale=softmax_scale, return_lse=True)
        targets = seer_targets(
            q, k, lse, block_size=gate.block_size, per_token=gate.decodes,
            softmax_scale=softmax_scale,
        )  # fmt: skip
    return SeerSample(q_raw.detach(), k_raw.detach(), targets)


def distil_seer_gate(
    gate: SeerAttentionGate,
    samples: Iterable[SeerSample],
    *,
    steps: int,
    lr: float = 1e-3,
    warmup: int = 20,
    skip: float | None = None,
) -> list[float]:
    """Trains a gate on the samples of its layer; the loss of each step, the KL per row.

    samples: one per step, from the beginning again where they end: a list, or whatever reads its
        samples anew each time it is gone through.
    lr, warmup: Adam's rate rises over so many steps and falls along a cosine to 0, as in the public
        recipe. skip: the share of first rows that are left out; default as there, 0.25 of a prefill
        gate and 0.5 of a decode gate.

    Gradients reach the gate alone. The order of samples is theirs, so a run is what its seed says.
    """
    op = "nn.distil_seer_gate"
    if steps < 1 or warmup < 0:
        fail(op, f"steps is {steps} and warmup {warmup}; want at least 1 and 0")
    skip = (0.5 if gate.decodes else 0.25) if skip is None else skip
    optimizer = torch.optim.Adam(gate.parameters(), lr=lr)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    while len(losses) < steps:
        before = len(losses)
        for sample in samples:
            loss = seer_loss(gate(sample.q, sample.k), sample.targets, skip=skip, reduction="rows")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
        if len(losses) == before:
            fail(op, "samples has none (left); want a list, or what can be gone through again")
    return losses
