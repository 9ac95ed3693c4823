"""Which keys to attend to: scores of keys, pages and centroids, and selections without a sync.

    scores = retrieval.score_pages(q, page_min, page_max)           # [B, Hq, Sq, pages]
    ids, lens = retrieval.select_topk(scores[:, :, 0], 64)          # [B, Hq, 64] ascending
    out = indexed_attention(q, k, v, ids=..., lens=lens)

Scores are fp32, a selection is int32 ids in ascending order with -1 behind, and its lengths. How
long a selection may be is known from the arguments alone, so nothing waits for a device and all of
it may be captured in a graph. None of this has a gradient: a choice is not differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import _checks, _retrieval_ops
from attnforge.ops._checks import _name, _shape, fail
from attnforge.ops.flash import _choice

__all__ = [
    "by_group", "page_bounds", "page_tokens", "quantize_bounds", "score_centroids", "score_keys",
    "score_pages", "select_threshold", "select_topk", "select_topp",
]  # fmt: skip


def _query(op: str, q: Any, k: Any, name: str, rank: int = 4) -> None:
    _checks.tensor(op, "q", q)
    _checks.tensor(op, name, k)
    if q.dim() != 4 or q.dtype not in _checks._DTYPES:
        fail(op, f"q is {_name(q.dtype)} {_shape(q)}; want a floating [batch, rows, heads, "
                 "head_dim]")  # fmt: skip
    if k.dim() != rank or k.shape[-1] != q.shape[-1] or k.device != q.device:
        fail(op, f"{name} has shape {_shape(k)} on {k.device}; want {rank} dims with head_dim "
                 f"{q.shape[-1]} on {q.device}")  # fmt: skip
    heads = k.shape[-2]
    if heads == 0 or q.shape[2] % heads:
        fail(op, f"query heads are no multiple of the heads of {name}; got {q.shape[2]} and "
                 f"{heads}; want heads_q % heads_kv == 0")  # fmt: skip


def _scale(op: str, q: Tensor, softmax_scale: float | None) -> float:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(op, scale, 0.0)
    return scale


def _table(op: str, q: Tensor, table: Any, used: Any) -> None:
    if table is not None:
        _checks.tensor(op, "block_table", table)
        if table.dim() != 2 or table.shape[0] != q.shape[0] or table.dtype is not torch.int32:
            fail(op, f"block_table is {_name(table.dtype)} {_shape(table)}; want int32 "
                     f"[{q.shape[0]}, max_pages]")  # fmt: skip
        if used is None:
            fail(op, "cache_seqlens is missing beside block_table; want int32 [batch]")
    _checks.lengths(op, "cache_seqlens", used, q, q.shape[0])


def score_keys(
    q: Tensor,
    k: Tensor,
    *,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Logits scale <q, k> of every key: fp32 [B, Hq, Sq, N], -inf at and past cache_seqlens.

    q [B, Sq, Hq, D], k [B, N, Hk, D], or pages [P, page_size, Hk, D] with block_table [B, M] and
    cache_seqlens [B] (then N = M * page_size). Reads k once for all heads of a group.
    """
    op = "score_keys"
    _query(op, q, k, "k")
    _table(op, q, block_table, cache_seqlens)
    if q.dtype is not k.dtype or (block_table is None and k.shape[0] != q.shape[0]):
        fail(op, f"q is {_name(q.dtype)} {_shape(q)}, k {_name(k.dtype)} {_shape(k)}; want one "
                 "dtype and batch size")  # fmt: skip
    scale = _scale(op, q, softmax_scale)
    scores: Tensor = _retrieval_ops.key_scores(
        q, k, block_table, cache_seqlens, None, scale, _choice(op, backend)
    )
    return scores


