"""Kernels compiled at run time, with functions of a user's: values, under the host emulator.

The source that NVRTC gets is compiled by the host compiler, and called with the bytes that a GPU
would get. What NVRTC makes of it is in ``test_jit_compile.py``.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge import jit
from attnforge.backends import _selftest
from attnforge.backends.jit import _cubins, flash
from attnforge.backends.jit._selftest import JIT
from attnforge.backends.jit._source import Program
from attnforge.registry.predicates import Arch, Available, Device
from attnforge.registry.spec import unregister
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulate_plain"  # the one of test_emulator.py
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Snippets may use the mathematical functions that CUDA has; a launch gives its report, or null.
BEFORE = "#include <math.h>\n#include <stdlib.h>\n#include <string>\n"
AFTER = """
extern "C" const char* emulated_launch(unsigned blocks,
                                       const attnforge::cuda::jit::Case::Call* call) {
  using attnforge::cuda::jit::Case;
  static std::string report;
  try {
    ATTNFORGE_LAUNCH((attnforge::cuda::jit::kernel<Case, Case::kRows, Case::kThreads,
                                                   Case::kShared>),
                     dim3(blocks), dim3(Case::kThreads), Case::kShared, nullptr, *call);
    return nullptr;
  } catch (const std::exception& error) {
    report = error.what();
    return report.c_str();
  }
}
"""


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@cache
def emulator() -> Path:
    """The emulator as a static library."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make = f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"
        _run(_tool("cmake"), "-S", CSRC / "emulate", "-B", BUILD, "-G", "Ninja", make)
        _run(_tool("ninja"), "-C", BUILD, "attnforge_emulate")
    return BUILD / "libattnforge_emulate.a"


class Emulated:
    """A program by the host compiler: the same interface as ``_load.Kernel``."""

    def __init__(self, library: Path) -> None:
        shape = _cubins.shape_of(library.read_bytes())
        assert shape is not None
        self.shape = shape
        self._launch = ctypes.CDLL(str(library)).emulated_launch
        self._launch.restype = ctypes.c_char_p

    def launch(self, blocks: int, call: ctypes.Structure, stream: int) -> None:
        assert stream == 0
        report = self._launch(blocks, ctypes.byref(call))
        if report is not None:
            raise RuntimeError(report.decode())


@cache
def load(program: Program, device: torch.device) -> Emulated:
    """Compiled where neither the source nor a header is newer."""
    source, archive = BEFORE + program.source() + AFTER, emulator()
    folder = ROOT / "build" / "emulate_jit"
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime_ns for path in (archive, *CSRC.rglob("*.h")))
    key = hashlib.sha256(f"{newest}{source}".encode()).hexdigest()[:32]
    library = folder / f"{key}.so"
    if not library.exists():
        text, made = folder / f"{key}.{os.getpid()}.cpp", folder / f"{key}.{os.getpid()}.so"
        text.write_text(source)
        _run(
            *("c++", "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-psabi", "-w"),
            *("-ftrivial-auto-var-init=pattern", "-DATTNFORGE_EMULATE=1", f"-I{CSRC}"),
            *(f"-I{CSRC / 'include'}", f"-I{CSRC / 'emulate' / 'include'}", "-Wl,-Bsymbolic"),
            *(text, "-x", "none", archive, "-o", made),
        )
        made.rename(library)
        text.unlink()
    return Emulated(library)


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    """The backend ``jit_emulated``: specs, launchers and requirements of ``jit``, on the CPU."""
    patch = pytest.MonkeyPatch()
    patch.setattr(flash, "_load_kernel", load)
    specs = []
    for spec in flash.SPECS:
        needs = (n for n in spec.requires if not isinstance(n, (Device, Arch, Available)))
        name = spec.id.replace("jit.", "jit_emulated.")
        twin = replace(spec, id=name, backend="jit_emulated", score=-1.0,
                       requires=(Device("cpu"), *needs))  # fmt: skip
        specs.append(attnforge.register(twin))
    yield
    for spec in specs:
        unregister(spec.id)
    patch.undo()


SIGNATURE = "float score(float s, const Place& at, const Aux& aux)"
ALIBI = SIGNATURE + " {\n  return s - aux.slopes(at.head) * abs(at.position - at.key);\n}"
SOFTCAP = SIGNATURE + " {\n  return aux.cap * tanhf(s / aux.cap);\n}"
WINDOW = (
    "bool mask(const Place& at, const Aux& aux) {\n"
    "  return at.key >= at.position - aux.left && at.key <= at.position + aux.right;\n}"
)


