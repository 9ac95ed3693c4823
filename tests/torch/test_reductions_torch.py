"""The reductions as torch sees them: opcheck, fake tensors, compile, vmap, autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import attnforge
from attnforge import reductions

OPS = torch.ops.attnforge
CUT = torch.tensor([1, 4, 9], dtype=torch.int32)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(2, 5, 4, 16).to(dtype), torch.randn(2, 9, 2, 16).to(dtype)
    return q, k, torch.randn(2, 4, 5) + 2


def calls(backend: str, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator of the family with arguments."""
    q, k, lse = operands(dtype)
    used = torch.tensor([9, 4], dtype=torch.int32)
    tail = (used, torch.rand(2, 4), 0.3, 6, 0, 5.0, backend)
    plain = (None, None, 0.3, -1, -1, 0.0, backend)
    return [
        (OPS.reductions_column_sums.default, (q, k, lse, torch.rand(2, 4, 5), *tail)),
        (OPS.reductions_column_sums.default, (q, k, lse, None, *plain)),
        (OPS.reductions_span_mass.default, (q, k, lse, CUT, *tail)),
        (OPS.reductions_span_bwd.default, (torch.randn(2, 4, 5, 2), q, k, lse, CUT, *tail)),
        (OPS.reductions_block_max.default, (q, k, lse, 2, 4, *tail)),
        (OPS.reductions_block_max.default, (q, k, None, 2, 4, *plain)),
        (OPS.reductions_row_entropy.default, (q, k, lse, *tail)),
        (OPS.reductions_topk_keys.default, (q, k, lse, 3, *tail)),
        (OPS.reductions_topk_keys.default, (q, k, None, 3, *plain)),
        (OPS.reductions_edges.default, (q, k, lse, 0.05, 40, *tail)),
        (OPS.reductions_head_gradient.default, (torch.randn_like(q), q, backend)),
    ]


@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    for op, args in calls(backend, dtype):
        torch.library.opcheck(op, args)


def describe(found: Any) -> list[tuple[Any, ...]]:
    tensors = found if isinstance(found, tuple) else (found,)
    return [(tuple(x.shape), x.stride(), x.dtype) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fake_outputs_look_like_real_ones(backend: str, dtype: torch.dtype) -> None:
    for op, args in calls(backend, dtype):
        real = describe(op(*args))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
            assert describe(op(*fake)) == real
        meta = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("meta"), args)
        assert describe(op(*meta)) == real


