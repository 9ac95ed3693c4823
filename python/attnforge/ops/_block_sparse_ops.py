"""Operators of the block_sparse family: schemas, outputs, implementations that pick a kernel.

The problem is that of flash without its mods, and outputs are allocated by flash's helpers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnforge import _ops
from attnforge._params import BlockLists, FlashParams, FlashTape
from attnforge.ops import _checks, _flash_ops, _flash_vmap
from attnforge.registry import override
from attnforge.registry.select import launcher
from attnforge.registry.spec import Request

__all__ = ["block_sparse_bwd", "block_sparse_fwd", "request"]

_LISTS = "Tensor indices, Tensor? counts, "
_PROBLEM = (
    f"{_LISTS}Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "Tensor? alibi_slopes, Tensor? sinks, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, "
    "int q_block, int kv_block, "
)
_SCALARS = 11  # fields of FlashParams that the schema has


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``_flash_ops.metadata`` stands for."""
    return _flash_ops.request(op, meta)


def _split(rest: tuple[Any, ...]) -> tuple[BlockLists, FlashParams]:
    """(lists, problem) of the arguments that ``_PROBLEM`` declares."""
    indices, counts, *fields = rest
    q_block, kv_block = fields[_SCALARS:]
    return BlockLists(indices, counts, q_block, kv_block), FlashParams(*fields[:_SCALARS])


def _checked(q: Tensor, k: Tensor, p: FlashParams, lists: BlockLists) -> FlashParams:
    """``p`` with exact bounds; on the CPU the rows that packed boundaries ask for are checked."""
    op = "block_sparse_attention"
    p = _flash_ops._checked(op, q, k, p)
    if p.cu_seqlens_q is not None and (q.device.type == "cpu" or override.checks):
        rows = int((-(-p.cu_seqlens_q.diff() // lists.q_block)).sum())
        if lists.rows < rows:
            _checks.fail(
                op,
                f"selection has {lists.rows} rows; want {rows}: each sequence starts a new row of "
                f"{lists.q_block} queries",
            )
    return p


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """rest: the arguments of ``_PROBLEM``, save_out_lo, backend."""
    *problem, save_out_lo, backend = rest
    lists, p = _split(tuple(problem))
    p = _checked(q, k, p, lists)
    outputs = _flash_ops.alloc_fwd(q, v, save_out_lo)
    launch = launcher("block_sparse_fwd", _flash_ops.metadata(q, v, p), request, backend)
    launch(q, k, v, p, lists, *outputs)
    return outputs


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_ops.alloc_fwd(q, v, rest[-2])


def _alloc_bwd(q: Tensor, k: Tensor, v: Tensor, p: FlashParams) -> tuple[Tensor, ...]:
    return _flash_ops.alloc_bwd(q, k, v, p, 0)[:4]


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
) -> tuple[Tensor, ...]:
    """rest: the arguments of ``_PROBLEM``, backend."""
    *problem, backend = rest
    lists, p = _split(tuple(problem))
    p = _checked(q, k, p, lists)
    grads = _alloc_bwd(q, k, v, p)
    launch = launcher("block_sparse_bwd", _flash_ops.metadata(q, v, p), request, backend)
    launch(dout, dlse, FlashTape(q, k, v, out, lse, out_lo), p, lists, grads)
    return grads


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _alloc_bwd(q, k, v, _split(rest[3:-1])[1])


block_sparse_fwd = _ops.define(
    f"block_sparse_fwd(Tensor q, Tensor k, Tensor v, {_PROBLEM}bool save_out_lo, str? backend) "
    "-> (Tensor out, Tensor lse, Tensor out_lo)",
    _fwd,
    _fwd_fake,
    _flash_vmap.looped("block_sparse_fwd"),
)
block_sparse_bwd = _ops.define(
    "block_sparse_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, Tensor out_lo, {_PROBLEM}str? backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    _bwd,
    _bwd_fake,
    _flash_vmap.looped("block_sparse_bwd"),
)
