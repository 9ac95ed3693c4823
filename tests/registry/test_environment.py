"""Choices from outside the call: environment variables, plugins, ISA levels, a missing library."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import _native
from attnforge.registry import Request, select, unregister
from attnforge.registry import spec as table
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare

CODE = """
import torch, attnforge
q = torch.randn(1, 4, 2, 8)
for fn, args in ((attnforge.flash_attention, (q, q, q)), (attnforge.flash_decode, (q, q, q))):
    for d in attnforge.explain(fn, *args).decisions:
        print(d.request.op, d.chosen and d.chosen.backend, d.source)
    fn(*args)
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(attnforge.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source, **env},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("value", "backends", "source"),
    [
        ("", ["cpu"] * 3, "score"),
        ("reference", ["reference"] * 3, "ATTNFORGE_BACKEND"),
        (" flash_bwd = reference , * = cpu ", ["cpu", "reference", "cpu"], "ATTNFORGE_BACKEND"),
    ],
)
def test_variable_in_a_new_process(value: str, backends: list[str], source: str) -> None:
    done = python(CODE, ATTNFORGE_BACKEND=value)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["flash_fwd", "flash_bwd", "flash_decode"]
    assert [line[1] for line in lines] == backends
    assert {line[2] for line in lines} == {source}


MALFORMED = ["cpu,cpu", "=cpu", "flash_fwd=", ",", "flash_fwd=cpu,flash_fwd=cpu", "*=cpu,cpu"]


@pytest.mark.parametrize("value", MALFORMED)
def test_malformed_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ATTNFORGE_BACKEND", value)
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"ATTNFORGE_BACKEND.*is no kernel choice"):
        attnforge.flash_attention(q, q, q)
    with pytest.raises(ValueError, match="is no kernel choice"):
        attnforge.backend(value)


def test_variable_that_names_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFORGE_BACKEND", "flash_forward=cpu")
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"names flash_forward; want operators of .*flash_fwd"):
        attnforge.flash_attention(q, q, q)


def test_kernel_id_as_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    # an id forces its own operator and leaves the others to the score
    monkeypatch.setenv("ATTNFORGE_BACKEND", "reference.flash.fwd")
    q = torch.randn(1, 4, 2, 8)
    fwd, bwd = attnforge.explain(attnforge.flash_attention, q, q, q).decisions
    assert fwd.chosen is not None
    assert fwd.chosen.id == "reference.flash.fwd"
    assert fwd.source == "ATTNFORGE_BACKEND"
    assert bwd.source == "score"


@pytest.mark.parametrize(
    "level", ["baseline", "avx2", "avx512", "amx", "avx512_soft", "amx_soft", "auto"]
)
def test_isa_variable(level: str) -> None:
    code = "from attnforge import _native; print(_native.isa())"
    if reason := _native.unavailable():
        pytest.skip(reason)
    levels = _native.isa_levels()
    done = python(code, ATTNFORGE_CPU_ISA=level)
    if level == "auto":
        assert done.stdout.strip() == levels[-1]
    elif level in levels:
        assert done.stdout.strip() == level, done.stderr
    else:  # refused, with the levels that do run
        assert done.returncode != 0
        assert f"{level!r}, which cannot run here" in done.stderr


@pytest.mark.usefixtures("cpu")
def test_unknown_isa_is_refused_at_the_call() -> None:
    done = python("import torch, attnforge; q = torch.randn(1, 4, 2, 8)\n"
                  "attnforge.flash_attention(q, q, q)", ATTNFORGE_CPU_ISA="sse9")  # fmt: skip
    assert done.returncode != 0
    assert "ValueError: attnforge: ATTNFORGE_CPU_ISA is 'sse9'; want one of auto" in done.stderr
    with pytest.raises(RuntimeError, match="ISA level 'sse9' is unknown"):
        torch.ops.attnforge_native.cpu_isa("sse9")


