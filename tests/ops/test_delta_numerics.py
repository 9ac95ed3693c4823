"""Delta rules and the diagonal scan against the float64 recurrence, every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

import attnforge
from attnforge.testing.cases import Target
from attnforge.testing.compare import compare, same_bits
from attnforge.testing.delta import DeltaCase, DeltaInputs, ScanInputs

HALF = (torch.bfloat16, torch.float16)
GATES = ("none", "scalar", "key")

CASES = [
    *(DeltaCase(time=t, gate=gate, key_dim=8, value_dim=8) for t in (1, 15, 17) for gate in GATES),
    *(DeltaCase(time=t, gate=gate) for t in (64, 65, 129) for gate in GATES),
    # K != V, dims that fill no vector, grouped heads, several panels, several replayed segments.
    *(DeltaCase(time=70, heads=3, key_dim=33, value_dim=100, gate=gate) for gate in GATES),
    *(DeltaCase(time=80, heads=2, group=2, key_dim=60, value_dim=20, gate=g) for g in GATES),
    *(DeltaCase(time=1100, key_dim=12, value_dim=8, gate=gate, group=2) for gate in GATES),
    *(DeltaCase(time=90, key_dim=40, value_dim=64, gate=g, dtype=d) for g in GATES for d in HALF),
    # Empty sequences in front, between and behind; one token; state given or not.
    *(DeltaCase(time=150, lengths=(0, 15, 1, 0, 70, 60, 0), gate=g, heads=2) for g in GATES),
    DeltaCase(time=150, lengths=(90, 40), gate="key", state=False),
    *(DeltaCase(time=0, batch=2, gate=gate) for gate in GATES),
    # Decays from none to where every factor underflows.
    *(DeltaCase(time=130, gate=g, strength=s) for g in GATES[1:] for s in (0.0, 5.0, 90.0, 1e4)),
    # Write strengths at both ends, where (I - beta k k^T) is singular or a reflection.
    *(DeltaCase(time=130, gate=g, beta=(b, b)) for g in GATES for b in (0.0, 1.0, 2.0)),
    DeltaCase(time=130, gate="scalar", beta=(0.0, 2.0), batch=2, heads=2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: DeltaCase) -> None:
    inputs = case.make()
    compare(inputs.run("cpu"), inputs.truth(), str(case)).check()


@pytest.mark.parametrize("gate", GATES)
def test_formulas_of_the_reference_are_autograd(gate: str) -> None:
    case = DeltaCase(time=40, lengths=(0, 17, 1, 20), heads=2, group=2, gate=gate)
    inputs = case.make()
    compare(inputs.run("reference"), inputs.truth(), str(case)).check()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
def test_every_isa_level(level: Target, gate: str, dtype: torch.dtype) -> None:
    inputs = DeltaCase(time=83, heads=2, key_dim=20, value_dim=36, gate=gate, dtype=dtype).make()
    compare(inputs.run("cpu"), inputs.truth(), level.name).check()


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5, 1.99])
@pytest.mark.parametrize("keys", ["same", "near"])
@pytest.mark.parametrize("gate", ["none", "key"])
def test_correlated_keys(keys: str, beta: float, gate: str) -> None:
    # The condition of a chunk's system is up to 5e3 here; inverses by powers explode.
    case = DeltaCase(time=256, keys=keys, beta=(beta, beta), gate=gate, strength=1e-3)
    inputs = case.make()
    truth = inputs.truth(growth=1024.0 if beta > 1.5 else 64.0)
    compare(inputs.run("cpu"), truth, str(case)).check()


@pytest.mark.parametrize("gate", ["scalar", "key"])
def test_hard_resets(gate: str) -> None:
    inputs = DeltaCase(time=150, gate=gate, value_dim=24).make()
    assert inputs.g is not None
    at = torch.tensor([0, 3, 64, 65, 100])
    inputs.g[:, at] = -torch.inf
    found = inputs.run("cpu")
    compare(found, inputs.truth(), gate).check()
    # Nothing of what came before is left: the tail alone gives the same bits of state.
    tail = inputs.cut(100, 150, None).run("cpu", grad=False)
    whole = compare({"final_state": tail["final_state"]}, inputs.truth(grad=False))
    whole.check()
    assert not bool(found["dg"][:, at].any())


@pytest.mark.parametrize("gate", GATES)
def test_segments_are_one_pass(gate: str) -> None:
    case = DeltaCase(time=257, gate=gate, heads=2)
    inputs = case.make()
    truth = inputs.truth()
    ends = (0, 97, 98, 226, 257)
    forward, states = [], [inputs.initial_state]
    for lo, hi in itertools.pairwise(ends):
        found = inputs.cut(lo, hi, states[-1]).run("cpu", grad=False)
        forward.append(found["out"])
        states.append(found["final_state"])
    got = {"out": torch.cat(forward, 1), "final_state": states[-1]}
    grads: list[dict[str, torch.Tensor]] = []
    dstate = inputs.dstate
    for i in range(len(ends) - 2, -1, -1):
        part = inputs.cut(ends[i], ends[i + 1], states[i])
        part = DeltaInputs(**{**part.__dict__, "dstate": dstate})
        grads.insert(0, part.run("cpu"))
        dstate = grads[0]["dinitial_state"]
    names = [n for n in grads[0] if n.startswith("d") and n != "dinitial_state"]
    got |= {n: torch.cat([x[n] for x in grads], 1) for n in names}
    compare({**got, "dinitial_state": dstate}, truth, gate).check()


@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences_are_single_ones(gate: str) -> None:
    lengths = (33, 0, 80, 1)
    inputs = DeltaCase(time=114, lengths=lengths, gate=gate, heads=2).make()
    assert inputs.initial_state is not None
    packed, at = inputs.run("cpu"), 0
    for n, length in enumerate(lengths):
        one = inputs.cut(at, at + length, inputs.initial_state[n : n + 1])
        own = {"cu_seqlens": None, "dstate": inputs.dstate[n : n + 1]}
        found = DeltaInputs(**{**one.__dict__, **own}).run("cpu")
        for name, x in found.items():
            part = packed[name][n : n + 1] if "state" in name else packed[name][:, at : at + length]
            assert same_bits(part, x), name
        at += length


def test_threads_do_not_change_bits() -> None:
    # One head on two threads: the columns of values are dealt out.
    inputs = DeltaCase(time=100, value_dim=80, gate="scalar", group=3).make()
    two = inputs.run("cpu")
    torch.set_num_threads(1)
    one = inputs.run("cpu")
    assert all(same_bits(one[n], two[n]) for n in one)


def test_a_long_sequence_reads_back_what_it_wrote() -> None:
    # 131072 writes under orthonormal keys with beta 1: a key always reads its last value.
    time, dim = 131072, 8
    keys = torch.eye(dim).repeat(time // dim, 1).view(1, time, 1, dim)
    values = torch.randn(1, time, 1, dim)
    q = keys.roll(-1, 1)  # the key that was written dim - 1 tokens ago
    beta = torch.ones(1, time, 1)
    inputs = DeltaInputs(q, keys, values, None, beta, None, None, values, values, 1.0)
    out, _ = inputs.call("cpu")
    torch.testing.assert_close(out[:, dim - 1 :], values[:, : time - dim + 1], rtol=1e-6, atol=1e-6)


def test_a_long_random_sequence() -> None:
    inputs = DeltaCase(time=131072, key_dim=8, value_dim=8, strength=1e-3).make()
    out, state = inputs.call("cpu")
    # From the middle on, in float64, out of the state that the first half left.
    middle = 131072 - 2048
    _, before = inputs.cut(0, middle, inputs.initial_state).call("cpu")
    truth = inputs.cut(middle, 131072, before).truth(grad=False)
    compare({"out": out[:, middle:], "final_state": state}, truth).check()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("lengths", [None, (0, 70, 1, 59)], ids=["batch", "packed"])
def test_scan(target: Target, dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    time, dim = 140, 75
    batch, n = (2, 2) if lengths is None else (1, len(lengths))
    g = -torch.rand(batch, time, dim) * 3
    g[:, 50, ::3], g[:, 51] = -torch.inf, 0.0
    ends = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = ScanInputs(
        torch.randn(batch, time, dim).to(dtype), g, torch.randn(n, dim), ends,
        torch.randn(batch, time, dim).to(dtype), torch.randn(n, dim),
    )  # fmt: skip
    compare(inputs.run(target.backend), inputs.truth(), target.name).check()


def test_definition_is_the_product_of_transitions() -> None:
    # S_T = sum_j A_T ... A_{j+1} beta_j k_j v_j^T with A_t = (I - beta_t k_t k_t^T) diag(e^{g_t})
    x = DeltaCase(time=9, gate="key", value_dim=5, dtype=torch.float64).make()
    assert x.g is not None
    assert x.initial_state is not None
    q, k, v, g, beta = (y[0, :, 0].double() for y in (x.q, x.k, x.v, x.g, x.beta))
    state, eye, rows = x.initial_state[0, 0].double(), torch.eye(16, dtype=torch.float64), []
    for t in range(9):
        state = (eye - beta[t] * torch.outer(k[t], k[t])) @ torch.diag(g[t].exp()) @ state
        state = state + beta[t] * torch.outer(k[t], v[t])
        rows.append(state.T @ q[t] / 4)
    out, final = x.call("reference")
    torch.testing.assert_close(out[0, :, 0], torch.stack(rows))
    torch.testing.assert_close(final[0, 0], state)


@pytest.mark.parametrize("gate", ["scalar", "key"])
def test_slow_decays_keep_their_rate(gate: str) -> None:
    # Nothing is written: the state is e^{sum of gates} of the first one. Rounding the decay of a
    # chunk to fp32 would be wrong by 9e-6 in the end.
    x = DeltaCase(time=32768, gate=gate, key_dim=8, value_dim=8, beta=(0, 0)).make()
    assert x.g is not None
    assert x.initial_state is not None
    x.g.fill_(-1e-6)
    _, state = x.call("cpu")
    log = x.g.double().sum(1).reshape(1, 1, -1, 1)
    torch.testing.assert_close(state.double(), log.exp() * x.initial_state, rtol=2e-6, atol=0)


def test_slow_scans_keep_their_rate() -> None:
    # Rounding e^-1e-6 to fp32 forgets 1.3% too much: 4.5e-4 in the end, against 0.9e-4.
    g = torch.full((1, 32768, 3), -1e-6)
    x, first = torch.randn_like(g) * 1e-2, torch.ones(1, 3)
    out, _ = attnforge.hgrn(x, g, initial_state=first, backend="cpu")
    want, _ = attnforge.hgrn(x.double(), g.double(), initial_state=first)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-4)
