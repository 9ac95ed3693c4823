"""Operators that score and select keys, and those of LSH: schemas, outputs, a kernel picked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _ops
from attnforge._params import SelectParams
from attnforge.ops import _flash_ops
from attnforge.registry.select import device_arch, launcher
from attnforge.registry.spec import Request

__all__ = [
    "cluster_sums", "expand_runs", "key_scores", "lsh_attend", "lsh_encode", "lsh_insert",
    "lsh_retrieve", "lsh_truncate", "nearest", "page_scores", "request", "select_columns",
    "served_by",
]  # fmt: skip


def _meta(x: Tensor, head_dim: int = 0, group: int = 1, *used: str) -> tuple[Any, ...]:
    return x.device, x.dtype, head_dim, group, used


def request(op: str, meta: tuple[Any, ...]) -> Request:
    """The Request that an operator's metadata stands for."""
    device, dtype, head_dim, group, used, *v_head_dim = meta
    kind, arch = device_arch(device)
    dims: tuple[tuple[str, int], ...] = ()
    if head_dim:
        dims = (("head_dim", head_dim), ("group", group))
    dims += tuple(("v_head_dim", n) for n in v_head_dim)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(op, kind, arch, dtype, dims, frozenset(used), deterministic)


def served_by(x: Tensor, backend: str | None = None) -> str | None:
    """The choice for operators that have no kernel for GPUs: the reference serves them there."""
    return "reference" if x.device.type != "cpu" or backend == "reference" else None


def _alloc_scores(q: Tensor, columns: int, heads: int | None = None) -> Tensor:
    shape = (q.shape[0], q.shape[2] if heads is None else heads, q.shape[1], columns)
    return q.new_empty(shape, dtype=_flash_ops._stat_dtype(q.dtype))


def _columns(k: Tensor, block_table: Tensor | None) -> int:
    return k.shape[1] if block_table is None else block_table.shape[1] * k.shape[1]


