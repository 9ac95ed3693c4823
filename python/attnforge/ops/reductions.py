"""Statistics of the attention matrix P = exp(S - LSE), from Q, K and LSE, tile by tile.

    out, lse = attnforge.flash_attention(q, k, v, causal=True, return_lse=True)
    mass = attnforge.reductions.column_sums(q, k, lse, causal=True)          # [B, Hq, Sk]

No function holds an Sq x Sk buffer. Give the options that the attention had: masks, softcap,
ALiBi, ``seqused_k``, scale. Sinks need no mention, the LSE has them; rows of P then sum to less
than 1. All functions take

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], lse [B, Hq, Sq] as ``return_lse=True`` gives it

and, as ``flash_attention`` does, ``causal window_size softcap alibi_slopes seqused_k softmax_scale
backend``. A row with an LSE of -inf has no probabilities. To look at the last rows alone, cut q
and lse: masks are aligned to the last key. Results are fp32 (fp64 beside fp64) and, but for
``span_mass``, carry no gradient. Cost: 2 D flops per visible pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashParams
from attnforge.ops import _checks, _reductions_autograd, _reductions_checks, _reductions_ops
from attnforge.ops._reductions_ops import operators
from attnforge.ops.flash import _autocast, _choice, _stat_inputs
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = [
    "Edges",
    "block_max",
    "column_sums",
    "edges",
    "head_gradient",
    "row_entropy",
    "span_mass",
    "topk_keys",
]

Window = tuple[int, int]
Scores = tuple[Tensor, Tensor, Any, tuple[Any, ...]]  # q, k, lse, options of the operator


def _stat(x: Tensor, q: Tensor) -> Tensor:
    return x.to(torch.float64 if q.dtype is torch.float64 else torch.float32)


def _scores(
    name: str,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
    gradient: bool = False,
) -> Scores:
    """Checked and normalised operands, and the options in the order of the operators."""
    op = f"reductions.{name}"
    q, k, _ = _autocast(op, q, k, k)
    _reductions_checks.scores(op, q, k, lse)
    _checks.lengths(op, "seqused_k", seqused_k, q, q.shape[0])
    left, right = _checks.window(op, window_size, causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(op, scale, softcap)
    if alibi_slopes is not None:
        _checks.per_head(op, q, q.shape[0], alibi_slopes, None)
        alibi_slopes, _ = _stat_inputs(q, alibi_slopes, None)
    if not gradient:
        q, k, lse = q.detach(), k.detach(), None if lse is None else lse.detach()
    lse = None if lse is None else _stat(lse, q)
    scalars = (scale, left, right, softcap)
    return q, k, lse, (seqused_k, alibi_slopes, *scalars, _choice(op, backend))


def _requester(name: str, *also: str) -> Callable[..., Sequence[Request]]:
    """The requests of a function: of its own operator and of those of ``also``."""

    def requests(q: Tensor, k: Tensor, lse: Tensor | None, *_: Any, **more: Any) -> Any:
        options = {n: x for n, x in more.items() if n in _OPTIONS}
        q, k, _lse, (used, alibi, *scalars) = _scores(name, q, k, lse, **options)
        sizes = (q.shape[1], k.shape[1])
        p = FlashParams(None, None, used, alibi, None, *sizes, *scalars[:4])
        meta = _reductions_ops.metadata(q, k, p)
        return [_reductions_ops.request(f"reductions_{n}", meta) for n in (name, *also)]

    return requests


_OPTIONS = ("causal", "window_size", "softcap", "alibi_slopes", "seqused_k", "softmax_scale")


@explained_by(_requester("column_sums"))
def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    row_weights: Tensor | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Accumulated mass of each key: sum_i w_i P_ij -> [B, Hq, Sk] (H2O, SnapKV, heavy hitters).

    row_weights: [B, Hq, Sq], default 1. A row of weight 0 is left out, whatever it holds.
    """
    op = "reductions.column_sums"
    q, k, lse, options = _scores(
        "column_sums", q, k, lse, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, seqused_k=seqused_k, softmax_scale=softmax_scale,
        backend=backend,
    )  # fmt: skip
    if row_weights is not None:
        _reductions_checks.row_stat(op, "row_weights", row_weights, q)
        row_weights = _stat(row_weights.detach(), q)
    out: Tensor = operators.column_sums(q, k, lse, row_weights, *options)
    return out


