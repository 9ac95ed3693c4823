"""``cuda.retrieval.*.sm80``: the CUDA C++ kernels of ``csrc/cuda/retrieval``.

Nothing here looks at a value of a tensor: grids cover what lists and tables have room for, and
blocks behind the end of a list leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge._params import FlashTape, IndexedGrads, IndexedParams, SelectParams
from attnforge.backends import _gpu
from attnforge.backends._key_lists import naming
from attnforge.backends.cuda import flash
from attnforge.backends.cuda._selftest import SelfTest
from attnforge.registry.predicates import Dim, Features
from attnforge.registry.spec import KernelSpec, Predicate

__all__ = ["SPECS"]


# ---- attention to listed keys ----


def indexed_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``indexed_fwd``. A forward of a backward, which wants out_lo, has no splits."""
    if out.numel() == 0:
        return
    group = 1 if p.ids.shape[1] == q.shape[2] else q.shape[2] // k.shape[2]
    low = out_lo if out_lo.dim() > 1 else None
    splits = _gpu.entry_splits(p.ids.shape[2], q.shape[1] * group) if low is None else 1
    parts = lses = None
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        lses = lse.new_empty((splits, *lse.shape))
    with _gpu.on(q.device):
        stream = _gpu.stream(q.device)
        flash._operator("indexed_fwd")(
            *map(_gpu.rows, (q, k, v)), *map(_gpu.contiguous, p[:5]), out, lse, low, parts, lses,
            p.softmax_scale, _gpu.ENTRIES, stream,
        )  # fmt: skip
        if parts is not None:
            flash._operator("merge_states")(parts, lses, out, lse, False, stream)


def indexed_bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: IndexedParams, grads: IndexedGrads
) -> None:
    """Launcher of ``indexed_bwd``; a list that all KV heads share gets the sum of its parts."""
    q, k, v, out, lse, out_lo = tape
    if q.numel() == 0 or k.numel() == 0 or p.ids.numel() == 0:
        for x in grads:
            x.zero_()
        return
    batch, lists, slots = p.ids.shape
    heads = q.shape[2] if lists == q.shape[2] else k.shape[2]  # that have a list each
    dbias = None
    if p.log_bias is not None:  # nothing is written behind the end of a list
        dbias = p.log_bias.new_zeros((batch, heads, slots))
    lse, named = lse.contiguous(), naming(k, p)
    room = (k.new_empty((batch, heads, slots, x.shape[3]), dtype=torch.float32) for x in (k, v))
    with _gpu.on(q.device):
        flash._operator("indexed_bwd")(
            _gpu.rows(dout), _gpu.contiguous(dlse), *map(_gpu.rows, (q, k, v, out)), lse,
            _gpu.rows(out_lo) if out_lo.dim() > 1 else None,
            *map(_gpu.contiguous, (p.ids, p.lens, p.log_bias, p.cache_seqlens)),
            *named[:2], *grads[:3], dbias, torch.empty_like(lse), *room, p.softmax_scale,
            _gpu.stream(q.device),
        )  # fmt: skip
    if dbias is not None:
        grads.dlog_bias.copy_(dbias.sum(1, keepdim=True) if lists == 1 else dbias)


# ---- scores and selections ----