def _key_scores(
    q: Tensor,
    k: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    counts: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    out = _alloc_scores(q, _columns(k, block_table))
    used = {"paged": block_table is not None, "seqused_k": cache_seqlens is not None}
    meta = _meta(q, q.shape[3], q.shape[2] // k.shape[2], *(n for n, on in used.items() if on))
    launch = launcher("key_scores", meta, request, backend)
    launch(q, k, block_table, cache_seqlens, counts, scale, out)
    return out


def _key_scores_fake(q: Tensor, k: Tensor, block_table: Tensor | None, *rest: Any) -> Tensor:
    return _alloc_scores(q, _columns(k, block_table))


def _page_scores(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_scale: Tensor | None,
    block_table: Tensor | None,
    used: Tensor | None,
    scale: float,
    grouped: bool,
    backend: str | None,
) -> Tensor:
    names = {"paged": block_table is not None, "seqused_k": used is not None}
    meta = _meta(q, q.shape[3], q.shape[2] // low.shape[-2], *(n for n, on in names.items() if on))
    out = _page_scores_fake(q, low, high, page_scale, block_table, used, scale, grouped)
    launch = launcher("page_scores", meta, request, backend)
    launch(q, low, high, page_scale, block_table, used, scale, grouped, out)
    return out


def _page_scores_fake(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_scale: Tensor | None,
    block_table: Tensor | None,
    used: Tensor | None,
    scale: float,
    grouped: bool,
    *rest: Any,
) -> Tensor:
    columns = (low if block_table is None else block_table).shape[1]
    return _alloc_scores(q, columns, low.shape[-2] if grouped else None)


def _alloc_select(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    ids = scores.new_empty((scores.shape[0], slots), dtype=torch.int32)
    return ids, scores.new_empty((scores.shape[0],), dtype=torch.int32)


def _select(scores: Tensor, used: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """rest: the fields of SelectParams, slots, backend."""
    *fields, slots, backend = rest
    outputs = _alloc_select(scores, slots)
    launch = launcher("select_columns", _meta(scores), request, backend)
    launch(scores, used, SelectParams(*fields), *outputs)
    return outputs


def _select_fake(scores: Tensor, used: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return _alloc_select(scores, rest[-2])


def _alloc_runs(columns: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    ids = columns.new_empty((columns.shape[0], slots))
    return ids, columns.new_empty((columns.shape[0],))


def _expand(
    columns: Tensor,
    lens: Tensor | None,
    starts: Tensor,
    tail_begin: int,
    tail_end: int,
    slots: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    outputs = _alloc_runs(columns, slots)
    launch = launcher("expand_runs", _meta(columns), request, backend)
    launch(columns, lens, starts, tail_begin, tail_end, *outputs)
    return outputs


def _expand_fake(columns: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _alloc_runs(columns, rest[-2])


def _alloc_labels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def _nearest(x: Tensor, centroids: Tensor, shift: Tensor | None, backend: str | None) -> Tensor:
    labels = _alloc_labels(x)
    launcher("nearest", _meta(x), request, backend)(x, centroids, shift, labels)
    return labels


def _alloc_sums(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    counts = x.new_empty((x.shape[0], clusters), dtype=torch.int32)
    return x.new_empty((x.shape[0], clusters, x.shape[2])), counts


def _sums(x: Tensor, labels: Tensor, clusters: int, backend: str | None) -> tuple[Tensor, Tensor]:
    outputs = _alloc_sums(x, clusters)
    launcher("cluster_sums", _meta(x), request, backend)(x, labels, *outputs)
    return outputs


def _alloc_codes(x: Tensor, planes: Tensor, bits: int, tables: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], tables), dtype=torch.int16)


def _encode(
    x: Tensor, mean: Tensor | None, planes: Tensor, bits: int, tables: int, backend: str | None
) -> Tensor:
    codes = _alloc_codes(x, planes, bits, tables)
    launch = launcher("lsh_encode", _meta(x, x.shape[3]), request, backend)
    launch(x, mean, planes, bits, codes)
    return codes


def _encode_fake(
    x: Tensor, mean: Tensor | None, planes: Tensor, bits: int, tables: int, backend: str | None
) -> Tensor:
    return _alloc_codes(x, planes, bits, tables)


def _insert(
    starts: Tensor,
    ids: Tensor,
    bits: int,
    codes: Tensor,
    first: Tensor,
    count: Tensor,
    backend: str | None,
) -> None:
    launch = launcher("lsh_insert", _meta(codes), request, backend)
    launch(starts, ids, bits, codes, first, count)


def _truncate(starts: Tensor, ids: Tensor, bits: int, length: Tensor, backend: str | None) -> None:
    launcher("lsh_truncate", _meta(ids), request, backend)(starts, ids, bits, length)


def _alloc_hits(q: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], slots)
    ids = q.new_empty(shape, dtype=torch.int32)
    lens = q.new_empty(shape[:2], dtype=torch.int32)
    return ids, lens, q.new_empty(shape, dtype=torch.float32)


def _retrieve(
    starts: Tensor,
    table_ids: Tensor,
    bits: int,
    codes: Tensor,
    q: Tensor,
    k: Tensor,
    mean: Tensor | None,
    norms: Tensor,
    begin: Tensor,
    end: Tensor,
    min_hits: int,
    clip: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _alloc_hits(q, k.shape[1])
    meta = _meta(q, q.shape[3], q.shape[2] // k.shape[2])
    launch = launcher("lsh_retrieve", meta, request, backend)
    launch(starts, table_ids, bits, codes, q, k, mean, norms, begin, end, min_hits, clip, *outputs)
    return outputs


def _retrieve_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _alloc_hits(args[4], args[5].shape[1])


def _lsh_attend(
    starts: Tensor,
    table_ids: Tensor,
    bits: int,
    codes: Tensor,
    q: Tensor,
    k: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """rest: the other arguments of ``lsh_retrieve``, v, length, scale, backend."""
    *options, v, length, scale, backend = rest
    outputs = _alloc_attend(q, v)
    meta = (*_meta(q, q.shape[3], q.shape[2] // k.shape[2]), v.shape[3])
    launch = launcher("lsh_attend", meta, request, backend)
    launch(starts, table_ids, bits, codes, q, k, *options, v, length, scale, *outputs)
    return outputs


def _alloc_attend(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _flash_ops.alloc_fwd(q, v, False)[:2]


key_scores = _ops.define(
    "key_scores(Tensor q, Tensor k, Tensor? block_table, Tensor? cache_seqlens, Tensor? counts, "
    "float softmax_scale, str? backend) -> Tensor",
    _key_scores,
    _key_scores_fake,
)
page_scores = _ops.define(
    "page_scores(Tensor q, Tensor low, Tensor high, Tensor? page_scale, Tensor? block_table, "
    "Tensor? used, float softmax_scale, bool grouped, str? backend) -> Tensor",
    _page_scores,
    _page_scores_fake,
)
select_columns = _ops.define(
    "select_columns(Tensor scores, Tensor? used, str kind, SymInt k, Tensor? threshold, "
    "float mass, SymInt first, SymInt last, SymInt slots, str? backend) "
    "-> (Tensor ids, Tensor lens)",
    _select,
    _select_fake,
)
expand_runs = _ops.define(
    "expand_runs(Tensor columns, Tensor? lens, Tensor starts, SymInt tail_begin, SymInt tail_end, "
    "SymInt slots, str? backend) -> (Tensor ids, Tensor sizes)",
    _expand,
    _expand_fake,
)
nearest = _ops.define(
    "nearest(Tensor x, Tensor centroids, Tensor? shift, str? backend) -> Tensor",
    _nearest,
    lambda x, *rest: _alloc_labels(x),
)
cluster_sums = _ops.define(
    "cluster_sums(Tensor x, Tensor labels, SymInt clusters, str? backend) "
    "-> (Tensor sums, Tensor counts)",
    _sums,
    lambda x, labels, clusters, backend: _alloc_sums(x, clusters),
)
lsh_encode = _ops.define(
    "lsh_encode(Tensor x, Tensor? mean, Tensor planes, int bits, int tables, str? backend) "
    "-> Tensor",
    _encode,
    _encode_fake,
)
lsh_insert = _ops.define(
    "lsh_insert(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor codes, Tensor first, "
    "Tensor count, str? backend) -> ()",
    _insert,
    lambda *args: None,
)
lsh_truncate = _ops.define(
    "lsh_truncate(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor length, str? backend) -> ()",
    _truncate,
    lambda *args: None,
)
lsh_retrieve = _ops.define(
    "lsh_retrieve(Tensor starts, Tensor table_ids, int bits, Tensor codes, Tensor q, Tensor k, "
    "Tensor? mean, Tensor norms, Tensor begin, Tensor end, int min_hits, float clip, "
    "str? backend) -> (Tensor ids, Tensor lens, Tensor log_bias)",
    _retrieve,
    _retrieve_fake,
)
lsh_attend = _ops.define(
    "lsh_attend(Tensor starts, Tensor table_ids, int bits, Tensor codes, Tensor q, Tensor k, "
    "Tensor? mean, Tensor norms, Tensor begin, Tensor end, int min_hits, float clip, Tensor v, "
    "Tensor length, float softmax_scale, str? backend) -> (Tensor out, Tensor lse)",
    _lsh_attend,
    lambda *args: _alloc_attend(args[4], args[12]),
)
