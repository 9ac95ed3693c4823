"""Kernels of the additive recurrence read and write what is theirs: NaN fences around inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnforge
from attnforge.testing.cases import Target
from attnforge.testing.compare import assert_same
from attnforge.testing.linear import LinearCase, LinearInputs, linear_inputs
from attnforge.testing.poison import fenced

SIZES = [(1, 1, 1), (13, 21, 5), (40, 72, 33)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gate", ["none", "scalar", "key", "value"])
def test_fences(level: Target, gate: str, dtype: torch.dtype) -> None:
    for k, v, time in SIZES:
        case = LinearCase(time=time, value_heads=4, key_dim=k, value_dim=v, gate=gate, dtype=dtype,
                          normalize=gate != "value")  # fmt: skip
        plain = linear_inputs(case)
        walls = {n: fenced(x) for n, x in plain.leaves._asdict().items() if x is not None}
        dout = fenced(plain.dout)
        leaves = plain.leaves._replace(**{n: wall.tensor for n, wall in walls.items()})
        inside = LinearInputs(case, leaves, dout.tensor, plain.dstate, plain.dz)
        # run() copies its leaves, so the forward is called on the fenced ones themselves
        out, _ = inside.call(leaves, backend=level.backend)
        assert_same({"out": out}, {"out": plain.run(level.backend)["out"]})
        recorded = {n: t.detach().requires_grad_() for n, t in leaves._asdict().items()
                    if t is not None}  # fmt: skip
        out, _ = inside.call(leaves._replace(**recorded), backend=level.backend)
        found = torch.autograd.grad(out, list(recorded.values()), dout.tensor)
        assert all(bool(g.isfinite().all()) for g in found)
        assert all(wall.intact() for wall in (*walls.values(), dout))


def test_a_step_writes_its_slots_alone(level: Target) -> None:
    for k, v, _ in SIZES:
        pool, z = fenced(torch.rand(5, 3, k, v)), fenced(torch.rand(5, 3, k))
        operands = [fenced(torch.rand(2, 3, n)) for n in (k, k, v)]
        before = pool.tensor.clone()
        out = attnforge.linear_step(
            *(x.tensor for x in operands), (pool.tensor, z.tensor), normalize=True,
            state_indices=torch.tensor([3, 0], dtype=torch.int32), backend=level.backend,
        )  # fmt: skip
        assert bool(out.isfinite().all())
        assert all(x.intact() for x in operands)
        assert torch.equal(pool.tensor[[1, 2, 4]], before[[1, 2, 4]])
        changed = pool.tensor.clone()
        pool.tensor.copy_(before)
        assert pool.intact()  # nothing beside the slots
        assert not torch.equal(changed[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gate", ["none", "scalar", "key", "value"])
def test_large_results_have_the_bits_of_small_ones(
    level: Target, gate: str, dtype: torch.dtype
) -> None:
    """From 8 MiB on results go past the caches; those of one head alone are smaller."""
    time = (8 << 20) // (8 * 64 * dtype.itemsize)
    case = LinearCase(time=time, heads=8, value_heads=8, key_dim=64, value_dim=64, gate=gate,
                      dtype=dtype, states=False)  # fmt: skip
    whole = linear_inputs(case)
    of_all = whole.run(level.backend)
    del of_all["state"]
    for head in (0, 7):

        def own(x: torch.Tensor, head: int = head) -> torch.Tensor:
            return x[:, :, head : head + 1]

        leaves = {n: own(x).contiguous() for n, x in whole.leaves._asdict().items()
                  if x is not None}  # fmt: skip
        alone = replace(whole, leaves=whole.leaves._replace(**leaves),
                        dout=own(whole.dout).contiguous()).run(level.backend)  # fmt: skip
        del alone["state"]
        assert_same(alone, {n: own(x) for n, x in of_all.items()})


@pytest.mark.parametrize("gate", ["none", "scalar", "key", "value"])
def test_tasks_of_many_value_heads(level: Target, gate: str) -> None:
    """One small head of q: with two threads dv has tasks of its own, with one it has not."""
    case = LinearCase(time=70, heads=1, value_heads=4, key_dim=8, value_dim=4, gate=gate)
    inputs, threads = linear_inputs(case), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(inputs.run(level.backend))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[0], found[1])
