"""BlockSelection: constructors, converters, ties and errors; MoBA's choice of blocks."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import attnforge
from attnforge import BlockSelection
from attnforge.ops import moba
from attnforge.testing.cases import FlashCase


def test_mask_round_trip() -> None:
    mask = torch.rand(2, 3, 7, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    lists = BlockSelection.from_mask(mask, q_block=4, kv_block=8)
    assert torch.equal(lists.to_mask(11), mask)
    ids = lists.indices[0, 0, 0]
    assert torch.equal(ids[: int(mask[0, 0, 0].sum())], mask[0, 0, 0].nonzero().flatten().int())


def test_top_k_takes_the_best_and_ties_go_right() -> None:
    scores = torch.tensor(
        [[[[1.0, 3.0, 3.0, 3.0, -2.0], [float("nan"), -torch.inf, -1.0, -5.0, 0.0]]]]
    )
    lists = BlockSelection.from_scores(scores, q_block=1, kv_block=8, top_k=2)
    assert lists.indices.tolist() == [[[[2, 3], [2, 4]]]]
    every = BlockSelection.from_scores(scores, q_block=1, kv_block=8, top_k=9)
    assert every.indices.tolist() == [[[[0, 1, 2, 3, 4], [2, 3, 4, -1, -1]]]]


def test_top_k_agrees_with_a_sort() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(-4, 4, (1, 2, 50, 17), generator=g).float()
    got = BlockSelection.from_scores(scores, q_block=1, kv_block=8, top_k=5).to_mask(17)
    # A stable sort of the reversed row puts the larger of equal ids first.
    order = 16 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :5]
    want = torch.zeros_like(got).scatter_(-1, order, True)
    assert torch.equal(got, want)


def test_threshold() -> None:
    scores = torch.tensor([[[[0.5, 0.1, float("nan"), 0.5]]]])
    lists = BlockSelection.from_scores(scores, q_block=64, kv_block=64, threshold=0.5)
    assert lists.to_mask(4).tolist() == [[[[True, False, False, True]]]]


def test_bsr() -> None:
    dense = torch.zeros(6, 8)
    dense[0, 0] = dense[1, 5] = dense[5, 7] = 1.0
    bsr = dense.to_sparse_bsr((2, 4))
    lists = BlockSelection.from_bsr(bsr.crow_indices(), bsr.col_indices(), q_block=2, kv_block=4)
    want = [[True, True], [False, False], [False, True]]
    assert lists.to_mask(2).tolist() == [[want]]


def test_flex_block_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    made = create_block_mask(causal, 1, 2, 256, 256, device="cpu", BLOCK_SIZE=64)
    lists = BlockSelection.from_flex(made)
    inputs = FlashCase(batch=1, seqlen_q=256, seqlen_k=256).make()
    got = attnforge.block_sparse_attention(inputs.q, inputs.k, inputs.v, lists, causal=True)
    want = attnforge.flash_attention(inputs.q, inputs.k, inputs.v, causal=True)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_density() -> None:
    blocks = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    lists = BlockSelection.from_mask(blocks, q_block=16, kv_block=16)
    assert lists.density(64, 64) == 1.0
    assert lists.density(64, 64, causal=False) == 10 / 16


@hypothesis.given(data=st.data())
def test_density_counts_pairs(data: st.DataObject) -> None:
    """Against a mask of single pairs: ragged ends, more queries than keys, invalid ids."""
    q_block, kv_block = (data.draw(st.integers(1, 9)) for _ in range(2))
    rows, keys = (data.draw(st.integers(1, 40)) for _ in range(2))
    causal = data.draw(st.booleans())
    shape = (2, 3, -(-rows // q_block), 3)
    ids = torch.randint(-1, -(-keys // kv_block) + 2, shape, dtype=torch.int32)
    lists = BlockSelection(ids, q_block, kv_block)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen = seen.tril(keys - rows) if causal else seen
    listed = lists.to_mask(-(-keys // kv_block))
    listed = listed.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)
    listed = listed[:, :, :rows, :keys]
    pairs = float(seen.sum())
    want = float((listed & seen).double().sum((2, 3)).mean()) / pairs if pairs else 0.0
    assert lists.density(rows, keys, causal) == pytest.approx(want, abs=1e-12)


def drawn(figure: Any, path: Path) -> Any:
    """bool [rows, blocks] read back from the pixels of a PNG: black in the middle of a cell."""
    from matplotlib.image import imread

    figure.savefig(path)
    pixels = imread(path)[..., 0]
    axes = figure.axes[0]
    rows, blocks = axes.images[0].get_array().shape
    at = [[axes.transData.transform((x, y)) for x in range(blocks)] for y in range(rows)]
    return [[bool(pixels[len(pixels) - 1 - int(y), int(x)] < 0.5) for x, y in row] for row in at]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mask = torch.rand(2, 3, 5, 7) < 0.5
    mask[1, 2, 0, 6] = True
    lists = BlockSelection.from_mask(mask, q_block=16, kv_block=16)
    figure = lists.plot(head=2, batch=1)
    assert drawn(figure, tmp_path / "lists.png") == mask[1, 2].tolist()
    assert "key block (16 keys)" in figure.axes[0].get_xlabel()
    packed = BlockSelection(lists.indices[1], 16, 16, lists.counts[1])  # type: ignore[index]
    assert drawn(packed.plot(head=2), tmp_path / "packed.png") == mask[1, 2].tolist()


def test_plot_of_everything_nothing_and_what_names_no_block(tmp_path: Path) -> None:
    """Full lists are black, empty ones white; what names no block is not drawn."""
    pytest.importorskip("matplotlib")
    ids = torch.tensor([[[[0, 1], [1, 9], [-1, -1]]]], dtype=torch.int32)
    counts = torch.tensor([[[2, 1, 2]]], dtype=torch.int32)
    lists = BlockSelection(ids, 8, 8, counts)
    want = [[True, True], [False, True], [False, False]]
    assert drawn(lists.plot(), tmp_path / "a.png") == want
    full = BlockSelection(ids[:, :, :1], 8, 8)
    assert drawn(full.plot(), tmp_path / "b.png") == [[True, True]]
    assert drawn(BlockSelection(ids[:, :, 2:], 8, 8).plot(), tmp_path / "c.png") == [[False]]


def test_plot_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lists = BlockSelection(IDS, 1, 64)
    with pytest.raises(ImportError, match=r"pip install 'attnforge\[bench\]'"):
        lists.plot()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"head is 1; want 0 \.\. 0"):
        lists.plot(head=1)
    with pytest.raises(ValueError, match="batch is -1"):
        lists.plot(batch=-1)


IDS = torch.zeros(1, 1, 4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: BlockSelection(IDS.long(), 1, 64), TypeError, "int64; want int32"),
        (lambda: BlockSelection(IDS[0, 0], 1, 64), ValueError, "want \\[batch, heads"),
        (lambda: BlockSelection(IDS, 129, 64), ValueError, "q_block is 129; want an int in 1 .."),
        (lambda: BlockSelection(IDS, 1, 0), ValueError, "kv_block is 0; want an int in 1 .. 4096"),
        (lambda: BlockSelection(IDS, 1, 64, IDS), ValueError, "counts is int32"),
        (lambda: BlockSelection.from_mask(IDS, q_block=1, kv_block=1), TypeError, "want a bool"),
        (lambda: BlockSelection.from_scores(IDS.float(), q_block=1, kv_block=1), ValueError,
         "exactly one of top_k and threshold"),
        (lambda: BlockSelection.from_scores(IDS.float(), q_block=1, kv_block=1, top_k=0),
         ValueError, "top_k is 0"),
        (lambda: BlockSelection.from_flex(IDS), TypeError, "want a flex_attention BlockMask"),
    ],
)  # fmt: skip
def test_errors_of_lists(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        (None, "selection is NoneType; want an attnforge.BlockSelection"),
        (BlockSelection(IDS, 8, 16), "selection has 4 rows; want 5: 33 queries in blocks of 8"),
        (BlockSelection(IDS.expand(1, 3, 4, 2), 9, 16), "lists for 3 heads; want 1, 2 (KV heads)"),
        (BlockSelection(IDS.expand(3, 1, 4, 2), 9, 16), "batch 3; want 1 or 2"),
        (BlockSelection(IDS[0], 9, 16), "want [batch, heads, rows, slots] for these inputs"),
    ],
)
def test_errors_of_the_call(selection: Any, text: str) -> None:
    inputs = FlashCase().make()
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        attnforge.block_sparse_attention(inputs.q, inputs.k, inputs.v, selection)


# --- MoBA ---------------------------------------------------------------------------------------


def test_moba_by_hand() -> None:
    """Blocks of 4 keys, top 2, 9 tokens: the own block and the best before it."""
    k = torch.zeros(1, 9, 1, 8)
    k[0, :4, 0, 0] = 2.0  # block 0 has the larger mean
    k[0, 4:8, 0, 0] = 1.0
    k[0, 8, 0, 0] = 9.0
    q = torch.ones(1, 9, 1, 8)
    ids = attnforge.moba_select(q, k, block_size=4, top_k=2).indices[0, 0].tolist()
    assert ids[:4] == [[0, -1]] * 4
    assert ids[4:8] == [[0, 1]] * 4
    assert ids[8] == [0, 2]
    own = attnforge.moba_select(q, k, block_size=4, top_k=1).indices[0, 0].flatten().tolist()
    assert own == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_moba_ties_go_to_the_later_block() -> None:
    q, k = torch.zeros(1, 16, 2, 8), torch.ones(1, 16, 1, 8)
    ids = attnforge.moba_select(q, k, block_size=4, top_k=2).indices[0, 1, -1]
    assert ids.tolist() == [2, 3]


def test_moba_with_every_block_is_dense_attention() -> None:
    inputs = FlashCase(seqlen_q=50, seqlen_k=70, heads_q=4, heads_k=2).make()
    got = attnforge.moba_attention(inputs.q, inputs.k, inputs.v, block_size=16, top_k=100)
    want = attnforge.flash_attention(inputs.q, inputs.k, inputs.v, causal=True)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_moba_packed_sequences_do_not_see_each_other() -> None:
    inputs = FlashCase(lengths=((40, 40), (0, 0), (17, 17)), heads_q=4, heads_k=2).make()
    cu = inputs.options["cu_seqlens_q"]
    whole = attnforge.moba_attention(inputs.q, inputs.k, inputs.v, block_size=8, top_k=2,
                                     cu_seqlens=cu)  # fmt: skip
    for a, b in ((0, 40), (40, 57)):
        part = (x[None, a:b] for x in (inputs.q, inputs.k, inputs.v))
        one = attnforge.moba_attention(*part, block_size=8, top_k=2)
        torch.testing.assert_close(whole[a:b], one[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_moba_lists_of_packed_sequences(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moba, "_CHUNK_SCORES", 200)  # several chunks of queries
    monkeypatch.setattr(moba, "_SLICE", 3)
    q, k = torch.randn(58, 4, 16), torch.randn(58, 2, 16)
    ends = [0, 40, 40, 41, 58]
    cu = torch.tensor(ends, dtype=torch.int32)
    sizes = {"block_size": 8, "top_k": 3, "causal": causal}
    got = attnforge.moba_select(q, k, cu_seqlens=cu, **sizes).to_mask(8)
    for a, b in itertools.pairwise(ends):
        want = attnforge.moba_select(q[None, a:b], k[None, a:b], **sizes).to_mask(8)
        assert torch.equal(got[:, a:b], want[0])


def test_selectors_read_nothing_on_the_host() -> None:
    """Fake tensors have no values: what would wait for a GPU raises."""
    with FakeTensorMode():
        q, cu = torch.randn(58, 4, 16), torch.zeros(3, dtype=torch.int32)
        lists = attnforge.moba_select(q, q, block_size=8, top_k=3, cu_seqlens=cu)
        assert lists.indices.shape == (4, 58, 3)
        scores, used = torch.randn(2, 4, 3, 20), torch.zeros(2, dtype=torch.int32)
        lists = attnforge.seer_select(
            scores, block_size=8, q_block=1, top_k=4, seqlen_q=3, seqlen_k=used
        )
        assert lists.indices.shape == (2, 4, 3, 6)
        by_mask = BlockSelection.from_mask(scores > 0, q_block=1, kv_block=8, slots=5)
        assert by_mask.indices.shape == (2, 4, 3, 5)


def test_slots_of_a_mask_keep_the_first() -> None:
    mask = torch.tensor([[[[0, 1, 1, 1], [0, 0, 0, 1]]]]).bool()
    lists = BlockSelection.from_mask(mask, q_block=1, kv_block=8, slots=2)
    assert lists.indices.tolist() == [[[[1, 2], [3, -1]]]]
    assert lists.counts is not None
    assert lists.counts.tolist() == [[[2, 1]]]
    with pytest.raises(ValueError, match="slots is 0; want an int >= 1"):
        BlockSelection.from_mask(mask, q_block=1, kv_block=8, slots=0)


def test_moba_decodes_like_it_prefills() -> None:
    inputs = FlashCase(seqlen_q=64, seqlen_k=64).make()
    q, k, v = inputs.q, inputs.k, inputs.v
    whole = attnforge.moba_attention(q, k, v, block_size=8, top_k=3)
    for n in (1, 5):
        last = attnforge.moba_attention(q[:, -n:], k, v, block_size=8, top_k=3)
        torch.testing.assert_close(last, whole[:, -n:], rtol=2e-5, atol=2e-6)


def test_moba_errors() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="top_k is 0; want an int >= 1"):
        attnforge.moba_select(q, q, block_size=4, top_k=0)
    with pytest.raises(ValueError, match="want \\[batch, seq, heads, head_dim\\]"):
        attnforge.moba_select(q[0], q[0], block_size=4, top_k=1)
