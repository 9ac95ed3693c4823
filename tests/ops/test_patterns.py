"""Static patterns against their definitions token by token, where edges are those of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge.ops import patterns

S, B = 64, 8


def tokens(lists: BlockSelection, keys: int = S, causal: bool = True) -> Tensor:
    """bool [H, S, keys]: the pairs that a call with these lists sees."""
    mask = lists.to_mask(-(-keys // lists.kv_block))[0]
    mask = mask.repeat_interleave(lists.q_block, 1).repeat_interleave(lists.kv_block, 2)
    mask = mask[:, :S, :keys]
    return mask & torch.ones(S, keys, dtype=torch.bool).tril() if causal else mask


I = torch.arange(S)[:, None]  # noqa: E741
J = torch.arange(S)


def blocks(mask: Tensor) -> Tensor:
    """Any pair of a block makes the whole block, then the causal rule cuts."""
    any_pair = mask.unflatten(-1, (-1, B)).unflatten(-3, (-1, B)).any(-1).any(-2)
    return any_pair.repeat_interleave(B, -2).repeat_interleave(B, -1)


SMALL: dict[str, Any] = {"q_block": B, "kv_block": B}
CAUSAL = J <= I
RULES: dict[str, tuple[BlockSelection, Tensor, bool]] = {
    "streaming": (patterns.streaming(S, sinks=4, window=10, **SMALL),
                  ((J < 4) | (I - J < 10)) & CAUSAL, True),
    "longformer": (patterns.longformer(S, window=12, global_tokens=(0, 33), **SMALL),
                   ((I - J).abs() <= 6) | (I == 0) | (J == 0) | (I == 33) | (J == 33), False),
    "strided": (patterns.strided(S, stride=3, block=B),
                ((J // B % 3 == 0) | (J // B == I // B)) & CAUSAL, True),
    "dilated": (patterns.strided(S, stride=2, block=B, dilated=True, window=9),
                (((I // B - J // B) % 2 == 0) | (I - J < 9)) & CAUSAL, True),
    "documents": (patterns.documents([16, 24, 8, 16], block=B),
                  ((torch.bucketize(I, torch.tensor([15, 39, 47]))
                    == torch.bucketize(J, torch.tensor([15, 39, 47]))) | (I >= 48)) & CAUSAL, True),
    "anchors": (patterns.anchors(S, piece=16, block=B, query_tokens=8),
                ((I // 16 == J // 16) | (J < 16) | (I >= 56)) & CAUSAL, True),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    lists, rule, causal = RULES[name]
    want = blocks(rule) & CAUSAL if causal else blocks(rule)
    assert torch.equal(tokens(lists, causal=causal)[0], want)


def test_heads() -> None:
    full = torch.tensor([True, False])
    got = tokens(patterns.duo(S, full, sinks=4, window=10, **SMALL))
    assert torch.equal(got[0], CAUSAL)
    assert torch.equal(got[1], tokens(patterns.streaming(S, sinks=4, window=10, **SMALL))[0])
    got = tokens(patterns.shifted_groups(S, group=16, heads=3, block=B), causal=False)
    assert torch.equal(got[0], I // 16 == J // 16)
    assert torch.equal(got[1], got[0])
    assert torch.equal(got[2], (I + 8) // 16 == (J + 8) // 16)


def test_bigbird() -> None:
    lists = patterns.bigbird(512, block=B, heads=2, random_blocks=2)
    mask = lists.to_mask(64)[0]
    ids = torch.arange(64)
    fixed = ((ids[:, None] - ids).abs() <= 1) | (ids == 0) | (ids == 63)
    assert mask[:, [0, 63]].all()
    assert (mask & fixed).sum() == 2 * int(fixed[1:63].sum()) + 2 * int(fixed[[0, 63]].sum())
    assert (mask[:, 1:63] & ~fixed[1:63]).sum(-1).eq(2).all()
    again = patterns.bigbird(512, block=B, heads=2, random_blocks=2).indices
    assert torch.equal(again, lists.indices)
    assert not torch.equal(mask[0], mask[1])
    assert patterns.bigbird(24, block=B).to_mask(3).all()


def test_summaries_stand_behind_the_tokens() -> None:
    lists = patterns.transient_global(S, radius=5, summaries=4, block=B)
    got = tokens(lists, S + 4, causal=False)[0]
    assert torch.equal(got[:, :S], blocks((I - J).abs() <= 5))
    assert got[:, S:].all()


def test_windows_become_exact_by_the_token() -> None:
    """Sinks of a block and a window by two calls that share no key, against the token mask."""
    q, k, v = (torch.randn(1, S, 2, 16) for _ in range(3))
    lists = patterns.streaming(S, sinks=0, window=10, **SMALL)
    got = attnforge.block_sparse_attention(q, k, v, lists, window_size=(9, 0))
    want = attnforge.flash_attention(q, k, v, causal=True, window_size=(9, 0))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_queries_at_the_end() -> None:
    whole = patterns.streaming(S, sinks=4, window=10, **SMALL).to_mask(8)
    part = patterns.streaming(16, seqlen_k=S, sinks=4, window=10, **SMALL).to_mask(8)
    assert torch.equal(part, whole[:, :, 6:])


def test_errors() -> None:
    for call, text in (
        (lambda: patterns.streaming(S, window=0), "window is 0"),
        (lambda: patterns.documents([5, 8], block=8), r"lengths\[0\] is 5"),
        (lambda: patterns.anchors(S, piece=12, block=8), "piece is 12"),
        (lambda: patterns.shifted_groups(S, group=24, heads=2, block=8), "multiple of 2"),
        (lambda: patterns.longformer(S, global_tokens=(S,)), "global_tokens has 64"),
        (lambda: patterns.transient_global(60, summaries=4, block=8), "seqlen is 60"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
