"""Operators of the nsa family: block importance of compressed attention, the choice by it, gates.

Positions say where each query stands among the tokens: [B | 1, Sq], varlen [T], int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge import _ops
from attnforge._params import FlashParams, NsaSelectParams
from attnforge.ops import _flash_ops, _flash_vmap
from attnforge.registry import override
from attnforge.registry.select import decide, device_arch, launcher
from attnforge.registry.spec import Request

__all__ = [
    "metadata",
    "nsa_attend",
    "nsa_combine",
    "nsa_importance",
    "nsa_select",
    "request",
    "serves_attend",
]

_REST = (
    "Tensor positions, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt "
    "max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, int cmp_block, int cmp_stride, "
    "int slc_block, SymInt blocks, "
)
_PROBLEM = f"Tensor q, Tensor k, Tensor lse, {_REST}"
_FIELDS = 6  # of FlashParams


def metadata(q: Tensor, k: Tensor, p: FlashParams) -> tuple[Any, ...]:
    """What selection of a kernel may look at, as a hashable tuple (see ``request``)."""
    return _flash_ops.metadata(q, k, p)


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``metadata`` stands for; only ``nsa_attend`` has values beside scores."""
    found = _flash_ops.request(op, meta)
    if op == "nsa_attend":
        return found
    dims = tuple(item for item in found.dims if item[0] != "v_head_dim")
    return Request(
        op, found.device, found.arch, found.dtype, dims, found.features, found.deterministic
    )


def _params(fields: tuple[Any, ...], rest: tuple[int, ...]) -> NsaSelectParams:
    cu_q, cu_k, used, rows, keys, scale = fields
    p = FlashParams(cu_q, cu_k, used, None, None, rows, keys, scale, -1, -1, 0.0)
    return NsaSelectParams(p, *rest)


def _run(
    op: str, q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, rest: Any, out: Tensor
) -> Tensor:
    *numbers, backend = rest
    p = _params(tuple(numbers[:_FIELDS]), tuple(numbers[_FIELDS:]))
    p = p._replace(flash=_flash_ops._checked(op, q, k, p.flash))
    launcher(op, metadata(q, k, p.flash), request, backend)(q, k, lse, positions, p, out)
    return out


def _rows(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """[B, Hk, Sq] or [Hk, T]."""
    *batch, rows, _, _ = q.shape
    return (*batch, k.shape[-2], rows)


def _importance_out(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    dtype = _flash_ops._stat_dtype(q.dtype)
    return q.new_empty((*_rows(q, k), rest[-2]), dtype=dtype)


def _importance(q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, *rest: Any) -> Tensor:
    out = _importance_out(q, k, lse, positions, *rest)
    return _run("nsa_importance", q, k, lse, positions, rest, out)


def _select_out(q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, *rest: Any) -> Tensor:
    return positions.new_empty((*_rows(q, k), rest[-4]))


def _select(q: Tensor, k: Tensor, lse: Tensor, positions: Tensor, *rest: Any) -> Tensor:
    out = _select_out(q, k, lse, positions, *rest)
    return _run("nsa_select", q, k, lse, positions, rest, out)


def _attend_out(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *rest: Any) -> Any:
    out, lse, _ = _flash_ops.alloc_fwd(q, v)
    return out, lse, _select_out(q, k, lse, positions, *rest)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *rest: Any) -> Any:
    outputs = _attend_out(q, k, v, positions, *rest)
    *numbers, backend = rest
    p = _params(tuple(numbers[:_FIELDS]), tuple(numbers[_FIELDS:]))
    p = p._replace(flash=_flash_ops._checked("nsa_attend", q, k, p.flash))
    launch = launcher("nsa_attend", metadata(q, v, p.flash), request, backend)
    launch(q, k, v, positions, p, *outputs)
    return outputs


def serves_attend(q: Tensor, v: Tensor, p: FlashParams, backend: str | None) -> bool:
    """Whether ``nsa_attend`` has a kernel for such a call under the choice in force."""
    asked = request("nsa_attend", metadata(q, v, p))
    outer = backend is not None and backend == override.current
    return decide(asked, backend, outer).chosen is not None


def _combine_out(outs: Sequence[Tensor], gates: Tensor) -> Tensor:
    return outs[0].new_empty(outs[0].shape)


def _combine_request(op: str, meta: tuple[Any, ...]) -> Request:
    device, dtype = meta
    kind, arch = device_arch(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(op, kind, arch, dtype, (), frozenset(), deterministic)


def _combine(outs: Sequence[Tensor], gates: Tensor) -> Tensor:
    out = _combine_out(outs, gates)
    meta = (out.device, out.dtype)
    launcher("nsa_combine", meta, _combine_request, None)(list(outs), gates, out)
    return out


nsa_importance = _ops.define(
    f"nsa_importance({_PROBLEM}str? backend) -> Tensor",
    _importance,
    _importance_out,
    _flash_vmap.looped("nsa_importance"),
)
nsa_select = _ops.define(
    f"nsa_select({_PROBLEM}int top_n, int init_blocks, int local_blocks, str? backend) -> Tensor",
    _select,
    _select_out,
    _flash_vmap.looped("nsa_select"),
)
nsa_attend = _ops.define(
    f"nsa_attend(Tensor q, Tensor k, Tensor v, {_REST}int top_n, int init_blocks, "
    "int local_blocks, str? backend) -> (Tensor out, Tensor lse, Tensor indices)",
    _attend,
    _attend_out,
    _flash_vmap.looped("nsa_attend"),
)
nsa_combine = _ops.define(
    "nsa_combine(Tensor[] outs, Tensor gates) -> Tensor",
    _combine,
    _combine_out,
    _flash_vmap.looped("nsa_combine"),
)
