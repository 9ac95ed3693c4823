"""Operators of the reductions family: schemas, outputs, implementations that pick a kernel.

As in ``_flash_ops``, an operator checks the values of its index tensors, allocates its outputs
with the helper that the fake kernel shares, selects a launcher by metadata and runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge import _ops
from attnforge._params import FlashParams
from attnforge.ops import _checks, _flash_ops, _flash_vmap, _reductions_checks
from attnforge.registry import override
from attnforge.registry.select import device_arch, launcher
from attnforge.registry.spec import Request

__all__ = ["head_request", "metadata", "operators", "request"]

_OPTIONS = (
    "Tensor? seqused_k, Tensor? alibi_slopes, float softmax_scale, SymInt window_left, "
    "SymInt window_right, float softcap, str? backend"
)
_QKL = "Tensor q, Tensor k, Tensor lse, "
_QKL_OR_LOGITS = "Tensor q, Tensor k, Tensor? lse, "

Options = tuple[Any, ...]  # the arguments that _OPTIONS declares


def metadata(q: Tensor, k: Tensor, p: FlashParams) -> tuple[Any, ...]:
    """What selection may look at, as a hashable tuple (see ``request``)."""
    return _flash_ops.metadata(q, k, p)


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that ``metadata`` stands for: the scores have no values."""
    found = _flash_ops.request(op, meta)
    dims = tuple(item for item in found.dims if item[0] != "v_head_dim")
    return Request(
        op, found.device, found.arch, found.dtype, dims, found.features, found.deterministic
    )


