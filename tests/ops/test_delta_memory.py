"""Memory of the delta rules and the scan: nothing outside the tensors, little beside them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import _native
from attnforge.testing.delta import DeltaCase
from attnforge.testing.poison import Fenced, fenced


def fenced_like(*tensors: Tensor) -> list[Fenced]:
    """Copies between margins of NaN, at addresses that no vector is aligned to."""
    return [fenced(x, 511) for x in tensors]


def check_margins(op: str, inputs: list[Fenced], outputs: list[Fenced], *, end: int = 511) -> None:
    for x in inputs:
        assert x.intact(), f"{op} wrote into an input"
    for x in outputs:
        margins = (x.buffer[:end], x.buffer[-end:])
        assert all(bool(m.isnan().all()) for m in margins), f"{op} wrote past an output"
        assert bool(x.tensor.isfinite().all()), f"{op} left an output unwritten or read a margin"


@pytest.mark.parametrize("gate", ["none", "scalar", "key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_chunks_stay_inside(cpu: str, gate: str, dtype: torch.dtype) -> None:
    case = DeltaCase(time=70, heads=2, key_dim=33, value_dim=41, gate=gate, dtype=dtype)
    x = case.make()
    assert x.initial_state is not None
    given = (x.q, x.k, x.v, x.g, x.beta, x.initial_state, x.dout, x.dstate)
    inputs = {n: fenced(y, 511) for n, y in zip("qkvgbsot", given, strict=True) if y is not None}
    t = {n: y.tensor for n, y in inputs.items()}
    operands = (t["q"], t["k"], t["v"], t.get("g"), t["b"], t["s"], None, 0.2)
    nan = [torch.full_like(y, torch.nan) for y in (x.v, x.initial_state)]
    outputs = fenced_like(*nan)
    _native.operator("delta_chunk_fwd")(*operands, *(y.tensor for y in outputs))
    check_margins("delta_chunk_fwd", list(inputs.values()), outputs)
    like = [x.q, x.k, x.v, *([] if x.g is None else [x.g]), x.beta, x.initial_state]
    outputs = fenced_like(*(torch.full_like(y, torch.nan) for y in like))
    grads = [y.tensor for y in outputs]
    if x.g is None:
        grads.insert(3, torch.empty(0))
    _native.operator("delta_chunk_bwd")(t["o"], t["t"], *operands, *grads)
    check_margins("delta_chunk_bwd", list(inputs.values()), outputs)


def test_steps_and_scans_stay_inside(cpu: str) -> None:
    x = DeltaCase(time=1, batch=2, heads=2, key_dim=33, value_dim=41).make()
    inputs = fenced_like(x.q, x.k, x.v, x.beta)
    states = fenced(torch.randn(3, 2, 33, 41), 511)
    slots, out = torch.tensor([2, 0], dtype=torch.int32), fenced(torch.full_like(x.v, torch.nan))
    q, k, v, beta = (y.tensor for y in inputs)
    _native.operator("delta_step")(q, k, v, None, beta, states.tensor, slots, 1.0, out.tensor)
    check_margins("delta_step", inputs, [states, out])
    y, state = torch.randn(1, 40, 75), torch.randn(1, 75)
    inputs = fenced_like(y, -y.abs(), state)
    outputs = fenced_like(torch.full_like(y, torch.nan), torch.full_like(state, torch.nan))
    scan = (*(z.tensor for z in inputs), None)
    _native.operator("diag_scan_fwd")(*scan, *(z.tensor for z in outputs))
    check_margins("diag_scan_fwd", inputs, outputs)
    outputs = fenced_like(*(torch.full_like(z, torch.nan) for z in (y, y, state)))
    grads = [z.tensor for z in outputs]
    _native.operator("diag_scan_bwd")(y, state, *scan, *grads)
    check_margins("diag_scan_bwd", inputs, outputs)


def peak_over_inputs() -> None:
    """Body of a subprocess: prints the memory that forward and backward add, over the inputs'."""
    torch.set_num_threads(2)
    small = DeltaCase(time=200, value_dim=64, key_dim=64).make()
    small.run("cpu")
    leaves = [torch.randn(1, 16384, 4, 64).requires_grad_() for _ in range(3)]
    g, beta = (-torch.rand(1, 16384, 4)).requires_grad_(), torch.rand(1, 16384, 4)
    with torch.no_grad():
        leaves[1].div_(leaves[1].norm(dim=-1, keepdim=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, _ = attnforge.gated_delta_rule(*leaves, g, beta, backend="cpu")
    out.backward(out.detach())
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(added * 1024 / sum(x.numel() * x.element_size() for x in leaves))


def test_memory_of_a_backward(cpu: str) -> None:
    # Output (1/3), gradients (1) and a few states: no state of a chunk is kept.
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('memory', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.peak_over_inputs()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert float(done.stdout) < 2.0
