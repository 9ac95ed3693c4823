"""Operators of attention to lists of keys: schemas, outputs, implementations that pick a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _ops
from attnforge._params import FlashTape, IndexedGrads, IndexedParams, PagedCache
from attnforge.ops import _checks, _flash_ops, _flash_vmap, _paged_checks
from attnforge.registry import override
from attnforge.registry.select import device_arch, launcher
from attnforge.registry.spec import Request

__all__ = ["indexed_bwd", "indexed_fwd", "metadata", "request"]

_LISTS = (
    "Tensor ids, Tensor? lens, Tensor? log_bias, Tensor? block_table, Tensor? cache_seqlens, "
    "float softmax_scale, "
)
_FIELDS = 6  # of IndexedParams


def metadata(q: Tensor, v: Tensor, p: IndexedParams) -> tuple[Any, ...]:
    """What selection may look at, as a hashable tuple (see ``request``)."""
    group = q.shape[2] // v.shape[2] if v.shape[2] else 1
    used = {"paged": p.block_table is not None, "seqused_k": p.cache_seqlens is not None}
    sizes = (q.shape[3], v.shape[3], group)
    return q.device, q.dtype, sizes, tuple(name for name, on in used.items() if on)


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``metadata`` stands for."""
    device, dtype, sizes, used = meta
    kind, arch = device_arch(device)
    dims = tuple(zip(("head_dim", "v_head_dim", "group"), sizes, strict=True))
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(op, kind, arch, dtype, dims, frozenset(used), deterministic)


def _checked(k: Tensor, v: Tensor, p: IndexedParams) -> None:
    """Lengths and page ids by value, where looking does not wait for a device."""
    if p.cache_seqlens is None or not (k.device.type == "cpu" or override.checks):
        return
    if p.block_table is None:
        _checks._used("indexed_attention", "cache_seqlens", p.cache_seqlens.tolist(), None,
                      k.shape[1])  # fmt: skip
        return
    cache = PagedCache(k, v, p.block_table, p.cache_seqlens)
    first = torch.zeros_like(p.cache_seqlens, dtype=torch.int64)
    _paged_checks.index_values("indexed_attention", cache, first)


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """rest: the fields of IndexedParams, save_out_lo, backend."""
    p, (save_out_lo, backend) = IndexedParams(*rest[:_FIELDS]), rest[_FIELDS:]
    _checked(k, v, p)
    outputs = _flash_ops.alloc_fwd(q, v, save_out_lo)
    launcher("indexed_fwd", metadata(q, v, p), request, backend)(q, k, v, p, *outputs)
    return outputs


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_ops.alloc_fwd(q, v, rest[_FIELDS])


def _alloc_bwd(q: Tensor, k: Tensor, v: Tensor, log_bias: Tensor | None) -> IndexedGrads:
    bias = q.new_empty(0, dtype=_flash_ops._stat_dtype(q.dtype))
    return IndexedGrads(
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        bias if log_bias is None else log_bias.new_empty(log_bias.shape),
    )


def _bwd(dout: Tensor, dlse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """rest: the fields of FlashTape, those of IndexedParams, backend."""
    tape, p = FlashTape(*rest[:6]), IndexedParams(*rest[6:-1])
    grads = _alloc_bwd(tape.q, tape.k, tape.v, p.log_bias)
    launch = launcher("indexed_bwd", metadata(tape.q, tape.v, p), request, rest[-1])
    launch(dout, dlse, tape, p, grads)
    return tuple(grads)


def _bwd_fake(dout: Tensor, dlse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v = rest[:3]
    return tuple(_alloc_bwd(q, k, v, rest[8]))


indexed_fwd = _ops.define(
    f"indexed_fwd(Tensor q, Tensor k, Tensor v, {_LISTS}bool save_out_lo, str? backend) "
    "-> (Tensor out, Tensor lse, Tensor out_lo)",
    _fwd,
    _fwd_fake,
    _flash_vmap.looped("indexed_fwd"),
)
indexed_bwd = _ops.define(
    "indexed_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor out_lo, {_LISTS}str? backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_bias)",
    _bwd,
    _bwd_fake,
    _flash_vmap.looped("indexed_bwd"),
)