def head_request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request of a head gradient: meta is (device, dtype)."""
    device, dtype = meta
    kind, arch = device_arch(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(op, kind, arch, dtype, (), frozenset(), deterministic)


def _reads_values(x: Tensor) -> bool:
    """Elsewhere than on the CPU a look at values would wait for the device: debug asks for it."""
    return x.device.type == "cpu" or override.checks


def _params(name: str, q: Tensor, k: Tensor, options: Options) -> FlashParams:
    used, alibi, scale, left, right, cap, _ = options
    rows, keys = q.shape[1], k.shape[1]
    if used is not None and _reads_values(q):
        _checks.index_tensors(f"reductions.{name}", None, used, (rows, keys), (rows, keys))
    return FlashParams(None, None, used, alibi, None, rows, keys, scale, left, right, cap)


def _run(name: str, q: Tensor, k: Tensor, p: FlashParams, options: Options, *args: Any) -> None:
    op = f"reductions_{name}"
    launcher(op, metadata(q, k, p), request, options[-1])(*args)


def _new(q: Tensor, *tail: int) -> Tensor:
    """[B, Hq, *tail] of the dtype of statistics."""
    return q.new_empty((q.shape[0], q.shape[2], *tail), dtype=_flash_ops._stat_dtype(q.dtype))


def _column_sums_out(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return _new(q, k.shape[1])


def _column_sums(
    q: Tensor, k: Tensor, lse: Tensor, row_weights: Tensor | None, *options: Any
) -> Tensor:
    p, out = _params("column_sums", q, k, options), _column_sums_out(q, k)
    _run("column_sums", q, k, p, options, q, k, lse, row_weights, p, out)
    return out


def _span_mass_out(q: Tensor, k: Tensor, lse: Tensor, boundaries: Tensor, *_: Any) -> Tensor:
    return _new(q, q.shape[1], boundaries.shape[0] - 1)


def _check_boundaries(boundaries: Tensor, keys: int) -> None:
    if _reads_values(boundaries):
        _reductions_checks.boundary_values("reductions.span_mass", boundaries, keys)


def _span_mass(q: Tensor, k: Tensor, lse: Tensor, boundaries: Tensor, *options: Any) -> Tensor:
    _check_boundaries(boundaries, k.shape[1])
    p, out = _params("span_mass", q, k, options), _span_mass_out(q, k, lse, boundaries)
    _run("span_mass", q, k, p, options, q, k, lse, boundaries, p, out)
    return out


def _span_bwd_out(
    dout: Tensor, q: Tensor, k: Tensor, lse: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), lse.new_empty(lse.shape)


def _span_bwd(
    dout: Tensor, q: Tensor, k: Tensor, lse: Tensor, boundaries: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_boundaries(boundaries, k.shape[1])
    p, grads = _params("span_mass", q, k, options), _span_bwd_out(dout, q, k, lse)
    _run("span_bwd", q, k, p, options, dout, q, k, lse, boundaries, p, grads)
    return grads


def _block_max_out(
    q: Tensor, k: Tensor, lse: Tensor | None, q_block: int, k_block: int, *_: Any
) -> Tensor:
    return _new(q, -(-q.shape[1] // q_block), -(-k.shape[1] // k_block))


def _block_max(
    q: Tensor, k: Tensor, lse: Tensor | None, q_block: int, k_block: int, *options: Any
) -> Tensor:
    p, out = _params("block_max", q, k, options), _block_max_out(q, k, lse, q_block, k_block)
    # A block past the end is the same block: kernels and padding stay within the tensors.
    blocks = min(q_block, max(1, q.shape[1])), min(k_block, max(1, k.shape[1]))
    _run("block_max", q, k, p, options, q, k, lse, blocks, p, out)
    return out


def _row_entropy_out(q: Tensor, *_: Any) -> Tensor:
    return _new(q, q.shape[1])


def _row_entropy(q: Tensor, k: Tensor, lse: Tensor, *options: Any) -> Tensor:
    p, out = _params("row_entropy", q, k, options), _row_entropy_out(q)
    _run("row_entropy", q, k, p, options, q, k, lse, p, out)
    return out


def _topk_keys_out(
    q: Tensor, k: Tensor, lse: Tensor | None, n: int, *_: Any
) -> tuple[Tensor, Tensor]:
    values = _new(q, q.shape[1], n)
    return values, values.new_empty(values.shape, dtype=torch.int32)


def _topk_keys(
    q: Tensor, k: Tensor, lse: Tensor | None, n: int, *options: Any
) -> tuple[Tensor, Tensor]:
    p, (values, indices) = _params("topk_keys", q, k, options), _topk_keys_out(q, k, lse, n)
    _run("topk_keys", q, k, p, options, q, k, lse, n, p, values, indices)
    return values, indices


def _edges_out(
    q: Tensor, k: Tensor, lse: Tensor, threshold: float, max_edges: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty((max_edges, 4), dtype=torch.int32),
        q.new_empty((max_edges,), dtype=_flash_ops._stat_dtype(q.dtype)),
        q.new_empty((), dtype=torch.int64),
    )


def _edges(
    q: Tensor, k: Tensor, lse: Tensor, threshold: float, max_edges: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    p, outputs = _params("edges", q, k, options), _edges_out(q, k, lse, threshold, max_edges)
    _run("edges", q, k, p, options, q, k, lse, threshold, p, *outputs)
    return outputs


def _head_gradient_out(dout: Tensor, out: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new(out, out.shape[1]), _new(out)


def _head_gradient(dout: Tensor, out: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    rows, sums = _head_gradient_out(dout, out)
    meta = (out.device, out.dtype)
    launcher("reductions_head_gradient", meta, head_request, backend)(dout, out, rows, sums)
    return rows, sums


def _define(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = f"reductions_{schema[: schema.index('(')]}"
    return _ops.define(f"reductions_{schema}", impl, fake, _flash_vmap.looped(name))


class operators:
    """The operators, bound once."""

    column_sums = _define(
        f"column_sums({_QKL}Tensor? row_weights, {_OPTIONS}) -> Tensor",
        _column_sums,
        _column_sums_out,
    )
    span_mass = _define(
        f"span_mass({_QKL}Tensor boundaries, {_OPTIONS}) -> Tensor", _span_mass, _span_mass_out
    )
    span_bwd = _define(
        f"span_bwd(Tensor dout, {_QKL}Tensor boundaries, {_OPTIONS}) "
        "-> (Tensor dq, Tensor dk, Tensor dlse)",
        _span_bwd,
        _span_bwd_out,
    )
    block_max = _define(
        f"block_max({_QKL_OR_LOGITS}SymInt q_block, SymInt k_block, {_OPTIONS}) -> Tensor",
        _block_max,
        _block_max_out,
    )
    row_entropy = _define(
        f"row_entropy({_QKL}{_OPTIONS}) -> Tensor", _row_entropy, _row_entropy_out
    )
    topk_keys = _define(
        f"topk_keys({_QKL_OR_LOGITS}SymInt n, {_OPTIONS}) -> (Tensor values, Tensor indices)",
        _topk_keys,
        _topk_keys_out,
    )
    edges = _define(
        f"edges({_QKL}float threshold, SymInt max_edges, {_OPTIONS}) "
        "-> (Tensor where, Tensor prob, Tensor total)",
        _edges,
        _edges_out,
    )
    head_gradient = _define(
        "head_gradient(Tensor dout, Tensor out, str? backend) -> (Tensor rows, Tensor sums)",
        _head_gradient,
        _head_gradient_out,
    )
