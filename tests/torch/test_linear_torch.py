"""The additive recurrence as torch sees it: gradcheck, opcheck, fake tensors, compile, vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import attnforge
from attnforge.testing.compare import same_bits
from attnforge.testing.linear import LinearCase, linear_inputs

OPS = torch.ops.attnforge
GATES = ("none", "head", "scalar", "key", "value")


FORMS = [(gate, norm) for gate in GATES for norm in (False, "sum", "abs")]


@pytest.mark.parametrize(  # gates of values have no denominator
    ("gate", "normalize"), [form for form in FORMS if form[0] != "value" or not form[1]]
)
def test_gradcheck(gate: str, normalize: bool | str) -> None:
    case = LinearCase(time=5, value_heads=4, key_dim=3, value_dim=2, gate=gate,
                      normalize=normalize, dtype=torch.float64)  # fmt: skip
    inputs = linear_inputs(case)
    names = [n for n, x in inputs.leaves._asdict().items() if x is not None]
    given = [getattr(inputs.leaves, n) for n in names]
    for name, x in zip(names, given, strict=True):
        x.requires_grad_((name, gate) != ("gate", "head"))

    def call(*tensors: Tensor) -> Any:
        leaves = inputs.leaves._replace(**dict(zip(names, tensors, strict=True)))
        out, state = inputs.call(leaves, backend="reference")
        return (out, *state) if normalize else (out, state)

    assert torch.autograd.gradcheck(call, given)


def operators(backend: str, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments."""
    case = LinearCase(time=7, value_heads=4, gate="key", normalize="sum", dtype=dtype)
    x = linear_inputs(case)
    q, k, v, gate, state, z = x.leaves
    params = (gate, "key", state, z, None, 0.3, True, "sum", 1e-6)
    plain = (None, "none", None, None, torch.tensor([0, 3, 7], dtype=torch.int32), 0.3, True, "",
             0.0)  # fmt: skip
    fwd, bwd = OPS.linear_chunk_fwd.default, OPS.linear_chunk_bwd.default
    step = OPS.linear_step.default
    tape = fwd(q, k, v, *params, True, True, backend)
    bare = fwd(q, k, v, *plain, False, False, backend)
    token = (q[:, 0], k[:, 0], v[:, 0])
    assert gate is not None
    return [
        (fwd, (q, k, v, *params, True, True, backend)),
        (fwd, (q, k, v, *plain, False, False, backend)),
        (bwd, (x.dout, x.dstate, x.dz, q, k, v, *tape, *params, True, backend)),
        (bwd, (x.dout, None, None, q, k, v, *bare, *plain, False, backend)),
        (step, (*token, state, z, gate[:, 0], "key", None, 0.3, "sum", 1e-6, backend)),
        (step, (*token, state, None, None, "none", torch.tensor([-1], dtype=torch.int32), 0.3, "",
                0.0, backend)),
    ]  # fmt: skip


@pytest.mark.plain_memory
def test_opcheck(backend: str) -> None:
    for op, args in operators(backend, torch.float32):
        torch.library.opcheck(op, args)


def describe(found: Any) -> list[tuple[Any, ...]]:
    tensors = found if isinstance(found, (tuple, list)) else (found,)
    return [(tuple(x.shape), x.stride(), x.dtype) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fake_outputs_look_like_real_ones(backend: str, dtype: torch.dtype) -> None:
    for op, args in operators(backend, dtype):
        real = describe(op(*args))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
            assert describe(op(*fake)) == real


@pytest.mark.plain_memory
def test_compile(cpu: str) -> None:
    # one graph without a break for several lengths, the eager bits, states updated in place
    def train(q: Tensor, g: Tensor) -> Tensor:
        out, state = attnforge.simple_gla(q * 1.0, q, q, g, output_final_state=True, backend=cpu)
        assert isinstance(state, Tensor)
        return (out * 2.0).sum() + state.square().sum()

    def decode(q: Tensor, state: Tensor) -> Tensor:
        return attnforge.linear_step(q, q, q, state, backend=cpu) + 1.0

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for time in (9, 14, 33):
        q = torch.randn(1, time, 2, 8, requires_grad=True)
        g = (-torch.rand(1, time, 2)).requires_grad_()
        want = torch.autograd.grad(train(q, g), (q, g))
        got = torch.autograd.grad(compiled(q, g), (q, g))
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1  # a second start of Dynamo, to make the scale constant, is in it
    state, other = torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)
    fast = torch.compile(decode, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        q = torch.randn(2, 2, 8)
        assert same_bits(fast(q, state), decode(q, other))
    assert same_bits(state, other)


def test_vmap_and_higher_derivatives(backend: str) -> None:
    q, g = torch.randn(3, 1, 6, 2, 4), -torch.rand(3, 1, 6, 2)

    def loss(q: Tensor, g: Tensor) -> Tensor:
        return attnforge.simple_gla(q, q, q, g, backend=backend)[0].square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(q, g)
    for n in range(3):
        want = torch.func.grad(loss, argnums=(0, 1))(q[n], g[n])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[n], b)
    leaf = q[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, g[0]), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_chunk_bwd: the backward has no derivative"):
        torch.autograd.grad(grad.sum(), leaf)
    with pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(lambda x: loss(x, g[0]), (leaf.detach(),), (leaf.detach(),))


def test_only_what_is_asked_for(backend: str) -> None:
    v = torch.randn(1, 6, 2, 4, requires_grad=True)
    q, gate = torch.randn(1, 6, 2, 4), -torch.rand(1, 6, 2, 4)
    out, none = attnforge.gla(q, q, v, gate, backend=backend)
    assert none is None
    out.sum().backward()
    assert v.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attnforge.gla(q, q, v, gate, backend=backend)[0].dtype is torch.bfloat16


@pytest.mark.plain_memory
def test_memory_of_a_backward_is_its_gradients(cpu: str) -> None:
    # nothing per chunk: beyond inputs and gradients, a workspace that does not grow with time
    from torch.profiler import ProfilerActivity, profile

    def extra(time: int) -> int:
        x = [torch.randn(1, time, 2, 32, requires_grad=True) for _ in range(4)]
        out, _ = attnforge.gla(*x[:3], -x[3].abs(), backend=cpu)
        dout = torch.randn_like(out)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            torch.autograd.grad(out, x, dout)
        live = peak = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return peak

    small, large = extra(512), extra(2048)
    inputs = 4 * 4 * 2 * 32
    assert (large - small) / (2048 - 512) <= 3 * inputs
