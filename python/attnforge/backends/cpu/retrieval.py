"""``cpu.retrieval.*``: the C++ kernels of ``csrc/cpu/retrieval``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import FlashTape, IndexedGrads, IndexedParams, SelectParams
from attnforge.backends.cpu.flash import _HeadDims, _native_op, _unit
from attnforge.registry.predicates import Available, Device, Dim, Dtypes, Features
from attnforge.registry.spec import KernelSpec

__all__ = ["SPECS"]


def _plain(x: Tensor | None) -> Tensor | None:
    """Small tensors as kernels take them (a no-op for all but sliced ones)."""
    return None if x is None else x.contiguous()


def _low(out_lo: Tensor) -> Tensor | None:
    return out_lo if out_lo.dim() > 1 else None


def indexed_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: IndexedParams, out: Tensor, lse: Tensor, out_lo: Tensor
) -> None:
    """Launcher of ``indexed_fwd``. Slots that no list uses are cut off: room is made for all."""
    if p.block_table is None:
        k, v = _unit(k), _unit(v)
    lists = [_plain(p.ids), _plain(p.log_bias)]
    if p.lens is not None and p.lens.numel():
        most = max(0, int(p.lens.max()))
        lists = [None if x is None else x[..., :most] for x in lists]
    ids, log_bias = lists
    _native_op("indexed_fwd")(
        _unit(q), k, v, ids, _plain(p.lens), log_bias,
        *map(_plain, (p.block_table, p.cache_seqlens)),
        p.softmax_scale, out, lse, _low(out_lo),
    )  # fmt: skip


def indexed_bwd(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, p: IndexedParams, grads: IndexedGrads
) -> None:
    """Launcher of ``indexed_bwd``; a list that all KV heads share gets the sum of its parts."""
    q, k, v, out, lse, out_lo = tape
    dbias = None
    if p.log_bias is not None:
        lists = max(p.ids.shape[1], k.shape[2])
        dbias = p.log_bias.new_zeros((p.ids.shape[0], lists, p.ids.shape[2]))
    _native_op("indexed_bwd")(
        _unit(dout),
        None if dlse is None else dlse.contiguous(),
        *map(_unit, (q, k, v, out)),
        lse.contiguous(),
        _low(out_lo),
        *map(_plain, (p.ids, p.lens, p.log_bias, p.cache_seqlens)),
        p.softmax_scale,
        *grads[:3],
        dbias,
    )
    if dbias is not None:
        shared = p.ids.shape[1] == 1
        grads.dlog_bias.copy_(dbias.sum(1, keepdim=True) if shared else dbias)


def key_scores(
    q: Tensor,
    k: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    counts: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Launcher of ``key_scores``."""
    _native_op("key_scores")(
        _unit(q), _unit(k), *map(_plain, (block_table, cache_seqlens, counts)), scale, out
    )


def page_scores(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_scale: Tensor | None,
    block_table: Tensor | None,
    used: Tensor | None,
    scale: float,
    grouped: bool,
    out: Tensor,
) -> None:
    """Launcher of ``page_scores``."""
    _native_op("page_scores")(
        *(*map(_unit, (q, low, high)), page_scale, *map(_plain, (block_table, used))),
        *(scale, grouped, out),
    )


_KINDS = ("topk", "threshold", "topp")


def select_columns(
    scores: Tensor, used: Tensor | None, p: SelectParams, ids: Tensor, lens: Tensor
) -> None:
    """Launcher of ``select_columns``."""
    _native_op("select_columns")(
        *(scores.contiguous(), _plain(used), _KINDS.index(p.kind), p.k, _plain(p.threshold)),
        *(p.mass, p.first, p.last, ids, lens),
    )


def expand_runs(
    columns: Tensor, lens: Tensor | None, starts: Tensor, begin: int, end: int, *outputs: Tensor
) -> None:
    """Launcher of ``expand_runs``."""
    _native_op("expand_runs")(
        columns.contiguous(), _plain(lens), starts.contiguous(), begin, end, *outputs
    )


def nearest(x: Tensor, centroids: Tensor, shift: Tensor | None, labels: Tensor) -> None:
    """Launcher of ``nearest``."""
    _native_op("nearest")(x.contiguous(), centroids.contiguous(), _plain(shift), labels)


def cluster_sums(x: Tensor, labels: Tensor, *outputs: Tensor) -> None:
    """Launcher of ``cluster_sums``."""
    _native_op("cluster_sums")(x.contiguous(), labels.contiguous(), *outputs)


