"""JAX on the flash kernels: the bits of the torch operators, the numbers of jax.nn.

The torch operators are held to float64 elsewhere; equal bits carry that over, and show that XLA's
threads, layouts and buffers change nothing.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnforge
from attnforge import _native

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from attnforge.integrations.jax import dot_product_attention, flash_attention  # noqa: E402

if _native.unavailable() is not None:
    pytest.skip("libattnforge_cpu.so is not built", allow_module_level=True)

jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time

ROOT = Path(__file__).resolve().parents[2]
Array = Any
BATCH, ROWS, KEYS, HEADS, HEADS_K = 2, 37, 53, 4, 2


def drawn(*shape: int, seed: int, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def qkv(dtype: str, rows: int = ROWS, keys: int = KEYS, dim: int = 32) -> tuple[Array, ...]:
    shapes = ((rows, HEADS, dim), (keys, HEADS_K, dim), (keys, HEADS_K, dim))
    return tuple(drawn(BATCH, *s, seed=n, dtype=dtype) for n, s in enumerate(shapes))


def torched(x: Array) -> torch.Tensor:
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.astype(np.float32)).bfloat16()
    return torch.from_numpy(x.copy())


def same(ours: Array, theirs: torch.Tensor | None) -> None:
    assert theirs is not None
    assert torch.equal(torch.from_dlpack(ours), theirs.detach())


# What flash_attention takes beside q, k and v.
OPTIONS: dict[str, dict[str, Any]] = {
    "few rows": {"rows": 3, "causal": True, "dtype": "bfloat16"},
    "window, softcap, lengths": {
        "window_size": (9, 4), "softcap": 2.0, "seqused_k": np.array([41, 0], np.int32),
    },
    "slopes, sinks": {
        "causal": True, "alibi_slopes": np.float32([0.5, 0.25, 0.1, 0.05]),
        "sinks": drawn(HEADS, seed=7), "dtype": "bfloat16",
    },
    "mask, bias": {
        "mask": drawn(BATCH, 1, ROWS, KEYS, seed=5) > 0,
        "bias": drawn(1, HEADS, ROWS, KEYS, seed=6),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_bits_of_the_torch_operators(name: str) -> None:
    options = dict(OPTIONS[name])
    dtype = options.pop("dtype", "float32")
    arrays = qkv(dtype, rows=options.pop("rows", ROWS))
    learned = {n: options.pop(n) for n in ("sinks", "bias") if n in options}
    named = dict(zip("qkv", arrays, strict=True)) | learned
    q = arrays[0]
    dout = drawn(*q.shape, seed=8, dtype=dtype)
    dlse = drawn(BATCH, HEADS, q.shape[1], seed=9)

    @jax.jit
    def ours(named: dict[str, Array]) -> Any:
        results, back = jax.vjp(lambda x: flash_attention(**x, **options, return_lse=True), named)
        return results, back((dout, dlse))[0]

    (out, lse), grads = ours(named)
    leaves = {n: torched(x).requires_grad_() for n, x in named.items()}
    plain = {n: torched(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    want, want_lse = attnforge.flash_attention(**leaves, **plain, return_lse=True)
    same(out, want)
    same(lse, want_lse)
    torch.autograd.backward([want, want_lse], [torched(dout), torched(dlse)])
    for n, leaf in leaves.items():
        if n == "sinks":  # a sum over rows, whose order is XLA's
            np.testing.assert_allclose(grads[n], leaf.grad, rtol=1e-5, atol=1e-6)
        else:
            same(grads[n], leaf.grad)


SDPA: dict[str, dict[str, Any]] = {
    "causal, head dim 20": {"is_causal": True, "dim": 20},
    "window, more rows than keys": {
        "local_window_size": (7, 3), "rows": 60,
        "key_value_seq_lengths": np.array([53, 53], np.int32),  # old jax.nn forgot a window alone
    },
    "lengths": {
        "is_causal": True, "dtype": "bfloat16",
        "query_seq_lengths": np.array([37, 20], np.int32),
        "key_value_seq_lengths": np.array([53, 30], np.int32),
    },
    "bias, mask": {
        "bias": drawn(HEADS, 1, KEYS, seed=6), "scale": 0.3,
        "mask": (drawn(BATCH, 1, ROWS, KEYS, seed=5) > 0) | (np.arange(KEYS) == 0),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SDPA)
def test_numbers_of_jax_nn(name: str) -> None:
    options = dict(SDPA[name])
    dtype, bias = options.pop("dtype", "float32"), options.pop("bias", None)
    arrays = qkv(dtype, options.pop("rows", ROWS), dim=options.pop("dim", 32))
    weights = drawn(*arrays[0].shape, seed=4)

    def run(f: Any) -> Any:
        def loss(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
            out = f(q, k, v, bias, **options)
            return (out.astype(jnp.float32) * weights).sum(), out

        wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        grad = jax.grad(jax.checkpoint(loss), wanted, has_aux=True)
        return jax.jit(grad)(*arrays, bias)

    tolerance = 3e-5 if dtype == "float32" else 6e-2
    pairs = zip(*(jax.tree.leaves(run(f)) for f in (dot_product_attention,
                jax.nn.dot_product_attention)), strict=True)  # fmt: skip
    for ours, theirs in pairs:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        both = (x.astype(np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(*both, rtol=tolerance, atol=tolerance)


def test_one_sequence_and_its_residual() -> None:
    q, k, v = qkv("float32")
    out, lse = flash_attention(q, k, v, return_lse=True)
    one = dot_product_attention(q[1], k[1], v[1], return_residual=True)
    np.testing.assert_array_equal(one[0], out[1])
    np.testing.assert_array_equal(one[1], lse[1].T)


# Without sinks the mapped axis joins the batch; with them, or a mask that the batch shares, calls
# run one by one.
@pytest.mark.parametrize("shared", [{}, {"sinks": drawn(HEADS, seed=7)}], ids=["joined", "apart"])
def test_vmap(shared: dict[str, Array]) -> None:
    q, k, v = qkv("float32")
    many = np.stack([q, q * np.float32(0.5), -q])
    mask = drawn(3, 1 if shared else BATCH, 1, ROWS, KEYS, seed=5) > 0

    def loss(q: Array, mask: Array) -> Array:
        return (flash_attention(q, k, v, mask=mask, **shared) ** 2).sum()

    run = jax.value_and_grad(loss)
    values, grads = jax.jit(jax.vmap(run))(many, mask)
    alone = jax.jit(run)
    for n in range(3):
        value, grad = alone(many[n], mask[n])
        np.testing.assert_allclose(values[n], value, rtol=1e-6)
        np.testing.assert_array_equal(grads[n], grad)


def test_calls_that_run_at_the_same_time() -> None:
    """All of XLA's threads may be inside handlers: none may wait for another to begin."""
    q, k, v = qkv("float32", rows=64, keys=64)
    scales = np.arange(1, 17, dtype=np.float32)

    @jax.jit
    def many(q: Array) -> list[Array]:
        return [flash_attention(q * scale, k, v) for scale in scales]

    for scale, out in zip(scales, many(q), strict=True):
        np.testing.assert_array_equal(out, flash_attention(q * scale, k, v))


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_attend_to(rows: int, keys: int) -> None:
    arrays = qkv("float32", rows, keys)

    @jax.jit
    def run(*arrays: Array) -> Any:
        out, back = jax.vjp(flash_attention, *arrays)
        return out, back(jnp.ones_like(out))

    out, grads = run(*arrays)
    assert out.shape == (BATCH, rows, HEADS, 32)
    assert not np.any(out)
    for grad, x in zip(grads, arrays, strict=True):
        np.testing.assert_array_equal(grad, np.zeros_like(x))