def check(case: FlashCase, **own: Any) -> None:
    """A case by functions of its own (``own``) in place of features, held to its truth.

    A feature that ``own`` names as None is left to the functions.
    """
    inputs = case.make()
    more = {"num_splits": own.pop("num_splits")} if "num_splits" in own else {}
    kept = {name: x for name, x in inputs.options.items() if name not in own}
    given = {name: x for name, x in own.items() if x is not None}
    got = replace(inputs, options={**kept, **given, **more}).forward("jit_emulated")
    compare(got, inputs.truth(False, rounded=True), inputs.context).check()


def alibi(case: FlashCase) -> jit.Mod:
    return jit.score_mod(ALIBI, {"slopes": case.make().options["alibi_slopes"]})


GQA: dict[str, Any] = {"batch": 2, "heads_q": 4, "heads_k": 2, "head_dim": 32, "dtype": BF16}
FORWARDS = {
    "causal": {"seqlen_q": 40, "seqlen_k": 71, "causal": True},
    "full": {"seqlen_q": 150, "seqlen_k": 33, "batch": 1},
    "packed": {"lengths": ((5, 5), (0, 3), (3, 0), (41, 70)), "causal": True},
    "used": {"seqlen_q": 9, "seqlen_k": 70, "used": (0, 61), "causal": True, "sinks": "normal"},
}


@pytest.mark.parametrize("name", FORWARDS)
def test_alibi_is_the_built_in_one(name: str) -> None:
    case = FlashCase(alibi="head", **{**GQA, **FORWARDS[name]})
    check(case, alibi_slopes=None, score_mod=alibi(case))


@pytest.mark.parametrize("name", FORWARDS)
def test_softcap_is_the_built_in_one(name: str) -> None:
    case = FlashCase(softcap=6.0, spread=3.0, **{**GQA, "dtype": FP32, **FORWARDS[name]})
    check(case, softcap=None, score_mod=jit.score_mod(SOFTCAP, {"cap": 6.0}))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=["one head", "group"])
def test_decode_by_functions(heads: tuple[int, int], splits: int) -> None:
    common = {"seqlen_q": 2, "seqlen_k": 200, "decode": True, "causal": True, "used": (200, 77)}
    sizes = {"heads_q": heads[0], "heads_k": heads[1]}
    case = FlashCase(alibi="head", **{**GQA, **sizes, **common})
    check(case, alibi_slopes=None, score_mod=alibi(case), num_splits=splits)
    case = FlashCase(softcap=6.0, spread=3.0, **{**GQA, **sizes, **common})
    mod = jit.score_mod(SOFTCAP, {"cap": 6.0})
    check(case, softcap=None, score_mod=mod, num_splits=splits)


def test_many_rows_of_a_decode_take_the_forward() -> None:
    case = FlashCase(alibi="head", decode=True, causal=True,
                     **{**GQA, "seqlen_q": 9, "seqlen_k": 150})  # fmt: skip
    check(case, alibi_slopes=None, score_mod=alibi(case), num_splits=2)


def test_a_function_follows_the_built_in_features() -> None:
    """Softcap is the call's, ALiBi the user's: the order is that of the built-in ones."""
    case = FlashCase(softcap=4.0, alibi="head", spread=3.0, **GQA)
    check(case, alibi_slopes=None, score_mod=alibi(case))


@given(
    rows=st.integers(1, 70), keys=st.integers(1, 90), left=st.integers(-1, 80),
    right=st.integers(-1, 40), causal=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None, derandomize=True)
def test_masks(rows: int, keys: int, left: int, right: int, causal: bool) -> None:
    """A window by a mask, whose numbers change and whose kernel does not."""
    case = FlashCase(seqlen_q=rows, seqlen_k=keys, window=(left, right), causal=causal,
                     **{**GQA, "batch": 1})  # fmt: skip
    far = {"left": left if left >= 0 else 1 << 20, "right": right if right >= 0 else 1 << 20}
    check(case, window_size=None, mask_mod=jit.mask_mod(WINDOW, far))


def test_values_behind_a_mask_are_not_read() -> None:
    """NaN in V at keys that a mask hides from all rows, in the middle of whole tiles."""
    inputs = FlashCase(**{**GQA, "seqlen_q": 40, "seqlen_k": 70}).make()
    shown = torch.arange(70) % 5 != 2
    k, v = inputs.k.clone(), inputs.v.clone()
    v[:, ~shown] = float("nan")
    source = "bool mask(const Place& at, const Aux& aux) { return aux.shown(at.key); }"
    got = inputs.with_(v=v, mask_mod=jit.mask_mod(source, {"shown": shown})).forward("jit_emulated")
    want = inputs.with_(k=k[:, shown], v=v[:, shown])
    compare(got, want.truth(False, rounded=True), inputs.context).check()


