"""What must hold whatever the numbers: splits, packing, steps, layouts, threads, long sequences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.compare import assert_same, same_bits
from attnforge.testing.linear import LinearCase, LinearInputs, linear_inputs

GATES = ("none", "head", "scalar", "key", "value")


def cut(inputs: LinearInputs, lo: int, hi: int) -> Any:
    """The leaves of tokens lo .. hi."""
    x = inputs.leaves
    gate = x.gate
    if gate is not None and gate.dim() > 1:
        gate = gate[:, lo:hi]
    return x._replace(q=x.q[:, lo:hi], k=x.k[:, lo:hi], v=x.v[:, lo:hi], gate=gate)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gate", GATES[:4])
def test_segments_are_one_pass(cpu: str, gate: str, normalize: bool) -> None:
    inputs = linear_inputs(LinearCase(time=90, gate=gate, normalize=normalize))
    whole, last = inputs.call(inputs.leaves, backend=cpu)
    parts, state = [], inputs.leaves
    for lo, hi in itertools.pairwise([0, 33, 34, 34, 90]):
        leaves = cut(inputs, lo, hi)._replace(state=state.state, z=state.z)
        out, found = inputs.call(leaves, backend=cpu)
        state = state._replace(**dict(zip(("state", "z"), found, strict=True))
                               if normalize else {"state": found})  # fmt: skip
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.state, last[0] if normalize else last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_segments_are_those_of_one_pass(cpu: str, gate: str) -> None:
    inputs = linear_inputs(LinearCase(time=50, gate=gate))
    whole = inputs.run(cpu)
    leaves = inputs.leaves._replace(
        **{n: x.clone().requires_grad_() for n, x in inputs.leaves._asdict().items()
           if x is not None and (n, gate) != ("gate", "head")}
    )  # fmt: skip
    split = LinearInputs(inputs.case, leaves, inputs.dout, inputs.dstate, inputs.dz)
    first, middle = split.call(cut(split, 0, 21), backend=cpu)
    second, last = split.call(cut(split, 21, 50)._replace(state=middle), backend=cpu)
    torch.autograd.backward([torch.cat([first, second], 1), last], [inputs.dout, inputs.dstate])
    for name, x in leaves._asdict().items():
        if x is not None and x.grad is not None:
            torch.testing.assert_close(x.grad, whole[f"d{name}"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("gate", GATES)
def test_packing_gives_the_bits_of_single_calls(cpu: str, gate: str) -> None:
    bounds = (0, 15, 15, 48, 70)
    inputs = linear_inputs(LinearCase(time=70, gate=gate, cu_seqlens=bounds))
    whole, last = inputs.call(inputs.leaves, backend=cpu)
    alone = LinearInputs(LinearCase(time=70, gate=gate), *list(vars(inputs).values())[1:])
    assert inputs.leaves.state is not None
    for n, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        leaves = cut(inputs, lo, hi)._replace(state=inputs.leaves.state[n : n + 1])
        out, state = alone.call(leaves, backend=cpu)
        assert same_bits(out, whole[:, lo:hi])
        assert same_bits(state, last[n : n + 1])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_boundaries_of_either_width(cpu: str, kind: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in "qkv")
    ends = torch.tensor([0, 4, 9], dtype=kind)
    packed, _ = attnforge.linear_attention(q, k, v, cu_seqlens=ends, backend=cpu)
    alone, _ = attnforge.linear_attention(q[:, 4:], k[:, 4:], v[:, 4:], backend=cpu)
    assert same_bits(packed[:, 4:], alone)


@pytest.mark.parametrize(  # gates of values have no denominator
    ("gate", "normalize"),
    [(gate, norm) for gate in GATES for norm in (False, True) if not (norm and gate == "value")],
)
def test_steps_are_the_recurrence(backend: str, gate: str, normalize: bool) -> None:
    case = LinearCase(batch=3, time=6, value_heads=4, value_dim=20, gate=gate, normalize=normalize)
    inputs = linear_inputs(case)
    x = inputs.leaves
    assert x.state is not None
    whole, last = inputs.call(x, backend="reference")
    slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    live, own = [0, 2], [4, 1]
    pool = torch.full((6, *x.state.shape[1:]), 7.0)
    zs = torch.full(pool.shape[:3], 7.0)
    pool[own], zs[own] = x.state[live], x.state[live, ..., 0] if x.z is None else x.z[live]
    name = {"head": "decay", "scalar": "g", "key": "gk", "value": "gv"}.get(gate, "")
    for t in range(case.time):
        now = {} if x.gate is None else {name: x.gate if gate == "head" else x.gate[:, t]}
        out = attnforge.linear_step(
            x.q[:, t], x.k[:, t], x.v[:, t], (pool, zs) if normalize else pool,
            state_indices=slots, normalize=normalize, backend=backend, **now,
        )  # fmt: skip
        torch.testing.assert_close(out[live], whole[live, t], rtol=2e-5, atol=2e-5)
        assert same_bits(out[1], torch.zeros_like(out[1]))
    state, z = last if normalize else (last, None)
    torch.testing.assert_close(pool[own], state[live], rtol=2e-5, atol=2e-5)
    assert bool((pool[[0, 2, 3, 5]] == 7.0).all())
    if z is not None:
        torch.testing.assert_close(zs[own], z[live], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("gate", ["none", "scalar", "key"])
def test_what_is_later_does_not_reach_back(cpu: str, gate: str) -> None:
    inputs = linear_inputs(LinearCase(time=60, gate=gate))
    want, _ = inputs.call(inputs.leaves, backend=cpu)
    k, v = inputs.leaves.k.clone(), inputs.leaves.v.clone()
    v[:, 31, :, 3], k[:, 40] = float("inf"), float("nan")
    out, _ = inputs.call(inputs.leaves._replace(k=k, v=v), backend=cpu)
    assert same_bits(out[:, :31], want[:, :31])
    others = [c for c in range(v.shape[-1]) if c != 3]
    assert same_bits(out[:, :40, :, others], want[:, :40, :, others])
    assert not bool(out[:, 31:, :, 3].isfinite().any())
    assert bool(out[:, 40:].isnan().all())


def test_bits_do_not_depend_on_threads_batch_or_layout(cpu: str) -> None:
    for gate in ("scalar", "key"):
        case = LinearCase(batch=3, time=41, value_heads=4, key_dim=40, value_dim=72, gate=gate)
        inputs = linear_inputs(case)
        want = inputs.run(cpu)
        torch.set_num_threads(1)
        assert_same(inputs.run(cpu), want, gate)
        torch.set_num_threads(2)
        x = inputs.leaves
        strange = x._replace(
            q=x.q.transpose(1, 2).contiguous().transpose(1, 2),
            k=torch.cat([x.k, x.k * float("nan")], -1)[..., : case.key_dim],
            v=x.v.transpose(1, 3).contiguous().transpose(1, 3),
        )
        other = LinearInputs(case, strange, inputs.dout, inputs.dstate, inputs.dz)
        assert_same(other.run(cpu), want, gate)
        one = x._replace(**{n: t[1:2] for n, t in x._asdict().items() if t is not None})
        alone = LinearInputs(case, one, inputs.dout[1:2], inputs.dstate[1:2], inputs.dz[1:2])
        assert_same(alone.run(cpu), {n: t[1:2] for n, t in want.items()}, gate)


def test_long_sequences_stay_on_the_recurrence(cpu: str) -> None:
    # 131072 tokens: float64 sums over all of them against the kernels' fp32 state
    time = 131_072
    q, k, v = (torch.rand(1, time, 1, 4) for _ in "qkv")  # all positive: sums grow, errors add up
    slow = torch.full((1, time, 1), -1e-6)
    for gate in (None, slow):
        out, state = attnforge.simple_gla(q, k, v, gate, output_final_state=True, backend=cpu)
        age = torch.arange(time, dtype=torch.float64) * (0.0 if gate is None else 1e-6)
        pairs = torch.einsum("tk,tv->tkv", k[0, :, 0].double(), v[0, :, 0].double())
        sums = (pairs * age.exp()[:, None, None]).cumsum(0) * (-age).exp()[:, None, None]
        truth = torch.einsum("tk,tkv->tv", q[0, :, 0].double(), sums) * 0.5
        assert isinstance(state, Tensor)
        torch.testing.assert_close(out[0, :, 0].double(), truth, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(state[0, 0].double(), sums[-1], rtol=2e-5, atol=1e-5)


def test_decayed_states_take_no_longer(cpu: str) -> None:
    # states that decay through the denormal range are zero in the end, and exactly
    q, k, v = (torch.zeros(1, 4000, 1, 8) for _ in "qkv")
    start = torch.ones(1, 1, 8, 8)
    gate = torch.full((1, 4000, 1), -0.03)
    _, state = attnforge.simple_gla(
        q, k, v, gate, initial_state=start, output_final_state=True, backend=cpu
    )
    assert isinstance(state, Tensor)
    assert same_bits(state, torch.zeros_like(state))


def test_additive_gla_is_a_softmax_over_the_past(backend: str) -> None:
    logits, v = 3 * torch.randn(1, 12, 2, 4), torch.randn(1, 12, 2, 5)
    logits[:, :3, 0] = -float("inf")
    logits[:, 4] *= 20
    q = torch.rand(1, 12, 2, 4)
    logits.requires_grad_()
    for ends in (None, torch.tensor([0, 5, 12])):
        out, state = attnforge.additive_gla(
            q, logits, v, scale=1.0, output_final_state=True, cu_seqlens=ends, backend=backend
        )
        starts = [0] * 12 if ends is None else [0] * 5 + [5] * 7
        for t in range(12):
            past = slice(starts[t], t + 1)
            weights = logits[0, past].double().softmax(0).nan_to_num(0.0)
            want = torch.einsum("hk,shk,shv->hv", q[0, t].double(), weights, v[0, past].double())
            torch.testing.assert_close(out[0, t].double(), want, rtol=1e-5, atol=1e-5)
        assert state is not None
        (grad,) = torch.autograd.grad(out.sum() + state[1].clamp_min(-80).sum(), logits)
        assert bool(grad.isfinite().all())
    whole, _ = attnforge.additive_gla(q, logits, v, backend=backend)
    head = [x[:, :7] for x in (q, logits, v)]
    tail = [x[:, 7:] for x in (q, logits, v)]
    _, middle = attnforge.additive_gla(*head, output_final_state=True, backend=backend)
    rest, _ = attnforge.additive_gla(*tail, initial_state=middle, backend=backend)
    torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-5, atol=1e-5)


def test_mamba2_is_its_recurrence(backend: str) -> None:
    x, dt = torch.randn(2, 9, 4, 3), torch.rand(2, 9, 4)
    b, c = torch.randn(2, 9, 2, 5), torch.randn(2, 9, 2, 5)
    a, d, h = -torch.rand(4) - 0.1, torch.randn(4), torch.randn(2, 4, 5, 3)
    y, last = attnforge.mamba2_ssd(
        x, dt, a, b, c, d=d, initial_state=h, output_final_state=True, backend=backend
    )
    for t in range(9):
        wide_b, wide_c = (m[:, t].repeat_interleave(2, 1) for m in (b, c))
        h = h * (dt[:, t] * a).exp()[..., None, None]
        h = h + wide_b.unsqueeze(-1) * (dt[:, t, :, None] * x[:, t]).unsqueeze(-2)
        want = torch.einsum("bhn,bhnp->bhp", wide_c, h) + d[:, None] * x[:, t]
        torch.testing.assert_close(y[:, t], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, h, rtol=1e-4, atol=1e-5)
