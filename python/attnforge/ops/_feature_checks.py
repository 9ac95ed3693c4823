"""Checks of the keywords in ``_features.Features``: metadata only, one sentence per error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FLOAT8, SCORE_FNS, FlashParams
from attnforge.jit import Mod
from attnforge.ops._checks import fail, tensor

__all__ = ["features", "float8", "jit_mods", "shaped"]

_JIT_MODS = ("score_mod", "mask_mod")
Sizes = tuple[int, ...]  # what one dimension may be
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shaped(
    op: str, name: str, x: Any, q: Tensor, want: Sequence[Sizes], dtype: torch.dtype | None
) -> None:
    """``x`` is a tensor on q's device whose n-th size is one of ``want[n]``.

    dtype: the one that it must have; None is any floating dtype.
    """
    tensor(op, name, x)
    text = "[" + ", ".join("|".join(map(str, dict.fromkeys(s))) for s in want) + "]"
    if x.dim() != len(want) or any(n not in sizes for n, sizes in zip(x.shape, want, strict=True)):
        fail(op, f"{name} has shape {tuple(x.shape)}; want {text}; a size of 1 is broadcast")
    if (x.dtype is not dtype) if dtype is not None else not x.dtype.is_floating_point:
        wanted = "a floating dtype" if dtype is None else _name(dtype)
        fail(
            op,
            f"{name} has dtype {_name(x.dtype)}; want {wanted}; convert it",
            TypeError,
        )
    if x.device != q.device:
        fail(op, f"{name} is on {x.device}; want {q.device} like q; move it with .to(q.device)")


def _pair(op: str, f: Mapping[str, Any], first: str, second: str) -> None:
    if (first in f) != (second in f):
        given, missing = (first, second) if first in f else (second, first)
        fail(op, f"{given} comes without {missing}; want both or neither")


def _batched_only(op: str, f: Mapping[str, Any], p: FlashParams) -> None:
    for name in ("mask", "bias"):
        if name in f and p.cu_seqlens_q is not None:
            fail(
                op,
                f"{name} is given with packed sequences; got cu_seqlens; want batched tensors, or "
                "segment_ids, key_bias or rel_bias, which packed calls take",
            )


def _score_fn(op: str, f: Mapping[str, Any], p: FlashParams) -> None:
    score_fn = f.get("score_fn", "softmax")
    if score_fn not in SCORE_FNS:
        fail(op, f"score_fn is {score_fn!r}; want one of {', '.join(SCORE_FNS)}")
    if score_fn != "softmax" and p.sinks is not None:
        fail(op, f"sinks is given with score_fn {score_fn!r}; want softmax: drop one of them")


def _dropout(op: str, f: Mapping[str, Any]) -> None:
    rate = f.get("dropout_p", 0.0)
    if not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
        fail(op, f"dropout_p is {rate!r}; want a number 0 <= p < 1; 0 turns it off")
    for name in ("dropout_seed", "dropout_offset"):
        value = f.get(name, 0)
        if not isinstance(value, int) or not 0 <= value < 1 << 63:
            fail(op, f"{name} is {value!r}; want an int 0 <= n < 2^63")
    if rate and "dropout_seed" not in f:
        fail(op, "dropout_p is given without dropout_seed; want the seed: results are replayable")


def _rope(op: str, q: Tensor, k: Tensor, rows: Sizes, keys: Sizes, f: Mapping[str, Any]) -> None:
    for name in ("positions_q", "positions_k", "rope_interleaved"):
        if name in f and "rope" not in f:
            fail(op, f"{name} is given without rope; want the tables (cos, sin) as well")
    if "rope" not in f:
        return
    tables = f["rope"]
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        fail(op, f"rope is {type(tables).__name__}; want a pair of tensors (cos, sin)", TypeError)
    half = q.shape[-1] // 2
    for name, x in zip(("rope cos", "rope sin"), tables, strict=True):
        tensor(op, name, x)
        rotary, length = (x.shape[-1], x.shape[1]) if x.dim() == 3 else (half, 1)
        if not 1 <= rotary <= half or length < 1:
            fail(op, f"{name} has shape {tuple(x.shape)}; want [heads_kv|1, positions >= 1, "
                     f"rotary_dim / 2 <= {half}]")  # fmt: skip
        shaped(op, name, x, q, [(k.shape[-2], 1), (length,), (rotary,)], None)
        if x.requires_grad:
            fail(op, f"{name} requires grad; want constants; rotate q and k outside for a gradient")
    if tables[0].shape != tables[1].shape:
        fail(op, f"rope tables differ; got cos {tuple(tables[0].shape)}, sin "
                 f"{tuple(tables[1].shape)}; want one shape")  # fmt: skip
    for name, want in (("positions_q", rows), ("positions_k", keys)):
        if name in f:
            shaped(op, name, f[name], q, [(n, 1) if i < len(want) - 1 else (n,)
                                          for i, n in enumerate(want)], torch.int32)  # fmt: skip


def _sink_kv(op: str, q: Tensor, k: Tensor, v_dim: int, f: Mapping[str, Any]) -> None:
    if "sink_kv" not in f:
        return
    pair = f["sink_kv"]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        fail(op, f"sink_kv is {type(pair).__name__}; want a pair of tensors (k, v)", TypeError)
    for name, x, dim in zip(("sink_kv k", "sink_kv v"), pair, (q.shape[-1], v_dim), strict=True):
        tensor(op, name, x)
        count = pair[0].shape[0] if pair[0].dim() else 0
        shaped(op, name, x, q, [(count,), (k.shape[-2],), (dim,)], None)
    if f.get("score_fn", "softmax") != "softmax" or "rope" in f or "dropout_p" in f:
        fail(op, "sink_kv is given with score_fn, dropout or rope; want it alone; append the keys "
                 "to k and v instead")  # fmt: skip


def _descales(op: str, q: Tensor, k: Tensor, batch: int, f: Mapping[str, Any]) -> None:
    for name, of in (("q_descale", q), ("k_descale", k), ("v_descale", k)):
        if name not in f:
            continue
        if of.dtype is not FLOAT8:
            fail(op, f"{name} is given for a tensor of {_name(of.dtype)}; want float8_e4m3fn; "
                     "leave it out, or multiply the tensor by it")  # fmt: skip
        tensor(op, name, f[name])
        sizes: list[Sizes] = [(batch, 1), (k.shape[-2], 1)]
        rank = f[name].dim()
        shaped(op, name, f[name], q, sizes[2 - rank :] if rank < 2 else sizes, None)
    if "out_dtype" in f and (k.dtype is not FLOAT8 or f["out_dtype"] not in _OUT_DTYPES):
        fail(op, f"out_dtype is {f['out_dtype']} with k of {_name(k.dtype)}; want float32, "
                 "bfloat16 or float16, with float8 k and v; else convert the output")  # fmt: skip


def float8(op: str, inputs: Sequence[Tensor | None], features: Mapping[str, Any]) -> None:
    """A call with fp8 k and v asks for no gradient. inputs: all that are no features."""
    if features.get("sink_kv") is not None:
        fail(op, "sink_kv is given with float8_e4m3fn k and v; want it with wider ones; append its "
                 "keys to k and v instead")  # fmt: skip
    named = [*zip(("q", "k", "v", "sinks"), inputs, strict=True), *features.items()]
    _forward_only(op, named, "float8_e4m3fn k and v", "pass dequantised k and v")


def _forward_only(op: str, named: Sequence[tuple[str, Any]], beside: str, instead: str) -> None:
    """No tensor asks for a gradient."""
    for name, x in named if torch.is_grad_enabled() else ():
        if isinstance(x, Tensor) and x.requires_grad:
            fail(op, f"{name} requires grad beside {beside}; want no gradient: such a call is "
                     f"forward only; {instead}, or use torch.no_grad()")  # fmt: skip


def jit_mods(op: str, inputs: Sequence[Tensor | None], features: Mapping[str, Any]) -> None:
    """Mods are what ``attnforge.jit`` makes, fit q's device and come alone; no gradients."""
    q = inputs[0]
    for kind in ("score", "mask"):
        mod = features.get(f"{kind}_mod")
        if mod is None:
            continue
        if not isinstance(mod, Mod) or mod.signature.kind != kind:
            got = f"a {mod.signature.kind}_mod" if isinstance(mod, Mod) else type(mod).__name__
            fail(op, f"{kind}_mod is {got}; want what attnforge.jit.{kind}_mod returns", TypeError)
        others = sorted(n for n, x in features.items() if x is not None and n not in _JIT_MODS)
        if others:
            fail(op, f"{kind}_mod is given with {', '.join(others)}; want it without; write that "
                     "into the function, with its tensors in aux")  # fmt: skip
        named: list[tuple[str, Any]] = [(f"aux {name} of {kind}_mod", x)
                 for (name, *_), x in zip(mod.signature.aux, mod.tensors, strict=True)]  # fmt: skip
        for name, x in named:
            if q is not None and x.dim() and x.device != q.device and q.device.type != "meta":
                fail(op, f"{name} is on {x.device}; want {q.device} like q; move it there")
        named += zip(("q", "k", "v", "sinks"), inputs, strict=True)
        _forward_only(op, named, f"{kind}_mod", "leave it out for training")


