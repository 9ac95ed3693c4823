"""Delta rules and scan as torch sees them: opcheck, compile, vmap, gradcheck, second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnforge

OPS = torch.ops.attnforge


def operands(dtype: torch.dtype = torch.float32, gate: str = "scalar") -> dict[str, Tensor]:
    shape = (1, 5, 2) if gate == "scalar" else (1, 5, 2, 4)
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    return {
        "q": torch.randn(1, 5, 1, 4).to(dtype),
        "k": torch.nn.functional.normalize(torch.randn(1, 5, 1, 4), dim=-1).to(dtype),
        "v": torch.randn(1, 5, 2, 3).to(dtype),
        "g": -torch.rand(shape, dtype=acc),
        "beta": torch.rand(1, 5, 2, dtype=acc),
        "initial_state": torch.randn(2, 2, 4, 3, dtype=acc),
    }


def calls(backend: str, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments."""
    ends = torch.tensor([0, 4, 5], dtype=torch.int32)
    found = []
    for gate in ("scalar", "key"):
        x = operands(dtype, gate)
        inputs = (*x.values(), ends, 0.5)
        found.append((OPS.delta_chunk_fwd.default, (*inputs, True, backend)))
        top = torch.randn_like(x["v"])
        states = torch.randn(2, 2, 4, 3)
        found.append((OPS.delta_chunk_bwd.default, (top, states, *inputs, backend)))
    plain = (*(operands(dtype)[n] for n in "qkv"), None, operands(dtype)["beta"], None, None, 1.0)
    found.append((OPS.delta_chunk_fwd.default, (*plain, False, backend)))
    q, k, v, g, beta, _ = (x[:, 0] for x in operands(dtype).values())
    step = (q, k, v, g, beta, torch.randn(3, 2, 4, 3), torch.tensor([1], dtype=torch.int32), 0.5)
    found.append((OPS.delta_step.default, (*step, backend)))
    x, g = torch.randn(1, 5, 6).to(dtype), -torch.rand(1, 5, 6)
    scan = (x, g, torch.randn(2, 6), ends)
    found.append((OPS.diag_scan_fwd.default, (*scan, True, backend)))
    found.append((OPS.diag_scan_bwd.default, (torch.randn_like(x), None, *scan, backend)))
    return found


@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    for op, args in calls(backend, dtype):
        torch.library.opcheck(op, args)


@pytest.mark.plain_memory
def test_compile(backend: str) -> None:
    # one graph without a break for several lengths, the eager bits
    def step(q: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        o = {"output_final_state": True, "backend": backend}
        k = torch.nn.functional.normalize(q, dim=-1)
        out, state = attnforge.gated_delta_rule(q, k, v, g, beta, **o)
        scanned, last = attnforge.hgrn(out.flatten(2), v.flatten(2).abs().neg(), **o)
        return out * 2.0, state, scanned, last

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for b, t in ((3, 9), (7, 14)):  # no size equal to another: torch guards those
        args = [torch.randn(b, t, 2, 8), torch.randn(b, t, 2, 5), -torch.rand(b, t, 2),
                torch.rand(b, t, 2)]  # fmt: skip
        args = [x.requires_grad_() for x in args]
        got, want = fn(*args), step(*args)
        tops = [torch.randn_like(x) for x in want]
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)
        grads = [torch.autograd.grad(x, args, tops) for x in (got, want)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2


@pytest.mark.plain_memory
def test_compile_of_slots(cpu: str) -> None:
    torch._dynamo.reset()
    fn = torch.compile(attnforge.gsa, fullgraph=True, backend="aot_eager")
    args = [torch.randn(1, 9, h, 8) for h in (4, 2, 2, 2)]
    args.append(-torch.rand(1, 9, 2, 8))
    own = [x.requires_grad_() for x in args]
    outs = [f(*own, backend=cpu)[0] for f in (fn, attnforge.gsa)]
    grads = [torch.autograd.grad(x.square().sum(), own) for x in outs]
    for x, y in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("gate", ["none", "scalar", "key"])
def test_gradcheck(gate: str) -> None:
    leaves = {n: x.requires_grad_() for n, x in operands(torch.float64, gate).items()}
    ends = torch.tensor([0, 3, 5])
    if gate == "none":
        del leaves["g"]
    names = list(leaves)

    def function(*args: Tensor) -> Any:
        x = dict(zip(names, args, strict=True))
        rule = {"none": attnforge.delta_rule, "key": attnforge.kda}.get(
            gate, attnforge.gated_delta_rule
        )
        return rule(**x, output_final_state=True, cu_seqlens=ends, use_qk_l2norm_in_kernel=True)

    assert torch.autograd.gradcheck(function, list(leaves.values()))


def test_gradcheck_of_scan_and_slots() -> None:
    x, g, h = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 3), (2, 5, 3), (2, 3)))
    assert torch.autograd.gradcheck(
        lambda x, g, h: attnforge.hgrn(x, g, initial_state=h, output_final_state=True),
        [y.requires_grad_() for y in (x, g, h)],
    )
    leaves = [torch.randn(1, 4, n, 3, dtype=torch.float64) for n in (4, 2, 2, 2, 2)]
    assert torch.autograd.gradcheck(
        lambda *x: attnforge.gsa(*x)[0], [y.requires_grad_() for y in leaves]
    )


def test_vmap(backend: str) -> None:
    x = operands()
    q, g = torch.randn(3, 1, 5, 1, 4), -torch.rand(3, 1, 5, 2)

    def function(q: Tensor, g: Tensor) -> Tensor:
        return attnforge.gated_delta_rule(q, x["k"], x["v"], g, x["beta"], backend=backend)[0]

    got = torch.vmap(function)(q, g)
    assert torch.equal(got, torch.stack([function(a, b) for a, b in zip(q, g, strict=True)]))


def test_some_gradients_are_those_of_all(backend: str) -> None:
    x = operands()
    ends = torch.tensor([0, 4, 5])
    top = torch.randn_like(x["v"])

    def grads(names: list[str]) -> list[Tensor]:
        own = {n: y.clone().requires_grad_(n in names) for n, y in x.items()}
        out, _ = attnforge.gated_delta_rule(**own, cu_seqlens=ends, backend=backend)
        return list(torch.autograd.grad(out, [own[n] for n in names], top))

    for name, want in zip(x, grads(list(x)), strict=True):
        assert torch.equal(grads([name])[0], want)


def test_second_order_and_forward_mode_are_errors(backend: str) -> None:
    x = operands()
    q = x["q"].requires_grad_()
    del x["initial_state"]
    out, _ = attnforge.gated_delta_rule(**x, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attnforge\.delta_chunk_bwd: the backward has no"):
        grad.sum().backward()
    y = torch.randn(1, 5, 3, requires_grad=True)
    scanned, _ = attnforge.hgrn(y, y, backend=backend)
    (grad,) = torch.autograd.grad(scanned.sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attnforge\.diag_scan_bwd: the backward has no"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"forward-mode AD \(jvp\) is not implemented"):
        torch.func.jvp(lambda y: attnforge.hgrn(y, y, backend=backend)[0], (y,), (y,))
