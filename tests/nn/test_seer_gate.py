"""nn.SeerAttentionGate: shapes, cached keys, and that distillation beats pooled means."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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


@pytest.mark.parametrize("form", ["prefill", "decode"])
def test_training_loop(form: str) -> None:
    """The loss of a sample falls, samples repeat in their order, only the gate learns."""
    torch.manual_seed(0)
    gate = anf.SeerAttentionGate(16, 4, 2, gate_dim=16, block_size=8, form=form)
    before = [p.clone() for p in gate.parameters()]
    samples = []
    for _ in range(2):
        q, k = torch.randn(1, 64, 4, 16, requires_grad=True), torch.randn(1, 64, 2, 16)
        samples.append(anf.seer_sample(gate, q, k, 2 * q, 2 * k))
        assert not samples[-1].q.requires_grad
    losses = anf.distil_seer_gate(gate, samples, steps=41, lr=3e-3, warmup=3)
    assert len(losses) == 41
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert not any(torch.equal(a, b) for a, b in zip(before, gate.parameters(), strict=True))


def test_rate_rises_and_falls() -> None:
    """A step moves a weight by about the rate: Adam's first, the peak after it, the last near 0."""
    gate = anf.SeerAttentionGate(16, 2, 2, block_size=8)
    q = torch.randn(1, 32, 2, 16)
    sample = anf.seer_sample(gate, q, q, q, q)
    seen: list[torch.Tensor] = []

    def samples() -> Iterator[anf.SeerSample]:
        for _ in range(12):
            seen.append(gate.k_weight.detach().clone())
            yield sample

    anf.distil_seer_gate(gate, samples(), steps=12, lr=1e-2, warmup=4)
    seen.append(gate.k_weight.detach())
    moved = [float((b - a).abs().max()) for a, b in itertools.pairwise(seen)]
    assert moved[0] == pytest.approx(1e-2 / 4, rel=0.01)
    assert moved[-1] < 0.1 * max(moved)


def test_errors_of_the_training_loop() -> None:
    gate = anf.SeerAttentionGate(16, 2, 2, block_size=8)
    with pytest.raises(ValueError, match="steps is 0 and warmup 20"):
        anf.distil_seer_gate(gate, [], steps=0)
    with pytest.raises(ValueError, match="samples has none"):
        anf.distil_seer_gate(gate, [], steps=1)
