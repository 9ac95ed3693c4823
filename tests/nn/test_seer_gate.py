"""nn.SeerAttentionGate: shapes, cached keys, and that distillation beats pooled means."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge import nn as anf


@pytest.mark.parametrize(("form", "gate_dim"), [("prefill", 16), ("prefill", 8), ("decode", 8)])
@pytest.mark.parametrize("norm", [False, True])
def test_scores_of_a_part_are_those_of_the_whole(form: str, gate_dim: int, norm: bool) -> None:
    gate = anf.SeerAttentionGate(
        16, 4, 2, gate_dim=gate_dim, block_size=8, form=form, norm=norm
    )  # fmt: skip
    q, k = torch.randn(2, 40, 4, 16), torch.randn(2, 43, 2, 16)
    whole = gate.scores(q, gate.keys(k))
    rows = 40 if form == "decode" else 5
    assert whole.shape == (2, 2 if form == "decode" else 4, rows, 6)
    keys = torch.cat([gate.keys(k[:, :24]), gate.keys(k[:, 24:], first_block=3)], 1)
    part = gate.scores(q[:, 16:], keys, start=16)
    torch.testing.assert_close(part, whole[:, :, 16 if form == "decode" else 2 :])


@pytest.mark.parametrize("form", ["prefill", "decode"])
def test_distillation(form: str) -> None:
    """A few steps of the loss: the gate finds more of the attention's mass than before."""
    torch.manual_seed(0)
    size, top_k = 16, 3
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(6, 2, 32, generator=g) * 2

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of topics: queries look for keys of their own topic, noise everywhere."""
        topic = torch.randint(0, 6, (2, 16), generator=g).repeat_interleave(size, 1)
        k = centres[topic] + torch.randn(2, 256, 2, 32, generator=g) * 2
        q = centres[topic].repeat_interleave(2, 2) + torch.randn(2, 256, 4, 32, generator=g)
        return q, k

    def mass(q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor, want: torch.Tensor) -> float:
        lists = attnforge.seer_select(
            scores, block_size=size, q_block=1 if form == "decode" else size, top_k=top_k,
            dense_rows=0, init_blocks=0, local_blocks=0, seqlen_q=256, seqlen_k=256,
        )  # fmt: skip
        return float((want * lists.to_mask(16)).sum(-1).mean())

    gate = anf.SeerAttentionGate(32, 4, 2, block_size=size, form=form, rope_base=None)
    optimizer = torch.optim.Adam(gate.parameters(), lr=3e-3)
    found = []
    for step in range(61):
        q, k = batch()
        _, lse = attnforge.flash_attention(q, k, k, causal=True, return_lse=True)
        want = attnforge.seer_targets(q, k, lse, block_size=size, per_token=form == "decode")
        scores = gate(q, k)
        if step in (0, 60):
            found.append(mass(q, k, scores, want))
        loss = attnforge.seer_loss(scores, want, reduction="rows", skip=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = float(want.topk(top_k, -1).values.sum(-1).mean())
    assert found[1] > found[0] + 0.05
    assert found[1] > 0.75 * best
