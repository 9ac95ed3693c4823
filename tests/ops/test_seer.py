"""SeerAttention's and MSA's choices, targets and loss against plain definitions."""

from __future__ import annotations

import pytest
import torch

import attnforge
from attnforge.testing.cases import Target


def test_threshold_is_strict_and_causal() -> None:
    scores = torch.zeros(1, 1, 4, 4)
    # Equal scores: row r has r + 1 visible blocks of probability 1 / (r + 1).
    got = attnforge.seer_select(scores, block_size=8, threshold=0.3, dense_rows=0).to_mask(4)[0, 0]
    assert got.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [False] * 4,
    ]
    whole = attnforge.seer_select(scores, block_size=8, threshold=1.0).to_mask(4)[0, 0]
    assert not whole[:2].any()
    assert whole[2:].tolist() == [[True, True, True, False], [True] * 4]
    every = attnforge.seer_select(scores, block_size=8, threshold=0.0, dense_rows=0).to_mask(4)
    assert torch.equal(every[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())


def test_ratio_and_top_k() -> None:
    scores = torch.arange(100.0).view(1, 1, 10, 10)
    by_ratio = attnforge.seer_select(scores, block_size=8, nz_ratio=0.19).to_mask(10)[0, 0]
    assert by_ratio.sum(-1).tolist() == [1] * 8 + [9, 10]
    got = attnforge.seer_select(scores, block_size=8, top_k=2, dense_rows=0).to_mask(10)[0, 0]
    assert got.int().argmax(-1).tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert got.sum(-1).tolist() == [1] + [2] * 9


def test_decode_form_keeps_ends() -> None:
    scores = torch.tensor([0.0, 5.0, 4.0, 3.0, 0.0, 0.0]).expand(2, 1, 1, 6)
    lengths = torch.tensor([41, 24], dtype=torch.int32)
    got = attnforge.seer_select(
        scores, block_size=8, q_block=1, top_k=2, seqlen_q=1, seqlen_k=lengths
    ).to_mask(6)
    assert got[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert got[1, 0, 0].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("length", [256, 250])
def test_attention_of_all_blocks_is_flash(target: Target, length: int) -> None:
    q, k, v = (torch.randn(2, length, h, 16) for h in (4, 2, 2))
    scores = torch.randn(2, 4, -(-length // 64), -(-length // 64))
    want = attnforge.flash_attention(q, k, v, causal=True, backend=target.backend)
    got = attnforge.seer_attention(q, k, v, scores, threshold=0.0, backend=target.backend)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_decode_is_the_last_row(target: Target) -> None:
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((3, 4), (100, 2), (100, 2)))
    scores = torch.randn(2, 2, 3, 7)
    options = {"block_size": 16, "top_k": 2, "backend": target.backend}
    got = attnforge.seer_attention(q, k, v, scores, **options)
    lists = attnforge.seer_select(
        scores, block_size=16, q_block=1, top_k=2, seqlen_q=3, seqlen_k=100
    )
    want = attnforge.block_sparse_attention(q.double(), k.double(), v.double(), lists)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("per_token", [False, True])
def test_targets_and_loss(target: Target, per_token: bool) -> None:
    q, k = torch.randn(1, 70, 4, 16), torch.randn(1, 70, 2, 16)
    wide = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2)) / 4
    wide = wide.masked_fill(~torch.ones(70, 70, dtype=torch.bool).tril(), -torch.inf)
    prob = torch.nn.functional.pad(wide.softmax(-1), (0, 10, 0, 10)).unflatten(-1, (5, 16)).amax(-1)
    if per_token:
        want = prob[:, :, :70].unflatten(1, (2, 2)).amax(2)
    else:
        want = prob.unflatten(2, (5, 16)).amax(3)
    want = want / want.sum(-1, keepdim=True)
    got = attnforge.seer_targets(
        q, k, wide.logsumexp(-1).float(), block_size=16, per_token=per_token,
        backend=target.backend,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    scores = torch.randn(got.shape, dtype=torch.float64, requires_grad=True)
    loss = attnforge.seer_loss(scores, want, skip=0.2, reduction="rows")
    first = int(want.shape[2] * 0.2)
    seen = want[:, :, first:] > 0
    gate = scores[:, :, first:].masked_fill(~seen, -torch.inf).softmax(-1)
    kl = torch.where(seen, want[:, :, first:] * (want[:, :, first:] / gate).log(), 0.0)
    torch.testing.assert_close(loss.double(), kl.sum(-1).mean(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert scores.grad is not None
    # Softmax and KL: gate - target, and nothing for rows that are skipped or blocks not seen.
    count = want[:, :, first:, 0].numel()
    expect = torch.where(seen, gate - want[:, :, first:], 0.0).detach() / count
    torch.testing.assert_close(scores.grad[:, :, first:], expect, rtol=1e-4, atol=1e-7)
    assert not scores.grad[:, :, :first].any()


@pytest.mark.parametrize(("rows", "keys"), [(90, 90), (5, 90), (1, 1)])
def test_msa(target: Target, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnforge.ops import msa

    monkeypatch.setattr(msa, "_CHUNK_SCORES", 200)  # several chunks of queries
    q, k = torch.randn(2, rows, 2, 16), torch.randn(2, keys, 1, 16)
    lists = attnforge.msa_select(q, k, block_size=8, top_n=4, backend=target.backend)
    blocks = -(-keys // 8)
    got = lists.to_mask(blocks)
    s = torch.einsum("bihd,bjd->bhij", q.double(), k[:, :, 0].double())
    at = torch.arange(rows) + keys - rows
    s = s.masked_fill(torch.arange(keys) > at[:, None], -torch.inf)
    pad = torch.nn.functional.pad(s, (0, blocks * 8 - keys), value=-torch.inf)
    top = pad.unflatten(-1, (blocks, 8)).amax(-1)
    own = torch.arange(blocks) == (at // 8)[:, None]
    want = torch.zeros_like(got)
    for _ in range(min(4, blocks)):  # by repeated maxima, apart from the library's top-k
        best = top.masked_fill(own, torch.inf).masked_fill(want, -torch.inf)
        value, place = best.max(-1, keepdim=True)
        want.scatter_(-1, place, (value > -torch.inf) | want.gather(-1, place))
    assert torch.equal(got, want)


def test_errors() -> None:
    scores = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="exactly one of threshold, top_k and nz_ratio"):
        attnforge.seer_select(scores)
    with pytest.raises(ValueError, match="top_k is 0"):
        attnforge.seer_select(scores, top_k=0)
    with pytest.raises(ValueError, match=r"want .batch, heads, rows, blocks"):
        attnforge.seer_select(scores[0], top_k=1)
    q = torch.zeros(1, 100, 1, 8)
    with pytest.raises(ValueError, match="a row per query block or per query"):
        attnforge.seer_attention(q, q, q, torch.zeros(1, 1, 3, 2), top_k=1)
    with pytest.raises(ValueError, match="targets has shape"):
        attnforge.seer_loss(scores, scores[..., :1])
    with pytest.raises(ValueError, match="top_n is 1; want at least local_blocks"):
        attnforge.msa_select(q, q, top_n=1, local_blocks=2)
