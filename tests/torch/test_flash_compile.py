"""torch.compile: one graph, few compilations over many shapes, the eager numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnforge

pytestmark = pytest.mark.plain_memory


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(fn: Callable[..., Any], dynamic: bool | None = True) -> tuple[Any, Any]:
    """(fn compiled as one graph by AOTAutograd, counter of compilations)."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=counter), counter


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = attnforge.flash_attention(q * 1.0, k, v, causal=True, return_lse=True, **options)
    return out * 2.0, lse


def tensors(b: int, s: int, t: int, grad: bool) -> list[Tensor]:
    shapes = ((b, s, 4, 16), (b, t, 2, 16), (b, t, 2, 24))
    return [torch.randn(shape).requires_grad_(grad) for shape in shapes]


# Sizes of the first differ from each other and from the constants: torch guards equal ones.
SHAPES = [(3, 6, 9), (2, 11, 20), (5, 40, 40), (4, 17, 3), (7, 2, 31)]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dynamic_shapes(backend: str, grad: bool) -> None:
    # check 78: no graph break, the first shape's graph serves five, the same bits
    fn, counter = compiled(attention)
    fn(*tensors(*SHAPES[0], grad), backend=backend)
    first = counter.frame_count  # 2 if Dynamo started anew, to make the scale a constant
    for shape in SHAPES:
        args = tensors(*shape, grad)
        got, want = fn(*args, backend=backend), attention(*args, backend=backend)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        if grad:
            cotangents = [torch.randn_like(x) for x in want]
            for a, b in zip(torch.autograd.grad(got, args, cotangents),
                            torch.autograd.grad(want, args, cotangents), strict=True):  # fmt: skip
                assert torch.equal(a, b)
    assert counter.frame_count == first <= 2


def test_marked_dynamic(backend: str) -> None:
    # check 78: mark_dynamic does not specialise
    fn, counter = compiled(attention, dynamic=None)
    for shape in SHAPES:
        args = tensors(*shape, False)
        for x in args:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        for a, b in zip(fn(*args, backend=backend), attention(*args, backend=backend), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_varlen_decode_and_merge(backend: str) -> None:
    # check 78 for the other functions in one graph, with features
    def step(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, sinks: Tensor, used: Tensor) -> Any:
        packed = attnforge.flash_attention_varlen(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, sinks=sinks, backend=backend
        )
        parts = [
            attnforge.flash_decode(
                q.unsqueeze(0)[:, -2:], k.unsqueeze(0), v.unsqueeze(0), cache_seqlens=used - n,
                window_size=(3, 0), return_lse=True, backend=backend,
            )
            for n in range(2)
        ]  # fmt: skip
        return packed, *attnforge.merge_states(*zip(*parts, strict=True), backend=backend)

    fn, counter = compiled(step)
    counts = []
    for total in (9, 14, 30):
        q, k, v = (torch.randn(total, h, 16) for h in (4, 2, 2))
        cu = torch.tensor([0, 4, 4, total], dtype=torch.int32)
        used = torch.tensor([total - 1], dtype=torch.int32)
        args = (q, k, v, cu, torch.randn(4), used)
        for a, b in zip(fn(*args), step(*args), strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_same_tensor_as_q_k_and_v(backend: str) -> None:
    # checks 70, 78
    def self_attention(x: Tensor, cu: Tensor) -> Tensor:
        one = attnforge.flash_attention(x, x, x, causal=True, backend=backend)
        flat = x.flatten(0, 1)
        two = attnforge.flash_attention_varlen(
            flat, flat, flat, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=backend
        )
        return one.sum() + two.sum()

    fn, _ = compiled(self_attention)
    x = torch.randn(2, 9, 2, 16, requires_grad=True)
    cu = torch.tensor([0, 7, 18], dtype=torch.int32)
    (got,) = torch.autograd.grad(fn(x, cu), x)
    (want,) = torch.autograd.grad(self_attention(x, cu), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_override_is_a_guard(cpu: str) -> None:
    # registry under compile: a changed override compiles again instead of going stale
    fn, counter = compiled(lambda q: attnforge.flash_attention(q, q, q))
    q = torch.randn(1, 300, 1, 64)
    wants = {}
    for name in ("reference", cpu):
        with attnforge.backend(name):
            wants[name] = attnforge.flash_attention(q, q, q)
    assert not torch.equal(wants["reference"], wants[cpu])
    counts = []
    for name in ("reference", cpu, "reference", cpu):
        with attnforge.backend(name):
            assert torch.equal(fn(q), wants[name])
        counts.append(counter.frame_count)
    assert counts[0] < counts[1] == counts[2] == counts[3]


def test_errors_survive_compilation(backend: str) -> None:
    fn, _ = compiled(lambda q, used: attnforge.flash_attention(
        q, q, q, seqused_k=used, backend=backend))  # fmt: skip
    q = torch.randn(1, 5, 1, 8)
    with pytest.raises(ValueError, match=r"seqused_k\[0\] is 9"):
        fn(q, torch.tensor([9], dtype=torch.int32))


@pytest.mark.slow
def test_inductor(cpu: str) -> None:
    # check 78 with the real compiler, forward and backward
    fn = torch.compile(attention, fullgraph=True, dynamic=True)
    for shape in SHAPES[:2]:
        args = tensors(*shape, True)
        got, want = fn(*args, backend=cpu), attention(*args, backend=cpu)
        torch.testing.assert_close(got, want)
        a, b = (torch.autograd.grad(x[0].sum() + x[1].sum(), args) for x in (got, want))
        torch.testing.assert_close(a, b)