def score_centroids(
    q: Tensor,
    centroids: Tensor,
    counts: Tensor,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The log share of a key of each cluster: a_j - log sum_i counts_i exp(a_i), a = scale <q, c>.

    q [B, Sq, Hq, D], centroids [B, C, Hk, D] of q's dtype, counts [B, Hk, C] int32. Returns fp32
    [B, Hq, Sq, C]: exp of it is Squeezed Attention's estimate of a key's softmax weight, and
    sum_j counts_j exp(score_j) = 1. Empty clusters are -inf. Logits of any size are safe: the
    maximum is taken out before exp.
    """
    op = "score_centroids"
    _query(op, q, centroids, "centroids")
    if q.dtype is not centroids.dtype or centroids.shape[0] != q.shape[0]:
        fail(op, f"q is {_name(q.dtype)} {_shape(q)}, centroids {_name(centroids.dtype)} "
                 f"{_shape(centroids)}; want one dtype and batch size")  # fmt: skip
    want = (centroids.shape[0], centroids.shape[2], centroids.shape[1])
    if not isinstance(counts, Tensor) or tuple(counts.shape) != want or (
        counts.dtype is not torch.int32
    ):  # fmt: skip
        fail(op, f"counts must be int32 [batch, heads_kv, clusters] = {want}")
    scale = _scale(op, q, softmax_scale)
    scores: Tensor = _retrieval_ops.key_scores(
        q, centroids, None, None, counts, scale, _choice(op, backend)
    )
    return scores


def score_pages(
    q: Tensor,
    page_min: Tensor,
    page_max: Tensor,
    *,
    page_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    used: Tensor | None = None,
    grouped: bool = False,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Upper bounds of the logits in each page: sum over channels of scale max(q min, q max).

    q [B, Sq, Hq, D]. page_min, page_max: [B, N, Hk, D], or [P, Hk, D] as ``paged_append`` keeps
    them, with block_table [B, N]; floating, rounded outwards if in 16 bits (``page_bounds``), or
    int8 times page_scale, fp32 [B, N, Hk] or [P, Hk] (``quantize_bounds``).
    used: int32 [B] pages in use; the others are -inf. grouped: the largest bound of the query heads
    of each KV head. Returns fp32 [B, Hq, Sq, N], or [B, Hk, Sq, N] grouped. Source: Quest, Tang et
    al., 2024, algorithm 1.
    """
    op = "score_pages"
    rank = 4 if block_table is None else 3
    for name, x in (("page_min", page_min), ("page_max", page_max)):
        _query(op, q, x, name, rank)
    if page_min.shape != page_max.shape or page_min.dtype is not page_max.dtype:
        fail(op, f"page_min is {_shape(page_min)}, page_max {_shape(page_max)}; want one shape and "
                 "dtype")  # fmt: skip
    if block_table is not None:
        _table(op, q, block_table, used if used is not None else q.new_zeros(
            q.shape[0], dtype=torch.int32))  # fmt: skip
    elif page_min.shape[0] != q.shape[0]:
        fail(op, f"page_min has batch {page_min.shape[0]}; want {q.shape[0]} like q")
    _checks.lengths(op, "used", used, q, q.shape[0])
    page_min, page_max, page_scale = _codes(op, page_min, page_max, page_scale, backend)
    scale = _scale(op, q, softmax_scale)
    scores: Tensor = _retrieval_ops.page_scores(
        q, page_min, page_max, page_scale, block_table, used, scale, grouped, _choice(op, backend)
    )
    return scores


def _codes(
    op: str, low: Tensor, high: Tensor, scale: Any, backend: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bounds in int8 as they are where a kernel reads them, else as fp32."""
    if (low.dtype is torch.int8) != (scale is not None):
        fail(op, f"page_min is {_name(low.dtype)}, page_scale "
                 f"{'given' if scale is not None else 'None'}; want a page_scale with int8 bounds "
                 "and with no others")  # fmt: skip
    if scale is None:
        return low, high, None
    _checks.tensor(op, "page_scale", scale)
    if scale.shape != low.shape[:-1] or scale.dtype is not torch.float32 or (
        scale.device != low.device
    ):  # fmt: skip
        fail(op, f"page_scale is {_name(scale.dtype)} {_shape(scale)} on {scale.device}; want "
                 f"float32 {tuple(low.shape[:-1])} on {low.device}")  # fmt: skip
    if low.device.type == "cpu" and backend in (None, "cpu", "reference"):
        return low, high, scale
    return low * scale.unsqueeze(-1), high * scale.unsqueeze(-1), None


def page_bounds(k: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The least and largest key of each page of k [B, S, Hk, D] per channel: two [B, N, Hk, D].

    They are of k's dtype, which holds them exactly. A shorter last page has its own keys only.
    """
    if page_size < 1:
        fail("page_bounds", f"page_size is {page_size}; want at least 1")
    b, s, h, d = k.shape
    rest = -s % page_size
    found = []
    for name, fill in (("amin", math.inf), ("amax", -math.inf)):
        x = torch.cat([k, k.new_full((b, rest, h, d), fill)], 1) if rest else k
        found.append(getattr(x.reshape(b, -1, page_size, h, d), name)(2))
    return found[0], found[1]


def quantize_bounds(page_min: Tensor, page_max: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds [.., Hk, D] in int8, rounded outwards, and the scale of each page and head [.., Hk].

    Half of the bytes of bf16 for ``score_pages``; a bound is at most a 127th of the page's largest
    magnitude further out. A page with a NaN or an infinity has a scale that is not finite, and its
    scores are NaN.
    """
    most = torch.maximum(page_min.abs(), page_max.abs()).amax(-1).float()
    scale = torch.where(most == 0, 1.0, most * ((1 + 2.0**-20) / 127))
    low, high = (x.float() / scale.unsqueeze(-1) for x in (page_min, page_max))
    low, high = (x.clamp(-127, 127).nan_to_num().to(torch.int8) for x in (low.floor(), high.ceil()))
    return low, high, scale


def page_tokens(pages: Tensor, page_size: int) -> Tensor:
    """Ids of pages [.., N] as ids of their keys [.., N * page_size]; -1 stays -1."""
    slot = torch.arange(page_size, dtype=torch.int32, device=pages.device)
    tokens = torch.add(slot, pages.unsqueeze(-1), alpha=page_size)
    return tokens.clamp_min_(-1).flatten(-2)  # of page -1 all are negative


def by_group(x: Tensor, heads_kv: int) -> Tensor:
    """[B, Hq, ..] as [B, Hk, G, ..]: the query heads of each KV head beside each other."""
    return x.reshape(x.shape[0], heads_kv, x.shape[1] // heads_kv, *x.shape[2:])


# ---- selection ----


def _select(
    op: str,
    scores: Any,
    lens: Any,
    kind: str,
    k: int,
    threshold: Tensor | None,
    mass: float,
    first: int,
    last: int,
    slots: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _checks.tensor(op, "scores", scores)
    if scores.dim() < 1 or not scores.dtype.is_floating_point:
        fail(op, f"scores is {_name(scores.dtype)} {_shape(scores)}; want floating [.., N]")
    for name, value in (("first", first), ("last", last), ("k", k), ("max_selected", slots)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0:
            fail(op, f"{name} is {value!r}; want an int >= 0")
    lead = scores.shape[:-1]
    if lens is not None:
        _checks.tensor(op, "lens", lens)
        if lens.shape != lead or lens.dtype is not torch.int32:
            fail(op, f"lens is {_name(lens.dtype)} {_shape(lens)}; want int32 {tuple(lead)}: the "
                     "columns of each row in use")  # fmt: skip
        lens = lens.reshape(-1)
    rows = scores.detach().float().reshape(lead.numel(), scores.shape[-1])
    ids, counts = _retrieval_ops.select_columns(
        rows, lens, kind, k, threshold, mass, first, last, slots, _choice(op, backend)
    )
    return ids.view(*lead, slots), counts.view(lead)


def select_topk(
    scores: Tensor,
    k: int,
    *,
    lens: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest columns of each row of scores [.., N]: ids [.., k] ascending, lens [..].

    Of equal scores the later column wins. NaN and -inf are never chosen, so a row may give fewer
    than k. lens: int32 [..] columns in use. first, last: so many columns at either end of those in
    use are chosen whatever they score, and count towards k. Work: a few passes over the row.
    """
    op = "select_topk"
    if isinstance(k, int) and k >= 0 and first + last > k:
        fail(
            op, f"first + last is {first + last}; got k {k}; want at most k: they count towards it"
        )
    return _select(op, scores, lens, "topk", k, None, 1.0, first, last, k, backend)


def select_threshold(
    scores: Tensor,
    threshold: float | Tensor,
    *,
    lens: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    max_selected: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns of at least ``threshold``: ids [.., max_selected] ascending, lens [..].

    threshold: a number, or a tensor that broadcasts to scores.shape[:-1]. max_selected: None is N;
    what finds no room (the later columns) is left out. NaN and -inf are never chosen; a NaN
    threshold chooses nothing. lens, first, last: as in ``select_topk``.
    """
    op = "select_threshold"
    _checks.tensor(op, "scores", scores)
    limit = torch.as_tensor(threshold, dtype=torch.float32, device=scores.device)
    if limit.dim():
        limit = limit.expand(scores.shape[:-1])
    slots = scores.shape[-1] if max_selected is None else max_selected
    limit = limit.reshape(-1).contiguous()
    return _select(op, scores, lens, "threshold", 0, limit, 1.0, first, last, slots, backend)


def select_topp(
    scores: Tensor,
    p: float,
    *,
    lens: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    max_selected: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The fewest columns whose softmax mass is at least p: ids ascending, lens [..].

    scores [.., N] are logits. Forced columns (first, last) count with their mass. p >= 1 chooses
    all but -inf and NaN. Of equal scores the later column wins. Sums are fp64. Source: Twilight,
    Lin et al., 2025, without its assumption that the first key has the largest score.
    """
    op = "select_topp"
    if not isinstance(p, (int, float)) or not p >= 0:
        fail(op, f"p is {p!r}; want a number >= 0")
    _checks.tensor(op, "scores", scores)
    slots = scores.shape[-1] if max_selected is None else max_selected
    return _select(op, scores, lens, "topp", 0, None, float(p), first, last, slots, backend)
