"""Operators of the flash family: schemas, outputs, implementations that pick a kernel.

An operator checks the values of its index tensors, allocates its outputs with the helper that
the fake kernel shares, selects a launcher by metadata and runs it. Everything here is below
autograd; ``_flash_autograd`` is above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge import _ops, jit
from attnforge._params import FLOAT8, FlashGrads, FlashParams, FlashTape
from attnforge.ops import _checks, _flash_vmap
from attnforge.registry import override
from attnforge.registry.select import device_arch, launcher
from attnforge.registry.spec import Request
from attnforge.registry.tuned import Sized, sized

__all__ = ["flash_bwd", "flash_decode", "flash_fwd", "merge_states", "metadata", "request", "sizes"]

_FEATURES = ("varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left", "window_right")
# Features of single scores by the first tensor of FlashMods that brings each.
_MOD_FEATURES = {
    "row_bounds": "row_bounds",
    "mask": "mask",
    "segments": "segments_q",
    "key_bias": "key_bias",
    "bias": "bias",
    "rel_bias": "rel_bias",
    "forget_gate": "decay",
    "row_scale": "row_scale",
    "rope": "rope_cos",
    "dropout": "rng",
}
# Mods with a gradient, in the order of the bits of ``grad_mods`` and of the results of flash_bwd.
GRAD_MODS = ("key_bias", "bias", "rel_bias", "decay", "row_scale")
_INDICES = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
_EXTRAS = "Tensor? alibi_slopes, Tensor? sinks, "
_SIZES = "SymInt max_seqlen_q, SymInt max_seqlen_k, "
_SCALARS = "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, "
_MODS = (
    "Tensor?[] mods, str score_fn, float dropout_p, bool rope_interleaved, ScalarType? out_dtype, "
)


def metadata(q: Tensor, v: Tensor, p: FlashParams) -> tuple[Any, ...]:
    """What selection may look at, as a hashable tuple (see ``request``)."""
    *_, heads_q, head_dim = q.shape
    *_, heads_kv, v_head_dim = v.shape
    return (
        q.device,
        v.dtype if q.dtype is v.dtype else (v.dtype, q.dtype),  # another q beside fp8 k and v
        head_dim,
        v_head_dim,
        heads_q // heads_kv if heads_kv else 1,
        p.cu_seqlens_q is not None,
        p.seqused_k is not None,
        p.alibi_slopes is not None,
        p.sinks is not None,
        p.softcap > 0,
        p.window_left >= 0,
        p.window_right >= 0,
        _mod_features(p) if p.mods or p.score_fn != "softmax" else (),
    )


def _mod_features(p: FlashParams) -> tuple[str, ...]:
    mods = p.score_mods
    used = [name for name, field in _MOD_FEATURES.items() if getattr(mods, field) is not None]
    if signatures := jit.known(p.score_fn):
        return (*used, *(f"{signature.kind}_mod" for signature in signatures))
    return tuple(used) if p.score_fn == "softmax" else (*used, p.score_fn)


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``metadata`` stands for."""
    device, dtype, head_dim, v_head_dim, group, *used, mods = meta
    kind, arch = device_arch(device)
    wide: tuple[tuple[str, int], ...] = ()
    if isinstance(dtype, tuple):
        dtype, q_dtype = dtype
        wide = (("q_bytes", q_dtype.itemsize),)
    return Request(
        op,
        kind,
        arch,
        dtype,
        (("head_dim", head_dim), ("v_head_dim", v_head_dim), ("group", group), *wide),
        frozenset([*(name for name, on in zip(_FEATURES, used, strict=True) if on), *mods]),
        torch.are_deterministic_algorithms_enabled(),
    )


def sizes(q: Tensor, p: FlashParams) -> tuple[int, int, int, int, int]:
    """batch, seqlen_q, seqlen_k (varlen: bounds), query heads, keys of the left window (0: all)."""
    batch = q.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    return batch, p.max_seqlen_q, p.max_seqlen_k, q.shape[-2], p.window_left + 1