def key_scores(
    q: Tensor, k: Tensor, block_table: Tensor | None, cache_seqlens: Tensor | None,
    counts: Tensor | None, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``key_scores``; counts make a second launch."""
    with _gpu.on(q.device):
        flash._operator("key_scores")(
            _gpu.rows(q), _gpu.rows(k),
            *map(_gpu.contiguous, (block_table, cache_seqlens, counts)), scale, out,
            _gpu.stream(q.device),
        )  # fmt: skip


def page_scores(
    q: Tensor, low: Tensor, high: Tensor, page_scale: None, block_table: Tensor | None,
    used: Tensor | None, scale: float, grouped: bool, out: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``page_scores``; the largest of a group is a second launch."""
    if grouped:
        each = out.new_empty((out.shape[0], q.shape[2], *out.shape[2:]))
        page_scores(q, low, high, None, block_table, used, scale, False, each)
        _gpu.top_of_groups(each, out)
        return
    with _gpu.on(q.device):
        flash._operator("page_scores")(
            q if q.stride(-1) == 1 else q.contiguous(),
            *map(_gpu.rows, (low, high)),
            *map(_gpu.contiguous, (block_table, used)), scale, out, _gpu.stream(q.device),
        )  # fmt: skip


def select_columns(
    scores: Tensor, used: Tensor | None, p: SelectParams, ids: Tensor, lens: Tensor
) -> None:
    """Launcher of ``select_columns``."""
    with _gpu.on(scores.device):
        flash._operator("select_columns")(
            scores.contiguous(), _gpu.contiguous(used), _KINDS.index(p.kind), p.k,
            _gpu.contiguous(p.threshold), p.mass, p.first, p.last, ids, lens,
            _gpu.stream(scores.device),
        )  # fmt: skip


# ---- LSH ----


def lsh_encode(x: Tensor, mean: Tensor | None, planes: Tensor, bits: int, codes: Tensor) -> None:
    """Launcher of ``lsh_encode``."""
    if bits == 0:  # one bucket
        codes.zero_()
        return
    with _gpu.on(x.device):
        flash._operator("lsh_encode")(
            x if x.stride(-1) == 1 else x.contiguous(), _gpu.contiguous(mean),
            planes.contiguous(), bits, codes, _gpu.stream(x.device),
        )  # fmt: skip


def lsh_insert(
    starts: Tensor, ids: Tensor, bits: int, codes: Tensor, first: Tensor, count: Tensor
) -> None:
    """Launcher of ``lsh_insert``: a launch per 32,768 rows."""
    with _gpu.on(ids.device):
        flash._operator("lsh_insert")(
            starts, ids, bits, *map(_gpu.contiguous, (codes, first, count)),
            _gpu.stream(ids.device),
        )  # fmt: skip


def lsh_truncate(starts: Tensor, ids: Tensor, bits: int, length: Tensor) -> None:
    """Launcher of ``lsh_truncate``."""
    with _gpu.on(ids.device):
        flash._operator("lsh_truncate")(
            starts, ids, bits, length.contiguous(), _gpu.stream(ids.device)
        )


def lsh_retrieve(
    starts: Tensor, table_ids: Tensor, bits: int, codes: Tensor, q: Tensor, k: Tensor,
    mean: Tensor | None, norms: Tensor, begin: Tensor, end: Tensor, min_hits: int, clip: float,
    ids: Tensor, lens: Tensor, log_bias: Tensor,
) -> None:  # fmt: skip
    """Launcher of ``lsh_retrieve``: keys are marked, listed, weighed."""
    shape = (*ids.shape[:2], table_ids.shape[2])  # segments
    marks = ids.new_empty((*shape, -(-table_ids.shape[4] // 32)))
    with _gpu.on(q.device):
        flash._operator("lsh_retrieve")(
            starts, table_ids, bits, codes.contiguous(), _gpu.rows(q), _gpu.rows(k),
            *map(_gpu.contiguous, (mean, norms, begin, end)), min_hits, clip, ids, lens, log_bias,
            marks, ids.new_empty(shape), _gpu.stream(q.device),
        )  # fmt: skip


def _spec(kind: str, requires: tuple[Predicate, ...], notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"cuda.retrieval.{kind}.sm80",
        op=kind,
        backend="cuda",
        launch=f"{__name__}:{kind}",
        requires=(*requires, flash._LIBRARY, SelfTest(f"retrieval.{kind}")),
        # As flash's: proved under the host emulator, not run on a GPU yet.
        score=40.0,
        notes=notes,
    )


_KINDS = ("topk", "threshold", "topp")  # of enum SelectKind
_ATTENTION = (*flash._SM80, *flash._SHAPES[:2])
_KEPT = Features("paged", "seqused_k")
_NARROW = Dim("head_dim", 8, 256, 8)
_TABLES = flash._SM80[:2]  # of codes, whatever the dtype of keys is

SPECS = (
    _spec(
        "indexed_fwd",
        (*_ATTENTION, _KEPT),
        "the decode kernel over the entries of a list, gathered by cp.async",
    ),
    _spec(
        "indexed_bwd",
        (*_ATTENTION, Features("seqused_k")),
        "dQ over lists, dK and dV summed over the entries of each key; no atomics",
    ),
    _spec("key_scores", (*flash._SM80, _NARROW, _KEPT), "keys stay, rows pass: K is read once"),
    _spec(
        "page_scores",
        (*flash._SM80, Dim("head_dim", 8, 576, 8), _KEPT),
        "bounds in registers of a warp, rows pass",
    ),
    _spec(
        "select_columns", flash._SM80, "histograms of the scores' bits, no sort; a block per row"
    ),
    _spec("lsh_encode", (*flash._SM80, _NARROW), "signs taken from the tiles of a product"),
    _spec("lsh_insert", _TABLES, "a stable counting sort of the new codes; a block per table"),
    _spec("lsh_truncate", _TABLES, "buckets end where bisection says; a block per table"),
    _spec(
        "lsh_retrieve",
        (*flash._SM80, _NARROW),
        "two bits per key in shared memory, a scan, probabilities of the hits",
    ),
)
