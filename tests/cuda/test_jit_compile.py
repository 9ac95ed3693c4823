"""Kernels compiled at run time: NVRTC, its cache and its errors. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnforge
from attnforge import jit
from attnforge.backends.jit import _cubins, _headers, _load, _nvrtc, flash
from attnforge.backends.jit._source import Program, pack_mod

ROOT = Path(__file__).resolve().parents[2]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
nvrtc = pytest.mark.skipif(
    _nvrtc.library_path() is None, reason="NVRTC is not installed: no source was compiled"
)

SIGNATURE = "float score(float s, const Place& at, const Aux& aux)"
ALIBI = jit.score_mod(
    SIGNATURE + " { return s - aux.slopes(at.head) * abs(at.position - at.key); }",
    {"slopes": torch.ones(4)},
)
SOFTCAP = jit.score_mod(SIGNATURE + " { return aux.cap * tanhf(s / aux.cap); }", {"cap": 5.0})
BIAS = jit.score_mod(
    SIGNATURE + " { return s + aux.bias(at.batch, at.head, at.query, at.key); }",
    {"bias": torch.zeros(1, 1, 1, 1, dtype=BF16)},
)
DOCUMENTS = jit.mask_mod(
    "bool mask(const Place& at, const Aux& aux)"
    " { return aux.ids(at.batch, at.position) == aux.ids(at.batch, at.key); }",
    {"ids": torch.zeros(1, 1, dtype=torch.int64)},
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of cubins."""
    monkeypatch.setenv("ATTNFORGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jit"


def program(kind: str, dtype: torch.dtype, dim: int, *mods: jit.Mod) -> Program:
    signatures = tuple(mod.signature for mod in mods)
    return Program(kind, dtype, dim, dim, kind == "decode", signatures)


PROGRAMS = {
    "alibi": program("fwd", BF16, 64, ALIBI),
    "softcap_decode": program("decode", FP16, 64, SOFTCAP),
    "bias_and_documents": program("fwd", FP32, 32, BIAS, DOCUMENTS),
    "head_dim_80": program("fwd", BF16, 80),
    "head_dim_160_decode": program("decode", BF16, 160),
    "merge": program("merge", BF16, 0),
}


@nvrtc
@pytest.mark.parametrize(
    ("name", "arch"),
    [*((name, "sm_80") for name in PROGRAMS), ("alibi", "sm_90"), ("softcap_decode", "sm_90")],
)
def test_compiles(name: str, arch: str, cache: Path) -> None:
    path, shape = _cubins.cubin(PROGRAMS[name], arch)
    assert path.parent == cache
    image = path.read_bytes()
    assert image[:4] == b"\x7fELF"
    assert image.count(b".text." + shape.name.encode()) >= 1
    flags = int.from_bytes(image[48:52], "little")  # e_flags: the architecture
    assert int(arch[3:]) in (flags & 0xFF, flags >> 8 & 0xFF)
    assert 0 < shape.rows <= 128
    assert shape.threads % 32 == 0
    assert shape.shared <= 99 * 1024


@nvrtc
def test_compiles_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    first = _cubins.cubin(PROGRAMS["merge"], "sm_80")
    monkeypatch.setattr(_nvrtc, "compile", lambda *_: pytest.fail("compiled again"))
    assert _cubins.cubin(PROGRAMS["merge"], "sm_80") == first
    assert sorted(path.suffix for path in cache.iterdir() if path.stat().st_size) == [".cubin"]


def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """NVRTC without its time: the sources it gets, and an image with a kernel's name."""
    seen: list[str] = []

    def compile(source: str, arch: str, headers: Any) -> bytes:
        seen.append(source)
        return b"\x7fELF _ZN9attnforge4cuda3jit6kernelINS1_4CaseELi4ELi128ELi0EEEvNT_4CallE\0"

    monkeypatch.setattr(_nvrtc, "compile", compile)
    monkeypatch.setattr(_nvrtc, "version", lambda: "13.0")
    return seen


def test_the_key_has_all_that_makes_a_cubin(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = small(monkeypatch)
    base = program("fwd", BF16, 64, ALIBI)
    path, _ = _cubins.cubin(base, "sm_80")
    other_source = jit.score_mod(ALIBI.signature.source + "\n", {"slopes": torch.ones(4)})
    other_type = jit.score_mod(ALIBI.signature.source, {"slopes": torch.ones(4).half()})
    others = {_cubins.cubin(base, "sm_90")[0]}
    for mods in ((), (other_source,), (other_type,), (ALIBI, DOCUMENTS)):
        others.add(_cubins.cubin(program("fwd", BF16, 64, *mods), "sm_80")[0])
    others.add(_cubins.cubin(program("fwd", FP16, 64, ALIBI), "sm_80")[0])
    others.add(_cubins.cubin(program("fwd", BF16, 96, ALIBI), "sm_80")[0])
    monkeypatch.setattr(_nvrtc, "version", lambda: "13.1")
    others.add(_cubins.cubin(base, "sm_80")[0])
    monkeypatch.setattr(_headers, "digest", lambda: "another header")
    others.add(_cubins.cubin(base, "sm_80")[0])
    assert path not in others
    assert len(others) == 9
    assert len(seen) == 10


def test_numbers_and_content_are_not_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = small(monkeypatch)
    for mod in (SOFTCAP, jit.score_mod(SOFTCAP.signature.source, {"cap": 7.5})):
        _cubins.cubin(program("fwd", BF16, 64, mod), "sm_80")
    for size in (4, 9):
        mod = jit.score_mod(ALIBI.signature.source, {"slopes": torch.rand(2 * size)[::2]})
        _cubins.cubin(program("fwd", BF16, 64, mod), "sm_80")
    assert len(seen) == 2


@pytest.mark.parametrize("content", [b"", b"\x7fELF of something else", b"no image"])
def test_what_is_no_cubin_is_made_again(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    seen = small(monkeypatch)
    path, shape = _cubins.cubin(PROGRAMS["merge"], "sm_80")
    path.write_bytes(content)
    assert _cubins.cubin(PROGRAMS["merge"], "sm_80") == (path, shape)
    assert len(seen) == 2


def test_a_link_is_not_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = small(monkeypatch)
    path, _ = _cubins.cubin(PROGRAMS["merge"], "sm_80")
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    _cubins.cubin(PROGRAMS["merge"], "sm_80")
    assert len(seen) == 2
    assert not path.is_symlink()


def test_a_directory_of_everybody_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    small(monkeypatch)
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(RuntimeError, match=r"everybody may write .*ATTNFORGE_CACHE_DIR"):
        _cubins.cubin(PROGRAMS["merge"], "sm_80")


def test_a_failure_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    small(monkeypatch)

    def interrupted(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(_nvrtc, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _cubins.cubin(PROGRAMS["merge"], "sm_80")
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


@nvrtc
def test_processes_compile_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Three that start together: one compiles, all get the same file."""
    code = (
        "import torch; from attnforge.backends.jit import _cubins, _nvrtc\n"
        "from attnforge.backends.jit._source import Program\n"
        "real = _nvrtc.compile\n"
        "def compile(*a): print('compiled'); return real(*a)\n"
        "_nvrtc.compile = compile\n"
        "print(_cubins.cubin(Program('merge', torch.float16), 'sm_80')[0].name)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "python"), prepend=os.pathsep)
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=600)[0].split() for process in started]
    assert [process.returncode for process in started] == [0] * 3
    assert sum(line == "compiled" for lines in printed for line in lines) == 1
    (name,) = {lines[-1] for lines in printed}
    assert _cubins.shape_of((cache / name).read_bytes()) is not None


@nvrtc
@pytest.mark.parametrize(("kind", "line"), [("score", 3), ("mask", 2)])
def test_errors_name_the_users_line(kind: str, line: int, cache: Path) -> None:
    if kind == "score":
        mod = jit.score_mod(SIGNATURE + " {\n  float x = s;\n  return x + wrong;\n}")
    else:
        mod = jit.mask_mod("bool mask(const Place& at, const Aux&) {\n  return at.wrong;\n}")
    with pytest.raises(jit.CompileError) as caught:
        _cubins.cubin(program("fwd", BF16, 64, ALIBI if kind == "mask" else mod, *(
            (mod,) if kind == "mask" else ())), "sm_80")  # fmt: skip
    message = str(caught.value)
    assert f"{kind}_mod, line {line}: " in message
    assert "wrong" in message.splitlines()[0]
    assert message.splitlines()[1] == f"{line:>5} | {mod.signature.source.splitlines()[line - 1]}"
    assert f"{kind}_mod({line}): error" in caught.value.log
    assert not list(cache.glob("*.cubin"))


@nvrtc
def test_a_wrong_signature_and_rank_are_errors() -> None:
    wrong = jit.score_mod("float score(float s) { return s; }")
    with pytest.raises(jit.CompileError, match="score"):
        _cubins.cubin(program("fwd", BF16, 64, wrong), "sm_80")
    rank = jit.score_mod(SIGNATURE + " { return aux.x(0, 0); }", {"x": torch.ones(3)})
    with pytest.raises(jit.CompileError, match="one index per dimension"):
        _cubins.cubin(program("fwd", BF16, 64, rank), "sm_80")


@nvrtc
def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(jit.CompileError, match="arch"):
        _cubins.cubin(PROGRAMS["merge"], "sm_1")


def test_aux_is_packed_as_it_is_laid_out() -> None:
    x = torch.zeros(3, 4, 2).transpose(0, 1)
    mod = jit.score_mod(SIGNATURE + " { return s; }", {"n": 7, "x": x, "f": 0.5})
    made = program("fwd", BF16, 64, mod)
    packed = pack_mod(made.mods, mod.tensors).score_aux
    assert (packed.n, packed.f) == (7, 0.5)
    assert packed.x.data == x.data_ptr()
    assert tuple(packed.x.stride) == x.stride()


def test_specs_are_listed_and_say_what_is_missing() -> None:
    found = {spec.id: spec for spec in attnforge.list_kernels() if spec.backend == "jit"}
    assert sorted(found) == ["jit.flash.decode", "jit.flash.fwd"]
    q = torch.randn(1, 4, 2, 16)
    told = attnforge.explain(attnforge.flash_attention, q, q, q, score_mod=SOFTCAP)
    assert told.chosen is None
    rejected = {spec.id: ", ".join(why) for spec, why in told.rejected}
    assert "needs tensors on cuda" in rejected["jit.flash.fwd"]
    if _load.unavailable() is not None:
        assert "attnforge[jit]" in rejected["jit.flash.fwd"]
    for name in ("reference.flash.fwd", "cpu.flash.fwd", "triton.flash.fwd", "cuda.flash.fwd.sm80"):
        assert "does not have score_mod" in rejected[name]


def test_without_a_gpu_a_call_says_so() -> None:
    q = torch.randn(1, 4, 2, 16)
    for call in (attnforge.flash_attention, attnforge.flash_decode):
        with pytest.raises(ValueError, match=r"jit\.flash\.\w+: needs tensors on cuda"):
            call(q, q, q, score_mod=SOFTCAP)
    told = attnforge.explain(attnforge.flash_attention, q, q, q, backend="jit")
    assert "it has no kernel for flash_bwd" in str(told.decisions[1].error)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _load.importlib.util.find_spec
    monkeypatch.setattr(
        _load.importlib.util, "find_spec", lambda name: None if name == "cupy" else real(name)
    )
    assert _load.unavailable() == (
        "CuPy is not installed; install the extra: pip install 'attnforge[jit]'"
    )
    monkeypatch.setattr(_nvrtc, "library_path", lambda: None)
    assert "attnforge[jit]" in str(_nvrtc.unavailable())


GRADS: dict[str, Any] = {
    "q": {},
    "aux x": {"x": torch.ones(2, requires_grad=True)},
}


@pytest.mark.parametrize("name", GRADS)
def test_gradients_are_refused(name: str) -> None:
    q = torch.randn(1, 4, 2, 16, requires_grad=name == "q")
    mod = jit.score_mod(SIGNATURE + " { return s; }", GRADS[name])
    with pytest.raises(ValueError, match=rf"{name}.* requires grad beside score_mod.*forward only"):
        attnforge.flash_attention(q, q, q, score_mod=mod)


def test_bad_input() -> None:
    q = torch.randn(1, 4, 2, 16)

    def attend(**options: Any) -> None:
        attnforge.flash_attention(q, q, q, **options)

    with pytest.raises(TypeError, match="score_mod is str; want what attnforge"):
        attend(score_mod="return s;")
    with pytest.raises(TypeError, match="score_mod is a mask_mod"):
        attend(score_mod=DOCUMENTS)
    with pytest.raises(ValueError, match="score_mod is given with key_bias; want it without"):
        attend(score_mod=SOFTCAP, key_bias=torch.zeros(1, 1, 4))
    source = "bool mask(const Place&, const Aux&) { return 1; }"
    moved = {"x": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match="aux x of mask_mod is on meta; want cpu"):
        attend(mask_mod=jit.mask_mod(source, moved))
    with pytest.raises(ValueError, match="defines no function score; want float score"):
        jit.score_mod("float f(float s) { return s; }")
    with pytest.raises(TypeError, match="source is int"):
        jit.mask_mod(3)  # type: ignore[arg-type]
    for aux, error, text in (
        ({"1x": 2.0}, ValueError, "C\\+\\+ identifier"),
        ({"x": "text"}, TypeError, "aux x is str"),
        ({"x": torch.zeros(())}, ValueError, "0 dimensions; want 1 to 4"),
        ({"x": torch.zeros(2, dtype=torch.float64)}, TypeError, "float64; want one of float32"),
        ({"x": 1 << 70}, ValueError, "64 bits"),
    ):
        with pytest.raises(error, match=text):
            jit.score_mod(SIGNATURE + " { return s; }", aux)


def test_headers_are_all_there() -> None:
    """Whatever our headers include is one of them, but for what the emulator and nvcc include."""
    names = _headers.headers()
    missing = {
        (name, line.split('"')[1])
        for name, text in names.items()
        for line in text.splitlines()
        if line.startswith('#include "') and line.split('"')[1] not in names
    }
    assert missing == set()
    assert {"attnforge/params.h", "cuda/jit/kernels.h", "cuda/ptx/mma.h"} <= names.keys()


def test_tiles_are_padded_to_sixteen() -> None:
    assert [flash._padded(d) for d in (8, 16, 80, 88, 160, 250)] == [16, 16, 80, 96, 160, 256]
