"""block_sparse_decode is the last rows of block_sparse_attention, on caches and on pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge.testing.cases import Target


def prefill(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockSelection, used: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = (x.double() for x in (q, k, v))
    out, lse = attnforge.block_sparse_attention(
        *wide, lists, seqused_k=used, return_lse=True, backend="reference"
    )
    return out, lse


def random_lists(batch: int, heads: int, rows: int, blocks: int, kv_block: int) -> BlockSelection:
    ids = torch.randint(-2, blocks + 2, (batch, heads, rows, 5), dtype=torch.int32)
    ids[0, 0, 0] = -1  # an empty row
    return BlockSelection(ids, 1, kv_block)


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("keys", [128, 100])
@pytest.mark.parametrize("per", ["one", "kv", "query"])
def test_cache(target: Target, heads: tuple[int, int], rows: int, keys: int, per: str) -> None:
    q = torch.randn(2, rows, heads[0], 32)
    k, v = torch.randn(2, keys, heads[1], 32), torch.randn(2, keys, heads[1], 16)
    used = torch.tensor([keys, 41], dtype=torch.int32)
    lists = random_lists(2, {"one": 1, "kv": heads[1], "query": heads[0]}[per], rows, 8, 16)
    options: dict[str, Any] = {"return_lse": True, "backend": target.backend}
    got = attnforge.block_sparse_decode(q, k, v, lists, cache_seqlens=used, **options)
    check(got, prefill(q, k, v, lists, used))
    assert not got[0][0, 0, 0].any()
    got = attnforge.block_sparse_decode(q, k, v, lists, **options)
    check(got, prefill(q, k, v, lists, None))


@pytest.mark.parametrize("page_size", [16, 64, 24])
@pytest.mark.parametrize("kv_block", [16, 32, 64])
def test_pages(target: Target, page_size: int, kv_block: int) -> None:
    """Shuffled pages, one of them shared, page sizes above and below the block."""
    lengths = torch.tensor([150, 97], dtype=torch.int32)
    per = -(-150 // page_size)
    table = torch.randperm(2 * per + 3)[: 2 * per].view(2, per).int()
    table[1, 0] = table[0, 0]
    k_pages = torch.randn(2 * per + 3, page_size, 2, 32)
    v_pages = torch.randn(2 * per + 3, page_size, 2, 16)
    q = torch.randn(2, 2, 4, 32)
    lists = random_lists(2, 2, 2, -(-150 // kv_block), kv_block)
    got = attnforge.block_sparse_decode(
        q, k_pages, v_pages, lists, cache_seqlens=lengths, block_table=table, return_lse=True,
        backend=target.backend,
    )  # fmt: skip
    k, v = (x[table.long()].flatten(1, 2) for x in (k_pages, v_pages))
    check(got, prefill(q, k, v, lists, lengths))


def test_layouts(target: Target) -> None:
    """Heads-first caches are read in place, K and V of different layouts too."""
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 64, 2, 16), torch.randn(2, 64, 2, 16)
    lists = random_lists(2, 2, 1, 4, 16)
    want = prefill(q, k, v, lists, None)

    def planes(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for a, b in ((k, v), (planes(k), planes(v)), (k, planes(v)), (planes(k), v)):
        got = attnforge.block_sparse_decode(q, a, b, lists, return_lse=True, backend=target.backend)
        check(got, want)


def test_values_outside_the_lists_do_not_matter(target: Target) -> None:
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    lists = BlockSelection(torch.tensor([[[[0, 3]]]], dtype=torch.int32), 1, 16)
    used = torch.tensor([60], dtype=torch.int32)
    options: dict[str, Any] = {"cache_seqlens": used, "backend": target.backend}
    want = attnforge.block_sparse_decode(q, k, v, lists, **options)
    for x in (k, v):
        x[:, 16:48] = torch.nan
        x[:, 60:] = torch.nan
    assert torch.equal(attnforge.block_sparse_decode(q, k, v, lists, **options), want)


def test_errors_and_explain() -> None:
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 64, 2, 16)
    lists = random_lists(2, 2, 1, 4, 16)
    with pytest.raises(ValueError, match=r"selection.indices has shape \(2, 3, 1, 5\)"):
        attnforge.block_sparse_decode(q, k, k, random_lists(2, 3, 1, 4, 16))
    with pytest.raises(ValueError, match="k has shape"):
        attnforge.block_sparse_decode(q, k[:1], k[:1], lists)
    with pytest.raises(ValueError, match="q requires grad"):
        attnforge.block_sparse_decode(q.requires_grad_(), k, k, lists)
    text = str(attnforge.explain(attnforge.block_sparse_decode, q.detach(), k, k, lists))
    assert "cpu.paged" in text
