"""Reads and writes stay inside tensors: fences, guard pages, int64 offsets, poison, no leaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.cases import FlashCase, FlashInputs, Target
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.poison import (
    FENCE,
    Fenced,
    far_view,
    fenced,
    guarded,
    lazy,
    poisoned_memory,
)

CASES = [
    FlashCase(seqlen_q=37, seqlen_k=61, heads_q=4, heads_k=2, head_dim=24, causal=True,
              alibi="batch", sinks="normal", softcap=9.0),
    FlashCase(seqlen_q=1, seqlen_k=61, heads_q=4, heads_k=1, head_dim=40, v_head_dim=8),
    FlashCase(seqlen_q=3, seqlen_k=2300, heads_q=3, heads_k=1, head_dim=8, used=(2300, 1)),
    FlashCase(batch=1, seqlen_q=129, seqlen_k=131, head_dim=72, v_head_dim=80, window=(17, 3)),
    FlashCase(lengths=((5, 9), (0, 3), (70, 33), (1, 1)), causal=True, used=(9, 0, 20, 1)),
    FlashCase(batch=1, seqlen_q=1, seqlen_k=1, heads_q=1, heads_k=1, head_dim=8),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]


def of_dtype(case: FlashCase, dtype: torch.dtype) -> FlashInputs:
    from dataclasses import replace

    return replace(case, dtype=dtype).make()


def relocated(inputs: FlashInputs, move: Any) -> FlashInputs:
    """Every tensor of a call, index tensors included, through ``move``."""
    options = {n: move(x) if isinstance(x, Tensor) else x for n, x in inputs.options.items()}
    tensors = {n: move(getattr(inputs, n)) for n in ("q", "k", "v", "dout", "dlse")}
    return inputs.with_(**tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("margin", [FENCE, FENCE + 1])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_fenced_inputs(target: Target, case: FlashCase, margin: int, dtype: torch.dtype) -> None:
    # check 57: NaN (or -1) on either side of every input; margins unchanged, results the same
    inputs = of_dtype(case, dtype)
    fences: list[Fenced] = []

    def move(x: Tensor) -> Tensor:
        fences.append(fenced(x, margin))
        return fences[-1].tensor

    moved = relocated(inputs, move)
    assert_same(
        moved.run(target.backend), inputs.run(target.backend), inputs.context, exact=target.exact
    )
    assert_same(moved.forward(target.backend), inputs.forward(target.backend), exact=target.exact)
    assert all(f.intact() for f in fences)


def native(inputs: FlashInputs, make: Any, num_splits: int = 0) -> dict[str, Tensor]:
    """Forward, backward and decode by the native operators, into memory from ``make``."""
    ops = torch.ops.attnforge_native
    q, k, v, o = inputs.q, inputs.k, inputs.v, inputs.options
    varlen = "cu_seqlens_q" in o
    used, alibi, sinks = (o.get(n) for n in ("seqused_k", "alibi_slopes", "sinks"))
    left, right = o["window_size"]
    right = 0 if o["causal"] else right
    scores = (q.shape[-1] ** -0.5, left, right, o["softcap"], [], "softmax", 0.0, False)
    sizes = (q.shape[0], k.shape[0]) if varlen else (q.shape[1], k.shape[1])
    index = (o.get("cu_seqlens_q"), o.get("cu_seqlens_k"), used, alibi, sinks)
    shape, stat = (*q.shape[:-1], v.shape[-1]), (*q.shape[:-3], q.shape[-2], q.shape[-3])
    found = {"out": make(shape, q.dtype), "lse": make(stat, torch.float32)}
    low = make(shape, q.dtype) if q.dtype != torch.float32 else None
    ops.flash_fwd(q, k, v, *index, found["out"], found["lse"], low, *sizes, *scores, [])
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        found[name] = make(tuple(x.shape), x.dtype)
    found["delta"] = make(stat, torch.float32)
    grads = (found["dq"], found["dk"], found["dv"], found["delta"])
    ops.flash_bwd(inputs.dout, inputs.dlse, q, k, v, found["out"], found["lse"], low, *index,
                  *grads, *sizes, *scores, [])  # fmt: skip
    if not varlen:
        found["decoded"] = make(shape, q.dtype)
        found["decoded_lse"] = make(stat, torch.float32)
        ops.flash_decode(q, k, v, used, alibi, sinks, found["decoded"], found["decoded_lse"],
                         *scores, num_splits, [])  # fmt: skip
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_fenced_outputs(level: Target, case: FlashCase, dtype: torch.dtype) -> None:
    # checks 54, 57: outputs inside NaN margins, pre-filled with NaN; all written, nothing beside
    inputs = of_dtype(case, dtype)
    buffers: list[Tensor] = []

    def make(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        size = int(torch.Size(shape).numel())
        buffers.append(torch.full((size + 2 * FENCE,), float("nan"), dtype=kind))
        return buffers[-1][FENCE : FENCE + size].view(shape)

    found = native(inputs, make, num_splits=3)
    for buffer in buffers:
        assert buffer[:FENCE].isnan().all()
        assert buffer[-FENCE:].isnan().all()
    found = {n: x.clone() for n, x in found.items()}
    found.pop("delta")
    decoded = {n: found.pop("decoded" + s) for n, s in (("out", ""), ("lse", "_lse"))
               if "decoded" + s in found}  # fmt: skip
    want = inputs.truth()
    compare(found, want, inputs.context).check()
    compare(decoded, want, inputs.context).check()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dim", [8, 3])
def test_fenced_merge(level: Target, n: int, dim: int) -> None:
    # check 57
    outs, lses = torch.randn(n, 2, 5, 3, dim), torch.randn(n, 2, 3, 5)
    want = attnforge.merge_states(list(outs), list(lses), backend="reference")
    moved = [fenced(outs), fenced(lses), fenced(want[0] * torch.nan), fenced(want[1] * torch.nan)]
    torch.ops.attnforge_native.merge_states(*(f.tensor for f in moved))
    for f in moved:
        assert f.buffer[:FENCE].isnan().all()
        assert f.buffer[-FENCE:].isnan().all()
    torch.testing.assert_close(moved[2].tensor, want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved[3].tensor, want[1], rtol=1e-5, atol=1e-6)


def guard_everything(isa: str) -> None:
    """Body of the subprocess of ``test_guard_pages``."""
    from attnforge import _native

    _native.isa(isa)
    torch.set_num_threads(2)
    for dtype in DTYPES:
        for n, case in enumerate(CASES):
            inputs = of_dtype(case, dtype)
            for side in ("end", "start"):
                print(isa, dtype, n, side, flush=True)
                moved = relocated(inputs, lambda x, side=side: guarded(x, side))
                moved.run("cpu")
                moved.forward("cpu")
                native(
                    moved, lambda s, kind, side=side: guarded(torch.full(s, 7, dtype=kind), side)
                )
    states = [guarded(x) for x in (torch.randn(3, 2, 5, 3, 8), torch.randn(3, 2, 3, 5),
                                   torch.randn(2, 5, 3, 8), torch.randn(2, 3, 5))]  # fmt: skip
    torch.ops.attnforge_native.merge_states(*states)
    print("all inside", flush=True)


def in_subprocess(function: str, *args: str, timeout: float = 300) -> str:
    """Run a function of this file in a new process and return what it printed."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('memory', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module.{function}(*{args!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True, text=True, timeout=timeout, check=False,
        env={**_environment(), "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.returncode == 0, (
        f"exit {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def _environment() -> dict[str, str]:
    import os

    source = str(Path(attnforge.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def test_guard_pages(level: Target) -> None:
    # check 58: every input and output ends (and starts) at an unmapped page; else SIGSEGV
    assert in_subprocess("guard_everything", level.isa).endswith("all inside\n")


def test_a_guard_page_bites() -> None:
    # the tool itself: one element past the end kills the process
    code = (
        "import torch; from attnforge.testing.poison import guarded\n"
        "x = guarded(torch.ones(1000)); assert x.sum() == 1000\n"
        "import ctypes; ctypes.string_at(x.data_ptr() + 4000, 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, check=False
    )
    assert done.returncode == -11, done.stderr


def test_fence_reports_a_write() -> None:
    held = fenced(torch.ones(10))
    assert held.intact()
    held.buffer[FENCE + 10] = 0
    assert not held.intact()


@pytest.mark.plain_memory
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_poison_changes_nothing(target: Target, case: FlashCase) -> None:
    # checks 54, 55: outputs and workspaces that start as zeros, as garbage, as NaN / 0xFF bytes
    inputs = of_dtype(case, torch.bfloat16)
    plain = inputs.run(target.backend)
    with poisoned_memory():
        assert_same(inputs.run(target.backend), plain, "NaN")
    g = torch.Generator().manual_seed(0)
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 20):  # freed at once, to be handed out again
        torch.randn(size, generator=g)
    assert_same(inputs.run(target.backend), plain, "garbage")


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("strides", [(1 << 26, 1 << 8), (1 << 8, 1 << 32)], ids=["seq", "head"])
def test_offsets_past_2_31(target: Target, strides: tuple[int, int], rows: int) -> None:
    # checks 63, 64: element offsets up to 6e9 in q, k, v and dO, forward and backward
    inputs = FlashCase(
        batch=1, seqlen_q=rows, seqlen_k=45, dtype=torch.bfloat16, causal=True
    ).make()
    far = inputs.with_(
        **{n: far_view(getattr(inputs, n), *strides) for n in ("q", "k", "v", "dout")}
    )
    assert far.k.storage_offset() + (45 - 1) * strides[0] + strides[1] > 1 << 32
    assert_same(
        far.run(target.backend), inputs.run(target.backend), inputs.context, exact=target.exact
    )


def test_batch_offsets_past_2_31(target: Target) -> None:
    # check 64: the batch stride alone
    inputs = FlashCase(batch=3, seqlen_q=9, seqlen_k=45, dtype=torch.float16).make()

    def far(x: Tensor) -> Tensor:
        stride = (1 << 31) - 7
        view = lazy(2 * stride + x[0].numel(), x.dtype).as_strided(
            x.shape, (stride, *x[0].stride())
        )
        view.copy_(x)
        return view

    moved = inputs.with_(**{n: far(getattr(inputs, n)) for n in ("q", "k", "v", "dout")})
    assert_same(moved.run(target.backend), inputs.run(target.backend), exact=target.exact)


def test_decode_cache_past_2_31(target: Target) -> None:
    # check 63: a cache of 2^33 elements of which little is used; rows of packed keys far inside
    inputs = FlashCase(batch=2, seqlen_q=1, seqlen_k=60, heads_q=2, heads_k=1, decode=True,
                       causal=True, used=(60, 33), dtype=torch.bfloat16).make()  # fmt: skip
    capacity = 1 << 28

    def far(x: Tensor) -> Tensor:
        view = lazy(2 * capacity * 16, x.dtype).view(2, capacity, 1, 16)
        view[:, :60] = x
        return view

    moved = inputs.with_(k=far(inputs.k), v=far(inputs.v))
    assert moved.k.numel() > 1 << 32
    assert_same(moved.forward(target.backend), inputs.forward(target.backend), exact=target.exact)


def peak_of_long_sequence(dtype: str) -> None:
    """Body of the subprocess of ``test_memory_is_linear``: prints MiB above inputs and outputs."""
    import resource

    torch.set_num_threads(2)
    rows, dim = 65536, 16
    warm = torch.randn(1, 300, 1, dim, requires_grad=True)
    attnforge.flash_attention(warm, warm, warm, causal=True, backend="cpu").sum().backward()
    kind = getattr(torch, dtype)
    # Inputs and the four results, touched, so that they are part of the baseline.
    q, k, v, dout, *results = (torch.randn(1, rows, 1, dim).to(kind) for _ in range(8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del results
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    attnforge.flash_attention(q, k, v, causal=True, backend="cpu").backward(dout)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.slow
def test_memory_is_linear(cpu: str) -> None:
    # S = 65536, one head: the matrix of logits alone would be 16 GiB
    assert float(in_subprocess("peak_of_long_sequence", "bfloat16", timeout=600)) < 1024


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_resident_memory_is_flat(backend: str) -> None:
    # section 7: no leak over 1000 calls with gradients
    inputs = FlashCase(batch=1, seqlen_q=9, seqlen_k=20, sinks="normal", causal=True).make()
    for _ in range(200):
        inputs.run(backend)
    before = _resident()
    for _ in range(1000):
        inputs.run(backend)
    assert _resident() - before < 8 << 20