def test_without_the_native_library() -> None:
    # the pure-Python part alone: the reference serves, a forced cpu says what is missing
    code = (
        "import pathlib, torch, attnforge\n"
        "from attnforge import _native\n"
        "_native.library_path = lambda: pathlib.Path('/nowhere/libattnforge_cpu.so')\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "print(attnforge.explain(attnforge.flash_attention, q, q, q).chosen.backend)\n"
        "attnforge.flash_attention(q, q, q)\n"
        "try:\n    attnforge.flash_attention(q, q, q, backend='cpu')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("\n")
    assert first == "reference"
    assert "libattnforge_cpu.so is not built; install a C++20 compiler" in second


def test_import_does_not_load_native_code() -> None:
    code = (
        "import attnforge, torch, sys\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libattnforge_cpu' not in maps\n"
        "assert 'attnforge.reference.flash' not in sys.modules\n"
        "assert torch.are_deterministic_algorithms_enabled() is False\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def answers(value: float) -> Callable[..., None]:
    def launch(q: Tensor, k: Tensor, v: Tensor, p: Any, out: Tensor, lse: Tensor, _: Any) -> None:
        out.fill_(value)
        lse.zero_()

    return launch


def spec(name: str, value: float, **fields: Any) -> attnforge.KernelSpec:
    return attnforge.KernelSpec(
        id=f"{name}.flash.fwd", op="flash_fwd", backend=name, launch=answers(value), **fields
    )


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install plugins as entry points would; what they registered is removed afterwards."""
    before = {s.id for s in attnforge.list_kernels()}

    def install(**points: Any) -> None:
        def find(group: str) -> list[Any]:
            assert group == "attnforge.kernels"
            return [
                SimpleNamespace(name=n, value=f"{n}:x", load=load) for n, load in points.items()
            ]

        monkeypatch.setattr(importlib.metadata, "entry_points", find)
        monkeypatch.setattr(table._TABLE, "plugins_read", False)

    yield install
    for found in attnforge.list_kernels():
        if found.id not in before:
            unregister(found.id)


def test_plugins(entry_points: Callable[..., None]) -> None:
    # a spec, an iterable, a function; a broken one warns and takes nothing with it
    def broken() -> Any:
        raise ImportError("no such module")

    entry_points(
        one=lambda: spec("one", 1.0), some=lambda: [spec("two", 2.0), spec("three", 3.0)],
        function=lambda: lambda: spec("four", 4.0), broken=broken, wrong=lambda: ["text"],
    )  # fmt: skip
    q = torch.randn(1, 4, 2, 8)
    with pytest.warns(RuntimeWarning) as caught:
        attnforge.list_kernels()
    texts = [str(w.message) for w in caught]
    assert any("'broken'" in t and "no such module" in t for t in texts)
    assert any("'wrong'" in t and "want KernelSpec, got str" in t for t in texts)
    for name, value in (("one", 1), ("two", 2), ("three", 3), ("four", 4)):
        assert (attnforge.flash_attention(q, q, q, backend=name) == value).all()


def test_ties_and_replacement() -> None:
    q = torch.randn(1, 4, 2, 8)
    try:
        for name in ("zeta", "alpha"):
            attnforge.register(spec(name, 1.0, score=1e6))
        assert attnforge.explain(attnforge.flash_attention, q, q, q).chosen.id == "alpha.flash.fwd"  # type: ignore[union-attr]
        assert (attnforge.flash_attention(q, q, q) == 1).all()
        attnforge.register(spec("alpha", 5.0, score=1e6), replace=True)
        assert (attnforge.flash_attention(q, q, q) == 5).all()  # the memo is not stale
    finally:
        unregister("zeta.flash.fwd")
        unregister("alpha.flash.fwd")
    assert not (attnforge.flash_attention(q, q, q) == 5).any()


def test_register_refuses_what_is_no_spec() -> None:
    with pytest.raises(TypeError, match=r"attnforge\.register: want a KernelSpec; got str"):
        attnforge.register("cpu.flash.fwd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no kernel has the id 'nobody'"):
        unregister("nobody")
    with pytest.raises(TypeError, match=r"name must be a string or None; got int"):
        attnforge.backend(3)  # type: ignore[arg-type]


def test_a_new_kernel_is_held_to_the_same_bounds() -> None:
    # a kernel added by its spec alone runs through the shipped cases; a wrong one fails there
    good = next(s for s in attnforge.list_kernels("flash_fwd") if s.backend == "reference")
    inputs = FlashCase(seqlen_q=20, seqlen_k=30, causal=True).make()
    attnforge.register(replace(good, id="copy.flash.fwd", backend="copy"))
    attnforge.register(spec("seven", 7.0))
    try:
        compare(inputs.forward("copy"), inputs.truth(grad=False)).check()
        with pytest.raises(AssertionError, match="of the bound"):
            compare(inputs.forward("seven"), inputs.truth(grad=False)).check()
    finally:
        unregister("copy.flash.fwd")
        unregister("seven.flash.fwd")


def test_memo_is_bounded() -> None:
    request = Request("flash_fwd", "cpu", "", torch.float32)
    for n in range(select._MEMO_LIMIT + 10):
        select.launcher("flash_fwd", ("probe", n), lambda op, meta: request, "reference")
    assert len(select._MEMO) <= select._MEMO_LIMIT


def test_debug_switch() -> None:
    from attnforge.registry import override

    before = override.checks
    with attnforge.debug(checks=True):
        assert override.checks
        with attnforge.debug(checks=False):
            assert not override.checks
        assert override.checks
    assert override.checks == before
    done = python(
        "from attnforge.registry import override; print(override.checks)", ATTNFORGE_DEBUG="1"
    )
    assert done.stdout == "True\n", done.stderr