@pytest.mark.plain_memory
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_compile(backend: str, grad: bool) -> None:
    # one graph without a break for several shapes, the eager bits
    def step(q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        o = {"causal": True, "backend": backend}
        mass = reductions.span_mass(q * 1.0, k, lse, CUT, **o)
        sums = reductions.column_sums(q, k, lse, **o)
        values, keys = reductions.topk_keys(q, k, lse, 3, **o)
        top = reductions.block_max(q, k, lse, 4, 3, **o)
        found = reductions.edges(q, k, lse, 0.1, 32, **o)
        return mass * 2.0, sums, top, values, keys, *found, found.overflow

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # The first sizes differ from each other and from the constants: torch guards equal ones.
    for b, sq, sk in ((7, 6, 11), (2, 13, 20), (5, 40, 41)):
        args = [torch.randn(b, sq, 4, 16), torch.randn(b, sk, 2, 16), torch.randn(b, 4, sq) + 2]
        args = [x.requires_grad_(grad) for x in args]
        got, want = fn(*args), step(*args)
        for a, c in zip(got, want, strict=True):
            assert torch.equal(a, c)
        if grad:
            cotangent = torch.randn_like(want[0])
            grads = [torch.autograd.grad(x[0], args, cotangent) for x in (got, want)]
            for a, c in zip(*grads, strict=True):
                assert torch.equal(a, c)
    assert counter.frame_count <= 2


def test_vmap(backend: str) -> None:
    # each function over a mapped q and lse with shared keys: as one call per slice
    q, k, lse = torch.randn(3, 2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(3, 2, 4, 5)
    o = {"causal": True, "backend": backend}
    functions = {
        "column_sums": lambda q, lse: reductions.column_sums(q, k, lse, **o),
        "span_mass": lambda q, lse: reductions.span_mass(q, k, lse, CUT, **o),
        "block_max": lambda q, lse: reductions.block_max(q, k, lse, 2, 4, **o),
        "row_entropy": lambda q, lse: reductions.row_entropy(q, k, lse, **o),
        "topk_keys": lambda q, lse: reductions.topk_keys(q, k, lse, 3, **o),
        "edges": lambda q, lse: tuple(reductions.edges(q, k, lse, 0.1, 9, **o)),
        "head_gradient": lambda q, lse: reductions.head_gradient(q, q, backend=backend),
    }
    for name, function in functions.items():
        got = torch.vmap(function)(q, lse)
        slices = [function(a, b) for a, b in zip(q, lse, strict=True)]
        if not isinstance(got, tuple):
            got, slices = (got,), [(x,) for x in slices]
        for n, x in enumerate(got):
            assert torch.equal(x, torch.stack([s[n] for s in slices])), name


def test_per_sample_gradients(backend: str) -> None:
    q, k, lse = torch.randn(3, 2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(3, 2, 4, 5) + 2

    def loss(q: Tensor, lse: Tensor) -> Tensor:
        return reductions.span_mass(q, k, lse, CUT, backend=backend).square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(q, lse)
    for n in range(3):
        want = torch.func.grad(loss, argnums=(0, 1))(q[n], lse[n])
        assert torch.equal(got[0][n], want[0])
        assert torch.equal(got[1][n], want[1])


@pytest.mark.parametrize("options", [
    {}, {"causal": True, "softcap": 3.0}, {"window_size": (2, 1)},
    {"seqused_k": torch.tensor([8, 3], dtype=torch.int32), "causal": True},
    {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "softmax_scale": 0.7},
], ids=["plain", "softcap", "window", "used", "alibi"])  # fmt: skip
def test_gradcheck(options: dict[str, Any]) -> None:
    q, k = (torch.randn(2, s, h, 5, dtype=torch.float64) for s, h in ((4, 4), (9, 2)))
    lse = torch.randn(2, 4, 4, dtype=torch.float64) + 2
    leaves = [x.requires_grad_() for x in (q, k, lse)]
    cut = torch.tensor([1, 1, 4, 8], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda q, k, lse: reductions.span_mass(q, k, lse, cut, **options), leaves
    )


def test_statistics_carry_no_gradient(backend: str) -> None:
    q, k, lse = (x.requires_grad_() for x in operands())
    o = {"backend": backend}
    for found in (
        reductions.column_sums(q, k, lse, row_weights=torch.rand(2, 4, 5, requires_grad=True), **o),
        reductions.block_max(q, k, lse, 2, 4, **o),
        reductions.row_entropy(q, k, lse, **o),
        *reductions.topk_keys(q, k, lse, 3, **o),
        *reductions.edges(q, k, lse, 0.1, 9, **o),
        reductions.head_gradient(q, q, **o),
    ):
        assert not found.requires_grad


def test_second_order_and_forward_mode_are_errors(backend: str) -> None:
    q, k, lse = (x.requires_grad_() for x in operands())
    mass = reductions.span_mass(q, k, lse, CUT, backend=backend)
    (grad,) = torch.autograd.grad(mass.sum(), q, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"attnforge\.reductions\.span_mass: the backward has no"
    ):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"forward-mode AD \(jvp\) is not implemented"):
        torch.func.jvp(lambda q: reductions.span_mass(q, k, lse, CUT, backend=backend), (q,), (q,))


def test_gradients_of_some_inputs(backend: str) -> None:
    q, k, lse = operands()
    everything = [x.clone().requires_grad_() for x in (q, k, lse)]
    weight = torch.randn(2, 4, 5, 2)
    mass = reductions.span_mass(*everything, CUT, backend=backend)
    want = torch.autograd.grad(mass, everything, weight)
    for n in range(3):
        some = [x.clone() for x in (q, k, lse)]
        some[n].requires_grad_()
        mass = reductions.span_mass(*some, CUT, backend=backend)
        (got,) = torch.autograd.grad(mass, some[n], weight)
        assert torch.equal(got, want[n])


def test_same_tensor_for_q_and_k(backend: str) -> None:
    x = torch.randn(1, 9, 2, 16, requires_grad=True)
    lse = torch.randn(1, 2, 9) + 2
    mass = reductions.span_mass(x, x, lse, CUT, backend=backend)
    (got,) = torch.autograd.grad(mass.sum(), x)
    q, k = (x.detach().clone().requires_grad_() for _ in range(2))
    mass = reductions.span_mass(q, k, lse, CUT, backend=backend)
    dq, dk = torch.autograd.grad(mass.sum(), (q, k))
    torch.testing.assert_close(got, dq + dk)


def test_autocast(backend: str) -> None:
    q, k, lse = operands()
    with torch.autocast("cpu", torch.bfloat16):
        got = reductions.column_sums(q, k, lse, backend=backend)
    want = reductions.column_sums(q.bfloat16(), k.bfloat16(), lse, backend=backend)
    assert torch.equal(got, want)


def test_listed() -> None:
    ops = {s.op for s in attnforge.list_kernels() if s.id.split(".")[1] == "reductions"}
    served = {s.op for s in attnforge.list_kernels() if s.id.startswith("cpu.reductions")}
    assert ops == served
    assert len(ops) == 8