def test_nothing_seen_is_zero() -> None:
    inputs = FlashCase(**{**GQA, "batch": 1}).make()
    nothing = jit.mask_mod(WINDOW, {"left": -1000, "right": 0})
    got = inputs.with_(mask_mod=nothing).forward("jit_emulated")
    assert torch.equal(got["out"], torch.zeros_like(got["out"]))
    assert torch.equal(got["lse"], torch.full_like(got["lse"], float("-inf")))


TABLES = SIGNATURE + (
    " {\n  return s + aux.bias(at.batch, at.head, at.query, at.key) + aux.half(at.query, at.key) +"
    "\n         aux.step(at.key) + (aux.on(at.head) ? aux.n : 0);\n}"
)


def tables(bias: torch.Tensor, rows: int, keys: int) -> tuple[jit.Mod, torch.Tensor]:
    """16-bit, integer and boolean tensors with strides of their own; the bias they add up to."""
    g = torch.Generator().manual_seed(5)
    half = torch.randn(keys, rows, generator=g).to(FP16).t()
    step = torch.randint(-3, 4, (2 * keys,), generator=g, dtype=torch.int32)[::2]
    on = torch.rand(4, generator=g) < 0.5
    mod = jit.score_mod(TABLES, {"bias": bias, "half": half, "step": step, "on": on, "n": 2})
    return mod, bias + half.float() + step + torch.where(on, 2.0, 0.0).view(1, 4, 1, 1)


def test_functions_see_existing_places_only() -> None:
    """Tables exactly as large as the call, between guards that make a read outside show."""
    case = FlashCase(seqlen_q=9, seqlen_k=37, causal=True, **{**GQA, "dtype": FP32})
    inputs = case.make()
    bias = torch.randn(2, 4, 9, 37, generator=torch.Generator().manual_seed(3))
    room = torch.full((bias.numel() + 4096,), float("nan"))
    room[2048:-2048] = bias.flatten()
    mod, whole = tables(room[2048:-2048].view(bias.shape), 9, 37)
    got = inputs.with_(score_mod=mod).forward("jit_emulated")
    want = inputs.with_(bias=whole).truth(False, rounded=True)
    compare(got, want, inputs.context).check()


@pytest.mark.parametrize(
    ("d", "dv", "dtype", "decode"),
    [(80, 80, BF16, False), (80, 80, BF16, True), (112, 48, FP16, False), (160, 160, FP32, True)],
)
def test_head_dims_of_their_own(d: int, dv: int, dtype: torch.dtype, decode: bool) -> None:
    """Sizes that the library pads; rows of 80 and 112 are an odd multiple of 32 bytes."""
    sizes: dict[str, Any] = {"head_dim": d, "v_head_dim": dv, "dtype": dtype, "decode": decode}
    lengths = {"seqlen_q": 2, "seqlen_k": 150} if decode else {"seqlen_q": 37, "seqlen_k": 71}
    check(FlashCase(batch=1, heads_q=2, heads_k=1, causal=True, **sizes, **lengths))


def test_vmap_runs_slices() -> None:
    """Places are those of a slice: batches do not run together."""
    inputs = FlashCase(**{**GQA, "seqlen_q": 9, "seqlen_k": 20, "dtype": FP32}).make()
    mod, _ = tables(torch.randn(1, 4, 9, 20, generator=torch.Generator().manual_seed(1)), 9, 20)

    def one(q: Any, k: Any, v: Any) -> Any:
        tensors = (x.unsqueeze(0) for x in (q, k, v))
        return attnforge.flash_attention(*tensors, score_mod=mod, backend="jit_emulated")[0]

    with torch.no_grad():
        got = torch.vmap(one)(inputs.q, inputs.k, inputs.v)
        each = [one(*parts) for parts in zip(inputs.q, inputs.k, inputs.v, strict=True)]
    assert torch.equal(got, torch.stack(each))


@pytest.mark.parametrize("kind", ["fwd", "decode"])
def test_right_kernels_pass_the_self_test(kind: str) -> None:
    assert _selftest.check(JIT, f"flash.{kind}", "", FP16, torch.device("cpu")) is None
