"""Block-sparse attention as torch sees it: opcheck, gradcheck, compile, vmap, second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge.testing.cases import FlashCase

OPS = torch.ops.attnforge


def lists(heads: int, rows: int, q_block: int = 1) -> BlockSelection:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 3, (1, heads, rows, 2), generator=g, dtype=torch.int32)
    return BlockSelection(ids, q_block, 4)


@pytest.mark.plain_memory
def test_opcheck(backend: str) -> None:
    inputs = FlashCase(batch=1, seqlen_q=5, seqlen_k=9, heads_q=4, heads_k=2).make()
    q, k, v, selection = inputs.q, inputs.k, inputs.v, lists(2, 5)
    problem = (selection.indices, None, None, None, None, None, None, 5, 9, 0.25, -1, 0, 0.0, 1, 4)
    torch.library.opcheck(OPS.block_sparse_fwd.default, (q, k, v, *problem, True, backend))
    out, lse, low = OPS.block_sparse_fwd(q, k, v, *problem, True, backend)
    saved = (inputs.dout, inputs.dlse, q, k, v, out, lse, low)
    torch.library.opcheck(OPS.block_sparse_bwd.default, (*saved, *problem, backend))


def test_gradcheck() -> None:
    inputs = FlashCase(batch=1, seqlen_q=5, seqlen_k=9, heads_q=2, heads_k=1, head_dim=8,
                       dtype=torch.float64).make()  # fmt: skip
    selection = lists(2, 5)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = attnforge.block_sparse_attention(q, k, v, selection, return_lse=True)
        return out, lse.nan_to_num(neginf=0.0)

    tensors = tuple(x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    assert torch.autograd.gradcheck(call, tensors)


def test_second_order_is_an_error() -> None:
    q = FlashCase(batch=1, seqlen_q=5, seqlen_k=5).make().q.requires_grad_()
    out = attnforge.block_sparse_attention(q, q, q, lists(2, 5))
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        grad.sum().backward()


def test_compile() -> None:
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=20, causal=True).make()
    selection = lists(2, 5, 4)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnforge.block_sparse_attention(q, k, v, selection).square().sum()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        tensors = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        f(*tensors).backward()
        grads.append([x.grad for x in tensors])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap() -> None:
    inputs = FlashCase(batch=3, seqlen_q=8, seqlen_k=8, causal=True).make()
    selection = lists(1, 8)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnforge.block_sparse_attention(q[None], k[None], v[None], selection)[0]
        return out

    got = torch.vmap(one)(inputs.q, inputs.k, inputs.v)
    want = attnforge.block_sparse_attention(inputs.q, inputs.k, inputs.v, selection)
    torch.testing.assert_close(got, want)


def test_explain() -> None:
    inputs = FlashCase(batch=1, seqlen_q=5, seqlen_k=5, causal=True).make()
    text = str(attnforge.explain(attnforge.block_sparse_attention, inputs.q, inputs.k, inputs.v,
                                 lists(2, 5)))  # fmt: skip
    assert "cpu.block_sparse.fwd" in text
    assert "reference.block_sparse.bwd" in text


def test_compile_of_packed_sequences() -> None:
    cu = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    selection = BlockSelection(lists(2, 6, 4).indices[0], 4, 4)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnforge.block_sparse_attention(
            q, k, v, selection, cu_seqlens_q=cu, cu_seqlens_k=cu
        )
        return out.square().sum()

    grads = []
    start = [torch.randn(20, heads, 16) for heads in (4, 2, 2)]
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        tensors = [x.clone().requires_grad_() for x in start]
        f(*tensors).backward()
        grads.append([x.grad for x in tensors])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="selection has 1 rows; want 6"):
        attnforge.block_sparse_attention(
            *start, BlockSelection(selection.indices[:, :1], 4, 4), cu_seqlens_q=cu, cu_seqlens_k=cu
        )
