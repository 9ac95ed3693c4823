"""Contract of the delta rules, the scan and gated slot attention: steps, layouts, refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.cases import LAYOUTS, Layout, Target, place
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.delta import DeltaCase, DeltaInputs
from attnforge.testing.oracle import Truth

GATES = ("none", "scalar", "key")
NAMES = ("q", "k", "v", "dout")


def walked(inputs: DeltaInputs, backend: str) -> tuple[Tensor, Tensor]:
    """The whole sequence by single steps on a pool, the rows in slots of their own."""
    assert inputs.initial_state is not None
    batch = inputs.q.shape[0]
    slots = torch.arange(batch, dtype=torch.int32).flip(0) + 1
    pool = torch.full((batch + 2, *inputs.initial_state.shape[1:]), 7.0)
    pool[slots.long()] = inputs.initial_state
    rows = []
    for t in range(inputs.q.shape[1]):
        q, k, v, beta = (x[:, t] for x in (inputs.q, inputs.k, inputs.v, inputs.beta))
        g = None if inputs.g is None else inputs.g[:, t]
        rows.append(
            attnforge.delta_step(q, k, v, pool, beta, g=g, state_indices=slots, backend=backend)
        )
    assert bool((pool[[0, -1]] == 7.0).all())
    return torch.stack(rows, 1), pool[slots.long()]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_steps_are_the_sequence(target: Target, gate: str, dtype: torch.dtype) -> None:
    case = DeltaCase(time=20, batch=2, heads=2, group=2, key_dim=20, value_dim=75, gate=gate,
                     dtype=dtype)  # fmt: skip
    inputs = case.make()
    out, state = walked(inputs, target.backend)
    compare({"out": out, "final_state": state}, inputs.truth(grad=False), target.name).check()


def test_step_skips_rows(backend: str) -> None:
    inputs = DeltaCase(time=1, batch=3).make()
    q, k, v, beta = (x[:, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.beta))
    pool = torch.randn(2, 1, 16, 16)
    before = pool.clone()
    slots = torch.tensor([-1, 1, -1], dtype=torch.int32)
    q[0], v[2] = torch.nan, torch.nan
    out = attnforge.delta_step(q, k, v, pool, beta, state_indices=slots, backend=backend)
    assert not bool(out[[0, 2]].any())
    assert same_bits(pool[0], before[0])
    assert not same_bits(pool[1], before[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Layout) -> None:
    inputs = DeltaCase(time=70, batch=2, heads=2, gate="key", dtype=torch.bfloat16).make()
    if layout == "expanded":
        inputs = replace(inputs, **{n: getattr(inputs, n)[:1].expand(2, -1, -1, -1) for n in NAMES})
    moved = {n: place(getattr(inputs, n), layout) for n in NAMES}
    assert_same(replace(inputs, **moved).run("cpu"), inputs.run("cpu"), layout)


def test_qk_norm(backend: str) -> None:
    inputs = DeltaCase(time=30, heads=2).make()
    q, k = inputs.q * 3.0, inputs.k * 5.0
    got, _ = replace(inputs, q=q, k=k).call(backend, use_qk_l2norm_in_kernel=True)
    norm = torch.nn.functional.normalize
    want = replace(inputs, q=norm(q, dim=-1), k=norm(k, dim=-1)).truth(grad=False, growth=1e4)
    compare({"out": got}, want).check()


def test_gates_per_head_of_q_are_repeated(backend: str) -> None:
    inputs = DeltaCase(time=10, heads=2, group=3).make()
    beta, g = inputs.beta[..., ::3], inputs.g
    assert g is not None
    whole = replace(
        inputs, beta=beta.repeat_interleave(3, 2), g=g[..., ::3].repeat_interleave(3, 2)
    )
    few = replace(inputs, beta=beta, g=g[..., ::3])
    assert same_bits(few.call(backend)[0], whole.call(backend)[0])


def test_final_state_is_none_unless_wanted(backend: str) -> None:
    x = torch.randn(1, 5, 2, 8)
    assert attnforge.delta_rule(x, x, x, x[..., 0], backend=backend)[1] is None
    assert attnforge.hgrn(x[..., 0], -x[..., 0].abs(), backend=backend)[1] is None
    g = -x.abs()
    assert attnforge.gsa(x, x, x, x, g, backend=backend)[1] is None


def slots(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, ...]:
    """Gated slot attention token by token."""
    group, rows = q.shape[2] // k.shape[2], []
    for t in range(q.shape[1]):
        decay = torch.exp(g[:, t])
        first = first * decay[..., None, :] + k[:, t, :, :, None] * s[:, t, :, None, :]
        second = second * decay[..., None] + s[:, t, :, :, None] * v[:, t, :, None, :]
        keys, values = (x.repeat_interleave(group, 1) for x in (first, second))
        p = torch.softmax(torch.einsum("bhk,bhkm->bhm", q[:, t], keys) * q.shape[-1] ** -0.5, -1)
        rows.append(torch.einsum("bhm,bhmv->bhv", p, values))
    return torch.stack(rows, 1), first, second


@pytest.mark.parametrize("m", [1, 20], ids=["one_slot", "slots"])
def test_gated_slot_attention(backend: str, m: int) -> None:
    heads, time = 2, 75
    inputs = {
        "q": torch.randn(2, time, 4, 16), "k": torch.randn(2, time, heads, 16),
        "v": torch.randn(2, time, heads, 24), "s": torch.rand(2, time, heads, m),
        "g": -torch.rand(2, time, heads, m), "first": torch.randn(2, heads, 16, m),
        "second": torch.randn(2, heads, m, 24),
    }  # fmt: skip
    tops = [torch.randn(2, time, 4, 24), torch.randn(2, heads, 16, m), torch.randn(2, heads, m, 24)]

    def results(wide: bool) -> dict[str, Tensor]:
        x = {n: (y.double() if wide else y).clone().requires_grad_() for n, y in inputs.items()}
        if wide:
            outs = slots(**x)
        else:
            pair = (x["first"], x["second"])
            out, state = attnforge.gsa(*(x[n] for n in "qkvsg"), initial_state=pair,
                                       output_final_state=True, backend=backend)  # fmt: skip
            assert state is not None
            outs = (out, *state)
        grads = torch.autograd.grad(outs, list(x.values()), [t.to(outs[0]) for t in tops])
        named = dict(zip(("out", "keys", "values"), outs, strict=True))
        return {**named, **{f"d{n}": y for n, y in zip(x, grads, strict=True)}}

    truth = Truth()
    for name, x in results(wide=True).items():
        truth.put(name, x.detach(), 2e-5 * x.detach().abs().max().expand(x.shape))
    compare(results(wide=False), truth, backend).check()


T = torch.randn
CALL: dict[str, Any] = {
    "q": T(2, 5, 2, 8), "k": T(2, 5, 2, 8), "v": T(2, 5, 4, 16), "g": T(2, 5, 4), "beta": T(2, 5, 4)
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": T(5, 2, 8)}, ValueError, "q has 3 dims"),
    "dtype": ({"k": T(2, 5, 2, 8).half()}, ValueError, "dtypes differ"),
    "time": ({"v": T(2, 6, 4, 16)}, ValueError, "q, k and v differ in batch or time"),
    "heads": ({"v": T(2, 5, 3, 16)}, ValueError, "no multiple of the heads of q; got 3 and 2"),
    "beta_shape": ({"beta": T(2, 5, 3)}, ValueError, "beta has shape (2, 5, 3); want (2, 5, 4)"),
    "beta_kind": ({"beta": 1.0}, TypeError, "beta must be a tensor; got float"),
    "gate_shape": ({"g": T(2, 5, 4, 8)}, ValueError, "g has shape (2, 5, 4, 8); want (2, 5, 4)"),
    "gate_dtype": ({"g": T(2, 5, 4).int()}, ValueError, "g has dtype int32"),
    "state": ({"initial_state": T(2, 4, 16, 8)}, ValueError, "initial_state has shape"),
    "scale": ({"scale": float("nan")}, ValueError, "scale is nan"),
    "packed": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "comes with a batch of 2"),
    "backend": ({"backend": 3}, TypeError, "backend must be a string"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    changes, kind, text = REFUSED[name]
    with pytest.raises(kind, match=rf"^attnforge\.gated_delta_rule: .*{re.escape(text)}"):
        attnforge.gated_delta_rule(**{**CALL, **changes})


def test_refusals_of_the_others() -> None:
    x, ends = T(2, 5, 2, 8), torch.tensor([0, 4, 3])
    with pytest.raises(ValueError, match=r"delta_chunk_fwd: cu_seqlens\[2\] is 3; want 0 first"):
        attnforge.delta_rule(x[:1], x[:1], x[:1], x[:1, ..., 0], cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"^attnforge\.hgrn: x is \(2, 5, 2, 8\)"):
        attnforge.hgrn(x, x)
    with pytest.raises(ValueError, match=r"^attnforge\.hgrn: g has shape"):
        attnforge.hgrn(x[..., 0], x[..., 0, 0])
    with pytest.raises(ValueError, match=r"^attnforge\.gsa: k, v, s, g do not fit"):
        attnforge.gsa(x, x, x, x, x[..., :4])
    with pytest.raises(ValueError, match=r"^attnforge\.gsa: q does not fit k"):
        attnforge.gsa(T(2, 5, 3, 8), x, x, x, x)
    pool, row = T(2, 2, 8, 8), x[:, 0]
    slot = torch.tensor([1, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"state_indices is \[1, 1\]"):
        attnforge.delta_step(row, row, row, pool, row[..., 0], state_indices=slot)
    with pytest.raises(ValueError, match=r"^attnforge\.delta_step: state is .*want a contiguous"):
        attnforge.delta_step(row, row, row, pool.half(), row[..., 0])