def lsh_encode(x: Tensor, mean: Tensor | None, planes: Tensor, bits: int, codes: Tensor) -> None:
    """Launcher of ``lsh_encode``."""
    _native_op("lsh_encode")(_unit(x), _plain(mean), planes.contiguous(), bits, codes)


def lsh_insert(starts: Tensor, ids: Tensor, bits: int, codes: Tensor, *ends: Tensor) -> None:
    """Launcher of ``lsh_insert``."""
    _native_op("lsh_insert")(starts, ids, bits, codes.contiguous(), *map(_plain, ends))


def lsh_truncate(starts: Tensor, ids: Tensor, bits: int, length: Tensor) -> None:
    """Launcher of ``lsh_truncate``."""
    _native_op("lsh_truncate")(starts, ids, bits, length.contiguous())


def lsh_retrieve(
    starts: Tensor, ids: Tensor, bits: int, codes: Tensor, q: Tensor, k: Tensor, *rest: Any
) -> None:
    """Launcher of ``lsh_retrieve``."""
    mean, norms, begin, end, *options = rest
    _native_op("lsh_retrieve")(
        *(starts, ids, bits, codes.contiguous(), _unit(q), _unit(k)),
        *map(_plain, (mean, norms, begin, end)),
        *options,
    )


def lsh_attend(
    starts: Tensor, ids: Tensor, bits: int, codes: Tensor, q: Tensor, k: Tensor, *rest: Any
) -> None:
    """Launcher of ``lsh_attend``."""
    mean, norms, begin, end, min_hits, clip, v, length, *others = rest
    _native_op("lsh_attend")(
        *(starts, ids, bits, codes.contiguous(), _unit(q), _unit(k)),
        *map(_plain, (mean, norms, begin, end)),
        *(min_hits, clip, _unit(v), length.contiguous(), *others),
    )


_COMMON = (
    Device("cpu"),
    Dtypes(torch.float32, torch.bfloat16, torch.float16),
    Available("libattnforge_cpu.so", _native.unavailable),
)
_FWD = (_HeadDims(), Dim("group", 1, 64), Features("paged", "seqused_k"))
_BWD = (
    Dim("head_dim", 8, 256, 8),
    Dim("v_head_dim", 8, 256, 8),
    Dim("group", 1, 64),
    Features("seqused_k"),
)
_WIDE_DIM = Dim("head_dim", 8, 576, 8)
_HASHED = Dim("head_dim", 8, 256, 8)
_CPU = (_COMMON[0], _COMMON[2])  # of operators on int16 codes and int32 lists
_FLOAT32 = (_COMMON[0], Dtypes(torch.float32), _COMMON[2])


def _spec(kind: str, requires: Any, notes: str, common: Any = _COMMON) -> KernelSpec:
    return KernelSpec(
        id=f"cpu.retrieval.{kind}",
        op=kind,
        backend="cpu",
        launch=f"{__name__}:{kind}",
        requires=(*common, *requires),
        score=100.0,
        notes=notes,
    )


SPECS = (
    _spec("indexed_fwd", _FWD, "decode over gathered rows, one union per KV head, split lists"),
    _spec("indexed_bwd", _BWD, "a KV head per task, sums in fp32, no atomics"),
    _spec(
        "key_scores",
        (_WIDE_DIM, Features("paged", "seqused_k")),
        "the first product of decode, keys read once per group",
    ),
    _spec("page_scores", (_WIDE_DIM, Features("paged", "seqused_k")), "bounds read once per group"),
    _spec("select_columns", (), "histograms of the scores' bits, no sort"),
    _spec("expand_runs", (), "runs written in vectors", _CPU),
    _spec("nearest", (), "a product whose largest columns are kept, not stored", _FLOAT32),
    _spec("cluster_sums", (), "rows added in their order, channels in slices", _FLOAT32),
    _spec("lsh_encode", (_HASHED,), "signs taken from the tiles of a product"),
    _spec("lsh_insert", (), "buckets shifted in place", _CPU),
    _spec("lsh_truncate", (), "ends of buckets dropped in place", _CPU),
    _spec("lsh_retrieve", (_HASHED,), "a byte counter per key, probabilities in vectors"),
    _spec(
        "lsh_attend",
        (_HASHED, Dim("v_head_dim", 8, 1024, 8)),
        "a row of K for the weight and the logit, a head per task",
    ),
)