def test_errors_name_the_argument() -> None:
    q, k, v = qkv("float32")
    zeros = partial(np.zeros, dtype=np.float32)
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("q has shape", flash_attention, {"q": q[0]}),
        ("dtypes are", flash_attention, {"k": k.astype(np.float16)}),
        ("shapes do not fit", flash_attention, {"v": v[:, :5]}),
        ("a multiple", flash_attention, {"q": q[:, :, :3]}),
        ("head dims are", flash_attention, {"k": k[..., :8]}),
        ("window_size is 3", flash_attention, {"window_size": 3}),
        ("softcap is -1", flash_attention, {"softcap": -1.0}),
        ("seqused_k is", flash_attention, {"seqused_k": np.zeros(3, np.int32)}),
        ("sinks has shape", flash_attention, {"sinks": zeros(3)}),
        ("mask has dtype", flash_attention, {"mask": zeros((1, 1, 1, 1))}),
        ("bias has shape", flash_attention, {"bias": zeros((1, 3, ROWS, KEYS))}),
        ("local_window_size is", dot_product_attention, {"local_window_size": -1}),
        ("query_seq_lengths is", dot_product_attention, {"query_seq_lengths": zeros(2)}),
    ]
    for text, f, given in cases:
        names = "qkv" if f is flash_attention else ("query", "key", "value")
        arguments = dict(zip(names, (q, k, v), strict=True)) | given
        with pytest.raises(ValueError, match=text):
            f(**arguments)