@explained_by(_requester("span_mass", "span_bwd"))
def span_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mass of each row on spans of keys -> [B, Hq, Sq, n]; differentiable in q, k and lse.

    boundaries: [n + 1] int32, rising within 0 .. Sk; span t is keys boundaries[t] ..
    boundaries[t + 1] - 1. Keys outside all spans count nowhere; spans may be empty.

    P is exp(S - lse) with lse an input: d/dlse is -mass. Give the LSE that
    ``flash_attention`` returned, with its gradient, and q and k get the gradient of the softmax.
    """
    q, k, lse, options = _scores(
        "span_mass", q, k, lse, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, seqused_k=seqused_k, softmax_scale=softmax_scale,
        backend=backend, gradient=True,
    )  # fmt: skip
    _reductions_checks.boundaries("reductions.span_mass", boundaries, q)
    out: Tensor = _reductions_autograd.span_mass(q, k, lse, boundaries, *options)
    return out


@explained_by(_requester("block_max"))
def block_max(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    q_block: int,
    k_block: int,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Largest P of each block -> [B, Hq, ceil(Sq / q_block), ceil(Sk / k_block)] (SeerAttention).

    Blocks count from row 0 and key 0. lse=None takes the logits instead. A block without a
    visible pair is 0, of logits -inf; a NaN in a block is its maximum.
    """
    op = "reductions.block_max"
    _reductions_checks.positive(op, "q_block", q_block)
    _reductions_checks.positive(op, "k_block", k_block)
    q, k, lse, options = _scores(
        "block_max", q, k, lse, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, seqused_k=seqused_k, softmax_scale=softmax_scale,
        backend=backend,
    )  # fmt: skip
    out: Tensor = operators.block_max(q, k, lse, q_block, k_block, *options)
    return out


@explained_by(_requester("row_entropy"))
def row_entropy(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entropy of each row in nats: -sum_j P_ij log P_ij -> [B, Hq, Sq], with 0 log 0 = 0."""
    q, k, lse, options = _scores(
        "row_entropy", q, k, lse, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, seqused_k=seqused_k, softmax_scale=softmax_scale,
        backend=backend,
    )  # fmt: skip
    out: Tensor = operators.row_entropy(q, k, lse, *options)
    return out


@explained_by(_requester("topk_keys"))
def topk_keys(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    n: int,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The n keys of the largest logits of each row -> values, indices int32 [B, Hq, Sq, n].

    Values are probabilities, or with lse=None logits. Best first by logit (two logits may round
    to one P), ties to the smaller key, a NaN before everything. Where a row sees fewer keys the
    index is -1 and the value 0, of logits -inf.
    """
    _reductions_checks.positive("reductions.topk_keys", "n", n)
    q, k, lse, options = _scores(
        "topk_keys", q, k, lse, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, seqused_k=seqused_k, softmax_scale=softmax_scale,
        backend=backend,
    )  # fmt: skip
    values, indices = operators.topk_keys(q, k, lse, n, *options)
    return values, indices


class Edges(NamedTuple):
    """Edges in lexicographic order; the first ``min(total, max_edges)`` entries are edges.

    Fixed sizes, so that no call waits for a device and ``torch.compile`` needs no break.
    """

    where: Tensor  # [max_edges, 4] int32: batch, query head, query, key; -1 behind the last edge
    prob: Tensor  # [max_edges]; 0 behind the last edge
    total: Tensor  # [] int64: all edges, also those that found no room

    @property
    def overflow(self) -> Tensor:
        """[] bool: whether edges were left out; ``total`` then says how many there are."""
        return self.total > self.prob.shape[0]

    def trimmed(self) -> tuple[Tensor, Tensor]:
        """where and prob of the edges that were kept; reads ``total``."""
        kept = min(int(self.total), self.prob.shape[0])
        return self.where[:kept], self.prob[:kept]


@explained_by(_requester("edges"))
def edges(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    threshold: float,
    max_edges: int,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Edges:
    """All (batch, head, query, key) with P > threshold, as a list of at most max_edges.

    threshold >= 0. Two passes, the first of which counts: the list is the same at every call,
    and of too many edges the first ones are kept. A NaN is no edge.
    """
    op = "reductions.edges"
    _reductions_checks.threshold(op, threshold)
    _reductions_checks.positive(op, "max_edges", max_edges)
    q, k, lse, options = _scores(
        "edges", q, k, lse, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, seqused_k=seqused_k, softmax_scale=softmax_scale,
        backend=backend,
    )  # fmt: skip
    return Edges(*operators.edges(q, k, lse, float(threshold), max_edges, *options))


def _head_requests(dout: Tensor, out: Tensor, *, per_row: bool = False) -> Sequence[Request]:
    _reductions_checks.same_outputs("reductions.head_gradient", dout, out)
    meta = (out.device, out.dtype)
    return [_reductions_ops.head_request("reductions_head_gradient", meta)]


@explained_by(_head_requests)
def head_gradient(
    dout: Tensor, out: Tensor, *, per_row: bool = False, backend: str | None = None
) -> Tensor:
    """Importance of heads: sum over rows and channels of dO * O -> [B, H].

    That is the derivative of the loss by a factor on the head's output, at 1. dout, out:
    [B, S, H, D] of one dtype. per_row=True gives the sum over channels alone, [B, H, S].
    """
    op = "reductions.head_gradient"
    _reductions_checks.same_outputs(op, dout, out)
    choice = _choice(op, backend)
    rows, sums = operators.head_gradient(dout.detach(), out.detach(), choice)
    found: Tensor = rows if per_row else sums
    return found