def features(
    op: str,
    q: Tensor,
    k: Tensor,
    v_dim: int,
    batch: int,
    causal: bool,
    p: FlashParams,
    f: Mapping[str, Any],
) -> None:
    """Every keyword that is given fits q [B, Sq, Hq, D] and k [B, Sk, Hk, D] (or packed ones)."""
    heads, sq, sk = (q.shape[-2],), (q.shape[-3],), (k.shape[-3],)
    some = (*heads, 1)
    lead: list[Sizes] = [] if p.cu_seqlens_q is not None else [(batch, 1)]
    full: list[Sizes] = [] if p.cu_seqlens_q is not None else [(batch,)]
    _pair(op, f, "segment_ids_q", "segment_ids_k")
    _batched_only(op, f, p)
    _score_fn(op, f, p)
    _dropout(op, f)
    _sink_kv(op, q, k, v_dim, f)
    _descales(op, q, k, batch, f)
    if "head_scale" in f:
        shaped(op, "head_scale", f["head_scale"], q, [heads], None)
    rows, keys = ((q.shape[0],), (k.shape[0],)) if not lead else ((batch, *sq), (batch, *sk))
    _rope(op, q, k, rows, keys, f)
    floating: dict[str, list[Sizes]] = {
        "key_bias": [*lead, some, sk],
        "bias": [*lead, some, sq, sk],
        "row_scale": [*lead, some, sq],
        "log_forget": [*full, sk, some],
    }
    integers: dict[str, list[Sizes]] = {
        "prefix_lens": [(batch,)],
        "segment_ids_q": [*full, sq],
        "segment_ids_k": [*full, sk],
    }
    for name, want in floating.items():
        if name in f:
            shaped(op, name, f[name], q, want, None)
    for name, want in integers.items():
        if name in f:
            shaped(op, name, f[name], q, want, torch.int32)
    if "bias" in f and f["bias"].dtype not in ({q.dtype, torch.float32} - {FLOAT8}):
        like = "" if q.dtype is FLOAT8 else f"{q.dtype} like q, or "
        fail(op, f"bias has dtype {f['bias'].dtype}; want {like}float32", TypeError)
    if "rel_bias" in f:
        tensor(op, "rel_bias", f["rel_bias"])
        length = f["rel_bias"].shape[-1] if f["rel_bias"].dim() else 0
        if length % 2 == 0:
            fail(op, f"rel_bias has shape {tuple(f['rel_bias'].shape)}; want [heads_q|1, 2 R + 1]: "
                     "distances -R .. R")  # fmt: skip
        shaped(op, "rel_bias", f["rel_bias"], q, [some, (length,)], None)
    if "mask" in f:
        tensor(op, "mask", f["mask"])
        covered = f["mask"].shape[-1] if f["mask"].dim() else 0
        if covered > k.shape[-3]:
            fail(op, f"mask covers {covered} keys; got {k.shape[-3]}; want at most all of them")
        shaped(op, "mask", f["mask"], q, [*lead, some, sq, (covered,)], torch.bool)
    if "log_forget" in f and not causal:
        fail(op, "log_forget comes without causal; want causal=True: gates forget the past only")