def test_handler_refuses_what_does_not_fit() -> None:
    """Somebody may call the target by hand: an error, not a read outside of a buffer."""
    flash_attention(*qkv("float32"))  # registers it
    call = jax.ffi.ffi_call("attnforge.flash_fwd", jax.ShapeDtypeStruct((1,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="lacks operands"):
        call(np.zeros((1, 2, 2, 8), np.float32))


def test_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "attnforge.integrations.jax")
    with pytest.raises(ImportError, match=r"pip install 'attnforge\[jax\]'"):
        importlib.import_module("attnforge.integrations.jax")


# Our struct, XLA's, and fields in both.
STRUCTS = {
    "Extension": ("Extension_Base", "struct_size type next"),
    "Version": ("Api_Version", "major:major_version minor:minor_version"),
    "Metadata": ("Metadata", "version:api_version traits"),
    "MetadataExtension": ("Metadata_Extension", "base:extension_base metadata"),
    "Buffer": ("Buffer", "dtype data rank dims"),
    "Buffers": ("Args", "size types buffers:args"),
    "Text": ("ByteSpan", "data:ptr size:len"),
    "Scalar": ("Scalar", "dtype value"),
    "Attributes": ("Attrs", "size types names values:attrs"),
    "ErrorCreate": ("Error_Create_Args", "message code:errc"),
    "ErrorDestroy": ("Error_Destroy_Args", "error"),
    "ThreadPoolSchedule": ("ThreadPool_Schedule_Args", "context:ctx task data"),
    "ThreadPoolNumThreads": ("ThreadPool_NumThreads_Args", "context:ctx num_threads"),
    "Api": (
        "Api",
        "version:api_version error_create:XLA_FFI_Error_Create "
        "error_destroy:XLA_FFI_Error_Destroy thread_pool_schedule:XLA_FFI_ThreadPool_Schedule "
        "thread_pool_num_threads:XLA_FFI_ThreadPool_NumThreads",
    ),
    "CallFrame": (
        "CallFrame",
        "api context:ctx stage arguments:args results:rets attributes:attrs",
    ),
}
CONSTANTS = {
    "kMetadataExtension": "Extension_Metadata",
    "kScalarAttribute": "AttrType_SCALAR",
    "kInvalidArgument": "Error_Code_INVALID_ARGUMENT",
    **{f"k{name.title()}": f"DataType_{name}" for name in ("PRED", "S32", "S64", "F16", "F32")},
    "kBF16": "DataType_BF16",
}


def test_layouts_are_those_of_the_installed_jaxlib(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    lines = ['#include "bindings/xla_ffi.h"', '#include "xla/ffi/api/c_api.h"']
    lines.append("using namespace attnforge::xla;")
    for ours, (theirs, fields) in STRUCTS.items():
        for field in fields.split():
            mine, _, other = field.partition(":")
            offsets = f"offsetof({ours}, {mine}) == offsetof(XLA_FFI_{theirs}, {other or mine})"
            lines.append(f"static_assert({offsets});")
    lines += [f"static_assert(int({a}) == int(XLA_FFI_{b}));" for a, b in CONSTANTS.items()]
    source = tmp_path / "layouts.cpp"
    source.write_text("\n".join(lines))
    include = ["-I", str(ROOT / "csrc"), "-isystem", jax.ffi.include_dir()]
    command = [compiler, "-std=c++20", "-fsyntax-only", *include, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
