"""The flash kernels as JAX functions: XLA calls the library's handlers, a custom VJP joins them.

One call in each direction, on XLA's threads and without a torch tensor
(``csrc/bindings/ops_cpu_xla.cpp``). Shapes are checked by ``attnforge.integrations.jax``.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from attnforge import _native

__all__ = ["Extras", "Options", "attend"]

Array = Any  # jax.Array, or what jax traces in its place


class Options(NamedTuple):
    """What is known when a call is traced."""

    softmax_scale: float
    softcap: float
    window_left: int
    window_right: int


class Extras(NamedTuple):
    """Operands beside q, k and v, each None if unused; gradients for sinks and bias."""

    seqused_k: Array | None = None  # [B] int32
    alibi_slopes: Array | None = None  # [B|1, Hq] fp32
    sinks: Array | None = None  # [Hq] fp32
    row_bounds: Array | None = None  # [B|1, Hq|1, Sq, 2] int32: keys lo <= j < hi
    mask: Array | None = None  # [B|1, Hq|1, Sq, Sk] bool
    bias: Array | None = None  # [B|1, Hq|1, Sq, Sk] fp32 or q's dtype


# How an operand that is not there comes: without elements, of the rank that it would have.
_ABSENT = Extras(
    *((np.zeros(0, np.int32)), np.zeros((0, 0), np.float32), np.zeros(0, np.float32)),
    *(np.zeros((0,) * 4, np.int32), np.zeros((0,) * 4, np.bool_), np.zeros((0,) * 4, np.float32)),
)


@cache
def _registered() -> None:
    """Tell XLA the handlers' addresses."""
    if (reason := _native.unavailable()) is not None:
        raise RuntimeError(f"attnforge.integrations.jax: {reason}")
    for name in ("flash_fwd", "flash_bwd"):
        address = torch.ops.attnforge_native.xla_handler(name)
        jax.ffi.register_ffi_target(f"attnforge.{name}", jax.ffi.pycapsule(address), "cpu")


def _call(name: str, results: list[Any], options: Options, *operands: Array) -> list[Array]:
    _registered()
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    call = jax.ffi.ffi_call(f"attnforge.{name}", shapes, vmap_method="broadcast_all")
    answer: list[Array] = call(
        *operands,
        softmax_scale=np.float32(options.softmax_scale),
        softcap=np.float32(options.softcap),
        window_left=np.int64(options.window_left),
        window_right=np.int64(options.window_right),
    )
    return answer


def _operands(extras: Extras) -> list[Array]:
    pairs = zip(extras, _ABSENT, strict=True)
    return [absent if given is None else given for given, absent in pairs]


def _forward(
    options: Options, q: Array, k: Array, v: Array, extras: Extras, low: bool
) -> list[Array]:
    """out, lse and what rounding took from out; the last without elements unless ``low``."""
    batch, rows, heads, _ = q.shape
    out = (batch, rows, heads, v.shape[-1])
    results = [
        (out, q.dtype),
        ((batch, heads, rows), jnp.float32),
        (out if low else (0,) * 4, q.dtype),
    ]
    return _call("flash_fwd", results, options, q, k, v, *_operands(extras))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options: Options, q: Array, k: Array, v: Array, extras: Extras) -> tuple[Array, Array]:
    """(out [B, Sq, Hq, Dv], lse [B, Hq, Sq] fp32) of head dims in steps of 8."""
    out, lse, _ = _forward(options, q, k, v, extras, low=False)
    return out, lse


def _attend_fwd(options: Options, q: Array, k: Array, v: Array, extras: Extras) -> Any:
    out, lse, low = _forward(options, q, k, v, extras, low=q.dtype != jnp.float32)
    return (out, lse), (q, k, v, extras, out, lse, low)


def _attend_bwd(options: Options, saved: Any, gradients: tuple[Array, Array]) -> Any:
    q, k, v, extras, out, lse, low = saved
    dout, dlse = gradients
    bias, sinks = extras.bias, extras.sinks
    results = [(x.shape, x.dtype) for x in (q, k, v, lse)]
    results.append(((0,) * 4 if bias is None else bias.shape, jnp.float32))
    operands = (*_operands(extras), dout, dlse, out, lse, low)
    dq, dk, dv, delta, dbias = _call("flash_bwd", results, options, q, k, v, *operands)
    return dq, dk, dv, Extras(
        sinks=None if sinks is None else _sink_gradient(sinks, lse, delta),
        bias=None if bias is None else dbias.astype(bias.dtype),
    )  # fmt: skip


def _sink_gradient(sinks: Array, lse: Array, delta: Array) -> Array:
    """A sink is a key whose value is 0: its dS is p (0 - delta)."""
    logit = sinks[:, None]
    prob = jnp.where(logit == lse, 1.0, jnp.exp(logit - lse))
    part = jnp.where(jnp.isneginf(lse) | (prob == 0), 0.0, prob * delta)
    return -part.sum((0, 2))


attend.defvjp(_attend_fwd, _attend_bwd)
