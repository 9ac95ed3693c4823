"""Run a `Plan` of `_mask_plan` on `attnforge.flash_attention`: batched, packed or piece by piece.

Three ways, all exact:

- every batch entry has the same piece: one batched call on narrowed views, nothing copied;
- packed: the real tokens are gathered into one varlen call per band and the outputs scattered
  back (training, short rows, accelerators);
- piece by piece on views: when copying the keys would cost more than another call, which is
  cached decode of a padded batch: no copy of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnforge
from attnforge.integrations._mask_plan import Group, MaskSpec, Piece, Plan

__all__ = ["Options", "run_plan", "run_spec"]

Options = dict[str, Any]
"""softmax_scale, softcap and sinks of one call."""

# Gathering moves each K and V byte twice at about 10 GB/s; another operator call costs about
# 20 microseconds. They meet near 128 KiB of K and V per piece.
_GATHER_BYTES = 128 * 1024

At = tuple[Tensor, Tensor]


class _Gather(torch.autograd.Function):
    """x[batch, row] of a [B, S, H, D] tensor; the (batch, row) pairs are distinct."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(batch, row)
        ctx.shape = x.shape
        return x[batch, row]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        batch, row = ctx.saved_tensors
        # Distinct targets: plain stores, where indexing's own backward would accumulate serially.
        return grad.new_zeros(ctx.shape).index_put_((batch, row), grad), None, None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Gather`: [T, H, D] into rows of a zero [B, S, H, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Tensor, row: Tensor, b: int, s: int) -> Tensor:
        ctx.save_for_backward(batch, row)
        return x.new_zeros(b, s, *x.shape[1:]).index_put_((batch, row), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        batch, row = ctx.saved_tensors
        return grad[batch, row], None, None, None, None


def run_spec(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, options: Options) -> Tensor:
    """Attention under a described mask. q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv].

    Returns [B, Sq, Hq, Dv]; query rows that are padding, or that see nothing, are 0.
    """
    if isinstance(spec.delta, Tensor):
        # Lengths known only to the graph: bottom-right over the used part of the cache.
        used = (spec.delta + spec.q_len).to(torch.int32).expand(q.shape[0]).contiguous()
        window = (spec.band.left, spec.band.right)
        out: Tensor = attnforge.flash_attention(
            q, k, v, causal=True, window_size=window, seqused_k=used, **options
        )
        return out
    return run_plan(q, k, v, spec.plan(), options)


def run_plan(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Options) -> Tensor:
    """Attention of the pieces of a plan; shapes as in `run_spec`."""
    if plan.uniform is not None:
        return _batched(q, k, v, plan.uniform, options)
    if not plan.pieces:
        # Connected to the inputs, so that a backward pass finds zero gradients and not none.
        none = q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum()
        return q.new_zeros(*q.shape[:3], v.shape[-1]) + none
    if _by_piece(q, k, v, plan.pieces, options):
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for p in plan.pieces:
            rows, keys, b = slice(p.q0, p.q1), slice(p.k0, p.k1), slice(p.batch, p.batch + 1)
            out[b, rows] = attnforge.flash_attention(
                q[b, rows], k[b, keys], v[b, keys], **_band(p), **options
            )
        return out
    parts = [_packed(q, k, v, group, options) for group in plan.groups(q.device)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part  # rows are disjoint: every other part holds zeros there
    return total


def _band(p: Piece) -> Options:
    return {"causal": p.causal, "window_size": (p.left, p.right)}


def _batched(q: Tensor, k: Tensor, v: Tensor, p: Piece, options: Options) -> Tensor:
    rows = q.shape[1]
    if (p.q0, p.q1) != (0, rows):
        q = q[:, p.q0 : p.q1]
    if (p.k0, p.k1) != (0, k.shape[1]):
        k, v = k[:, p.k0 : p.k1], v[:, p.k0 : p.k1]
    out: Tensor = attnforge.flash_attention(q, k, v, **_band(p), **options)
    if (p.q0, p.q1) != (0, rows):
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, p.q0, rows - p.q1))
    return out


def _by_piece(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], options: Options) -> bool:
    sinks = options.get("sinks")
    tensors = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False  # the backward pass of a view of one row fills a whole-batch gradient
    if q.device.type != "cpu" or any(p.q_index is not None for p in pieces):
        return False
    per_key = k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    keys = sum(p.k1 - p.k0 for p in pieces)
    return keys * per_key > _GATHER_BYTES * len(pieces)


def _take(x: Tensor, at: At | None, span: tuple[int, int], unique: bool) -> Tensor:
    """Packed tokens [T, H, D] of [B, S, H, D]."""
    if at is None:
        return x[0, span[0] : span[1]]
    if not unique:
        return x[at]
    taken: Tensor = _Gather.apply(x, *at)  # type: ignore[no-untyped-call]
    return taken


def _packed(q: Tensor, k: Tensor, v: Tensor, group: Group, options: Options) -> Tensor:
    out: Tensor = attnforge.flash_attention_varlen(
        _take(q, group.q_at, group.q_range, True),
        _take(k, group.k_at, group.k_range, group.unique_keys),
        _take(v, group.k_at, group.k_range, group.unique_keys),
        cu_seqlens_q=group.cu_q,
        cu_seqlens_k=group.cu_k,
        max_seqlen_q=group.max_q,
        max_seqlen_k=group.max_k,
        **_band(group.pieces[0]),
        **options,
    )
    batch, rows = q.shape[:2]
    if group.q_at is None:
        first, last = group.q_range
        spread = torch.nn.functional.pad(out, (0, 0, 0, 0, first, rows - last)).unsqueeze(0)
        # One batch entry has pieces; the others, if any, are padding throughout.
        return torch.nn.functional.pad(spread, (0, 0, 0, 0, 0, 0, 0, batch - 1))
    scattered: Tensor = _Scatter.apply(out, *group.q_at, batch, rows)  # type: ignore[no-untyped-call]
    return scattered
