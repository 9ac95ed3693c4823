"""Native sparse attention as torch sees it: opcheck, compile, vmap, explain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnforge

OPS = torch.ops.attnforge
SIZES = {"cmp_block": 8, "cmp_stride": 4, "slc_block": 16}


@pytest.mark.plain_memory
def test_opcheck(backend: str) -> None:
    q, k = torch.randn(2, 20, 4, 8), torch.randn(2, 4, 2, 8)
    lse = torch.randn(2, 4, 20)
    positions = torch.arange(20, dtype=torch.int32)[None]
    problem = (q, k, lse, positions, None, None, None, 20, 4, 0.3, 8, 4, 16, 2)
    torch.library.opcheck(OPS.nsa_importance.default, (*problem, backend))
    torch.library.opcheck(OPS.nsa_select.default, (*problem, 4, 1, 2, backend))


def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    out: Tensor = attnforge.nsa_attention(
        q, None, None, k, v, None, None, gates, **SIZES, top_n=4, window=12
    )
    return out


def make() -> list[Tensor]:
    return [torch.randn(1, 60, h, d) for h, d in ((4, 16), (2, 16), (2, 16), (4, 3))]


def test_compiled_whole() -> None:
    start = make()
    grads = []
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        tensors = [x.clone().requires_grad_() for x in start]
        f(*tensors).square().sum().backward()
        grads.append([x.grad for x in tensors])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert a.any()
        torch.testing.assert_close(a, b)


def test_gradients_against_the_reference(cpu: str) -> None:
    """All four inputs: kernels in fp32 beside the reference in fp64, with the same lists."""
    start = make()
    grads = []
    for wide, backend in ((False, cpu), (True, "reference")):
        tensors = [(x.double() if wide else x.clone()).requires_grad_() for x in start]
        with attnforge.backend(backend):
            call(*tensors).square().sum().backward()
        grads.append([x.grad for x in tensors])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5)


def test_vmap_of_selection() -> None:
    q, k = torch.randn(3, 1, 40, 4, 16), torch.randn(3, 1, 9, 2, 16)

    def one(q: Tensor, k: Tensor) -> Tensor:
        lse = attnforge.compressed_attention(q, k, k, **SIZES, return_lse=True)[1]
        return attnforge.nsa_select(q, k, lse, **SIZES, top_n=3).indices

    got = torch.vmap(one)(q, k)
    assert torch.equal(got, torch.stack([one(*pair) for pair in zip(q, k, strict=True)]))


def test_explain() -> None:
    q, k, v, gates = make()
    text = str(attnforge.explain(attnforge.nsa_attention, q, None, None, k, v, None, None, gates))
    for name in ("cpu.flash.fwd", "cpu.block_sparse.bwd", "cpu.nsa.select"):
        assert name in text
    text = str(attnforge.explain(attnforge.nsa_attention, q[:, :1], None, None, k, v, None, None,
                                 gates[:, :1]))  # fmt: skip
    assert "paged_fwd" in text
    assert "block_sparse_fwd" not in text
    found = attnforge.explain(attnforge.compressed_attention, q, k, v, return_importance=True)
    assert "cpu.nsa.importance" in str(found)
    lse = torch.zeros(1, 4, 60)
    assert "cpu.nsa.select" in str(attnforge.explain(attnforge.nsa_select, q, k, lse))