for _op in ("flash_fwd", "flash_bwd", "flash_decode"):
    sized(
        _op,
        Sized(
            ("batch", "seqlen_q", "seqlen_k", "heads", "window"),
            sizes,
            workload="attnforge.testing.tune_flash:workload",
            problems="attnforge.testing.tune_flash:problems",
            # The backward cuts keys into chunks by the number of heads; the order of dQ follows.
            alone=("heads",) if _op == "flash_bwd" else (),
            layouts=frozenset({"varlen", "seqused_k"}),
        ),
    )


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def alloc_fwd(
    q: Tensor, v: Tensor, save_out_lo: bool = False, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out like q with Dv, lse [B, Hq, Sq] (varlen [Hq, Tq]), out_lo like out or [0].

    out_dtype: None is q's, or bf16 if that is fp8.
    """
    *batch, rows, heads, head_dim = q.shape
    dv = v.shape[-1]
    shape = (*batch, rows, heads, dv)
    if v.dtype is FLOAT8:
        stored = torch.bfloat16 if q.dtype is FLOAT8 else q.dtype
        out = q.new_empty(shape, dtype=out_dtype or stored)
    elif dv == head_dim:
        # empty_like parses fewer arguments: half a microsecond of a call that takes fifteen.
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = q.new_empty(shape)
    lse = q.new_empty((*batch, heads, rows), dtype=_stat_dtype(q.dtype))
    keep = save_out_lo and q.dtype.itemsize == 2
    return out, lse, torch.empty_like(out) if keep else q.new_empty(0)


def alloc_bwd(q: Tensor, k: Tensor, v: Tensor, p: FlashParams, grad_mods: int) -> FlashGrads:
    """dq, dk, dv contiguous like q, k, v; dsinks [Hq], or [0] without sinks; wanted mods.

    Bit n of grad_mods asks for the gradient of ``GRAD_MODS[n]``.
    """
    heads = 0 if p.sinks is None else q.shape[-2]
    mods = p.score_mods
    wanted = [
        getattr(mods, name) if grad_mods >> n & 1 else None for n, name in enumerate(GRAD_MODS)
    ]
    return FlashGrads(
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty((heads,), dtype=_stat_dtype(q.dtype)),
        *(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted),
    )


def _checked(op: str, q: Tensor, k: Tensor, p: FlashParams, used: str = "seqused_k") -> FlashParams:
    """Validate index tensors by value and make the sequence bounds exact.

    Elsewhere than on the CPU this would wait for the device, so only ``debug`` asks for it.
    """
    if (p.cu_seqlens_q is None and p.seqused_k is None) or not (
        q.device.type == "cpu" or override.checks
    ):
        return p
    cu = None
    if op in ("flash_fwd", "flash_bwd"):  # name the function that the caller knows
        op = "flash_attention" if p.cu_seqlens_q is None else "flash_attention_varlen"
    if p.cu_seqlens_q is not None and p.cu_seqlens_k is not None:
        cu = (p.cu_seqlens_q, p.cu_seqlens_k)
        totals = (q.shape[0], k.shape[0])
    else:
        totals = (q.shape[1], k.shape[1])
    bounds = (p.max_seqlen_q, p.max_seqlen_k)
    _, _, rows, keys = _checks.index_tensors(op, cu, p.seqused_k, totals, bounds, used)
    return p._replace(max_seqlen_q=rows, max_seqlen_k=keys)


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """rest: the fields of FlashParams, save_out_lo, backend."""
    *fields, save_out_lo, backend = rest
    p = FlashParams(*fields)
    if p.cu_seqlens_q is not None or p.seqused_k is not None:
        p = _checked("flash_fwd", q, k, p)
    outputs = alloc_fwd(q, v, save_out_lo, p.out_dtype)
    launch = launcher("flash_fwd", metadata(q, v, p), request, backend, q, p)
    launch(q, k, v, p, *outputs)
    return outputs


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return alloc_fwd(q, v, rest[-2], rest[-3])


def _bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
    *rest: Any,
) -> FlashGrads:
    """rest: the fields of FlashParams, grad_mods, backend."""
    *fields, grad_mods, backend = rest
    p = FlashParams(*fields)
    if p.cu_seqlens_q is not None or p.seqused_k is not None:
        p = _checked("flash_bwd", q, k, p)
    grads = alloc_bwd(q, k, v, p, grad_mods)
    launch = launcher("flash_bwd", metadata(q, v, p), request, backend, q, p)
    launch(dout, dlse, FlashTape(q, k, v, out, lse, out_lo), p, grads)
    return grads


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> FlashGrads:
    return alloc_bwd(q, k, v, FlashParams(*rest[3:-2]), rest[-2])


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """rest: the fields of FlashParams from softmax_scale on, num_splits, backend."""
    *fields, num_splits, backend = rest
    p = FlashParams(
        None, None, cache_seqlens, alibi_slopes, sinks, q.shape[1], k_cache.shape[1], *fields
    )
    if cache_seqlens is not None:
        p = _checked("flash_decode", q, k_cache, p, "cache_seqlens")
    out, lse, _ = alloc_fwd(q, v_cache, False, p.out_dtype)
    launch = launcher("flash_decode", metadata(q, v_cache, p), request, backend, q, p)
    launch(q, k_cache, v_cache, p, out, lse, num_splits)
    return out, lse


def _decode_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return alloc_fwd(q, v_cache, False, rest[-3])[:2]


def merge_request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request of a merge: meta is (device, dtype, head_dim)."""
    device, dtype, head_dim = meta
    kind, arch = device_arch(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(op, kind, arch, dtype, (("v_head_dim", head_dim),), frozenset(), deterministic)


def alloc_merge(outs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out like outs[0], contiguous; lse [.., H, S]."""
    first = outs[0]
    *batch, rows, heads, _ = first.shape
    lse = first.new_empty((*batch, heads, rows), dtype=_stat_dtype(first.dtype))
    return first.new_empty(first.shape), lse


def _merge(outs: list[Tensor], lses: list[Tensor], backend: str | None) -> tuple[Tensor, Tensor]:
    out, lse = alloc_merge(outs)
    meta = (out.device, out.dtype, out.shape[-1])
    launcher("merge_states", meta, merge_request, backend)(outs, lses, out, lse)
    return out, lse


def _merge_fake(
    outs: list[Tensor], lses: list[Tensor], backend: str | None
) -> tuple[Tensor, Tensor]:
    return alloc_merge(outs)


flash_fwd = _ops.define(
    f"flash_fwd(Tensor q, Tensor k, Tensor v, {_INDICES}{_EXTRAS}{_SIZES}{_SCALARS}{_MODS}"
    "bool save_out_lo, str? backend) -> (Tensor out, Tensor lse, Tensor out_lo)",
    _fwd,
    _fwd_fake,
    _flash_vmap.forward,
)
flash_bwd = _ops.define(
    "flash_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor out_lo, {_INDICES}{_EXTRAS}{_SIZES}{_SCALARS}{_MODS}int grad_mods, str? backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dkey_bias, Tensor dbias, "
    "Tensor drel_bias, Tensor ddecay, Tensor drow_scale)",
    _bwd,
    _bwd_fake,
    _flash_vmap.backward,
)
flash_decode = _ops.define(
    "flash_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens, "
    f"{_EXTRAS}{_SCALARS}{_MODS}SymInt num_splits, str? backend) -> (Tensor out, Tensor lse)",
    _decode,
    _decode_fake,
    _flash_vmap.decode,
)
merge_states = _ops.define(
    "merge_states(Tensor[] outs, Tensor[] lses, str? backend) -> (Tensor out, Tensor lse)",
    _merge,
    _merge_fake,
    _flash_vmap.merge,
)
