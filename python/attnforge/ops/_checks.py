"""Argument checks: metadata in the public functions, values of index tensors in the operators.

Every error is one sentence: operator, argument, what it got, what it wants, the next step. The
fast path of each check is a single condition; the sentence is put together only when it fails.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnforge._params import FLOAT8

__all__ = [
    "backend",
    "boundaries",
    "dense",
    "fail",
    "index_tensors",
    "lengths",
    "max_seqlen",
    "merge_parts",
    "num_splits",
    "per_head",
    "scalars",
    "tensor",
    "tensors",
    "varlen",
    "window",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, text: str, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise the sentence ``attnforge.<op>: <text>``."""
    raise kind(f"attnforge.{op}: {text}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def tensor(op: str, name: str, x: Any) -> None:
    """``x`` is a tensor."""
    if not isinstance(x, Tensor):
        fail(op, f"{name} must be a tensor; got {type(x).__name__}; want torch.Tensor", TypeError)


def tensors(op: str, q: Any, k: Any, v: Any) -> None:
    """q, k and v are tensors."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, x in zip("qkv", (q, k, v), strict=True):
            tensor(op, name, x)


def dense(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] agree."""
    qs, ks, vs = q.shape, k.shape, v.shape
    if (
        len(qs) == 4
        and len(ks) == 4
        and len(vs) == 4
        and q.dtype is k.dtype is v.dtype
        and q.dtype in _DTYPES
        and q.device == k.device == v.device
        and qs[0] == ks[0] == vs[0]
        and ks[1:3] == vs[1:3]
        and qs[3] == ks[3] != 0 != vs[3]
        and ks[2] != 0
        and qs[2] % ks[2] == 0
    ):
        return
    _three(op, q, k, v, 4, "[batch, seq, heads, head_dim]")
    if qs[0] != ks[0] or qs[0] != vs[0]:
        fail(
            op,
            f"batch sizes differ; got q {_shape(q)}, k {_shape(k)}, v {_shape(v)}; want one "
            "batch size in dim 0; expand() the shared ones (stride 0 is read in place)",
        )
    if ks[1] != vs[1]:
        fail(op, f"k and v differ in length; got {ks[1]} and {vs[1]}; want equal dim 1 of k and v")
    _heads(op, q, k, v)


def varlen(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> None:
    """q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv] and the boundaries [B + 1] agree."""
    _three(op, q, k, v, 3, "[total, heads, head_dim]")
    if k.shape[0] != v.shape[0]:
        fail(
            op,
            f"k and v differ in length; got {k.shape[0]} and {v.shape[0]} rows; want equal dim 0",
        )
    _heads(op, q, k, v)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _index(op, name, x, q)
        if x.shape[0] < 1:
            fail(op, f"{name} is empty; want batch + 1 boundaries, the first of them 0")
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        fail(
            op,
            f"cu_seqlens_q and cu_seqlens_k differ in length; got {cu_seqlens_q.shape[0]} and "
            f"{cu_seqlens_k.shape[0]}; want batch + 1 entries each; a sequence without keys or "
            "queries repeats its boundary",
        )


def _three(op: str, q: Tensor, k: Tensor, v: Tensor, rank: int, layout: str) -> None:
    if q.dim() != rank or k.dim() != rank or v.dim() != rank:
        name, x = next((n, t) for n, t in zip("qkv", (q, k, v), strict=True) if t.dim() != rank)
        other = {
            3: "packed sequences go to flash_attention_varlen",
            4: "batched tensors go to flash_attention",
        }.get(x.dim(), "reshape it")
        fail(op, f"{name} has {x.dim()} dims; got shape {_shape(x)}; want {layout}; {other}")
    wider = k.dtype is v.dtype is FLOAT8 and q.dtype in (FLOAT8, *_DTYPES[:3])
    if (q.dtype is not k.dtype or q.dtype is not v.dtype) and not wider:
        fail(
            op,
            f"dtypes differ; got q {_name(q.dtype)}, k {_name(k.dtype)}, v {_name(v.dtype)}; want "
            f"one dtype, or float8_e4m3fn k and v; convert with .to({q.dtype})",
        )
    if q.dtype not in _DTYPES and not wider:
        want = ", ".join(map(_name, _DTYPES))
        fail(op, f"q has dtype {_name(q.dtype)}; want one of {want}; convert q, k and v first")
    if q.device != k.device or q.device != v.device:
        fail(
            op,
            f"devices differ; got q {q.device}, k {k.device}, v {v.device}; want one device; move "
            "them with .to(device)",
        )


def _heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    hq, d = q.shape[-2], q.shape[-1]
    hk, dk = k.shape[-2], k.shape[-1]
    if v.shape[-2] != hk:
        fail(op, f"k and v differ in heads; got {hk} and {v.shape[-2]}; want equal dim -2")
    if d != dk:
        fail(op, f"q and k differ in head_dim; got {d} and {dk}; want equal dim -1")
    if d == 0 or v.shape[-1] == 0:
        fail(op, f"head_dim is 0; got q {_shape(q)}, v {_shape(v)}; want at least 1")
    if hk == 0:
        if hq != 0:
            fail(op, f"k has no heads; got {hq} query heads; want at least one KV head")
    elif hq % hk != 0:
        fail(
            op,
            f"query heads are no multiple of KV heads; got {hq} and {hk}; want "
            "heads_q % heads_kv == 0, where query head h reads KV head h // (heads_q / heads_kv)",
        )


def _index(op: str, name: str, x: Any, q: Tensor, size: int | None = None) -> None:
    tensor(op, name, x)
    if x.dtype is not torch.int32:
        fail(
            op,
            f"{name} has dtype {_name(x.dtype)}; want int32; convert with {name}.to(torch.int32)",
            TypeError,
        )
    if x.dim() != 1 or (size is not None and x.shape[0] != size):
        want = "[batch + 1]" if size is None else f"[batch] = ({size},)"
        fail(op, f"{name} has shape {_shape(x)}; want {want}; one entry per sequence")
    if x.device != q.device:
        fail(op, f"{name} is on {x.device}; want {q.device} like q; move it with .to(q.device)")


def lengths(op: str, name: str, x: Tensor | None, q: Tensor, batch: int) -> None:
    """seqused_k or cache_seqlens: int32 [batch] on q's device."""
    if x is not None:
        _index(op, name, x, q, batch)


def per_head(
    op: str, q: Tensor, batch: int, alibi_slopes: Tensor | None, sinks: Tensor | None
) -> None:
    """alibi_slopes [Hq] or [B, Hq] without a gradient, sinks [Hq]; any floating dtype."""
    heads = q.shape[-2]
    if alibi_slopes is not None:
        _floating(op, "alibi_slopes", alibi_slopes, q)
        shape = alibi_slopes.shape
        if not (
            (len(shape) == 1 and shape[0] == heads)
            or (len(shape) == 2 and shape[0] == batch and shape[1] == heads)
        ):
            fail(
                op,
                f"alibi_slopes has shape {_shape(alibi_slopes)}; want [heads_q] = ({heads},) or "
                f"[batch, heads_q] = ({batch}, {heads}); a scalar slope needs expand()",
            )
        if alibi_slopes.requires_grad:
            fail(
                op,
                "alibi_slopes requires grad; got a learned slope; want a constant, as no gradient "
                "is computed for it; pass alibi_slopes.detach()",
            )
    if sinks is not None:
        _floating(op, "sinks", sinks, q)
        if sinks.dim() != 1 or sinks.shape[0] != heads:
            fail(
                op,
                f"sinks has shape {_shape(sinks)}; want [heads_q] = ({heads},); one logit per "
                "query head",
            )


def _floating(op: str, name: str, x: Any, q: Tensor) -> None:
    tensor(op, name, x)
    if not x.dtype.is_floating_point:
        fail(op, f"{name} has dtype {_name(x.dtype)}; want a floating dtype; use {name}.float()")
    if x.device != q.device:
        fail(op, f"{name} is on {x.device}; want {q.device} like q; move it with .to(q.device)")


def scalars(op: str, softmax_scale: float, softcap: float) -> None:
    """A finite scale, a finite non-negative softcap."""
    try:
        if 0.0 <= softcap < math.inf and -math.inf < softmax_scale < math.inf:
            return
    except TypeError:
        pass
    for name, value in (("softcap", softcap), ("softmax_scale", softmax_scale)):
        if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
            kind = type(value).__name__
            fail(op, f"{name} must be a number; got {kind}; want a float; use .item()", TypeError)
    if not 0.0 <= softcap < math.inf:
        fail(op, f"softcap is {softcap}; want a finite number >= 0; 0 turns it off")
    if not -math.inf < softmax_scale < math.inf:
        fail(
            op,
            f"softmax_scale is {softmax_scale}; want a finite number; None takes 1/sqrt(head_dim)",
        )


def window(op: str, window_size: Any, causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for unlimited; a causal call sees nothing to the right."""
    try:
        left, right = window_size
        good = left >= -1 and right >= -1 and int(left) == left and int(right) == right
    except (TypeError, ValueError):
        good = False
    if not good:
        fail(
            op,
            f"window_size is {window_size!r}; want two ints (left, right), each >= 0, or -1 for "
            "unlimited; (255, 0) is a causal window of 256 keys",
        )
    return (left, 0) if causal else (left, right)


def num_splits(op: str, value: Any) -> None:
    """0 for the fixed split, else a count."""
    if not isinstance(value, (int, torch.SymInt)) or value < 0:
        fail(op, f"num_splits is {value!r}; want an int >= 0; 0 takes a fixed split of 2048 keys")


def max_seqlen(op: str, name: str, value: Any) -> None:
    """None or an int >= 0."""
    if value is None:
        return
    integer = isinstance(value, (int, torch.SymInt))
    if not integer or value < 0:
        got = f"a tensor of shape {_shape(value)}" if isinstance(value, Tensor) else repr(value)
        fail(
            op,
            f"{name} is {got}; want an int >= 0 or None; None takes the total length",
            ValueError if integer else TypeError,
        )


def backend(op: str, value: Any) -> None:
    """None or a string."""
    if value is not None and not isinstance(value, str):
        fail(
            op,
            f"backend must be a string or None; got {type(value).__name__}; want a backend such "
            "as 'cpu'; attnforge.list_kernels() has them",
            TypeError,
        )


def merge_parts(op: str, outs: Any, lses: Any) -> None:
    """outs [B, S, H, D] or [T, H, D] of one shape, lses the matching [B, H, S] or [H, T]."""
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            fail(
                op,
                f"{name} must be a sequence of tensors; got {type(parts).__name__}; want a list; "
                "split a stacked tensor with unbind()",
                TypeError,
            )
        for n, x in enumerate(parts):
            tensor(op, f"{name}[{n}]", x)
    if not outs or len(outs) != len(lses):
        fail(
            op,
            f"outs and lses have {len(outs)} and {len(lses)} parts; want one LSE for each output "
            "and at least one part",
        )
    first = outs[0]
    if first.dim() not in (3, 4):
        fail(
            op,
            f"outs[0] has shape {_shape(first)}; want [batch, seq, heads, head_dim] or "
            "[total, heads, head_dim]",
        )
    if first.dtype not in _DTYPES:
        want = ", ".join(map(_name, _DTYPES))
        fail(op, f"outs[0] has dtype {_name(first.dtype)}; want one of {want}")
    stat = (*first.shape[:-3], first.shape[-2], first.shape[-3])
    for n, (o, s) in enumerate(zip(outs, lses, strict=True)):
        if o.shape != first.shape or o.dtype != first.dtype or o.device != first.device:
            fail(
                op,
                f"outs[{n}] is {_shape(o)} {_name(o.dtype)} on {o.device}; want "
                f"{_shape(first)} {_name(first.dtype)} on {first.device} like outs[0]",
            )
        if tuple(s.shape) != stat:
            fail(
                op,
                f"lses[{n}] has shape {_shape(s)}; want {stat}: heads before rows, as "
                "return_lse=True gives it",
            )
        if s.dtype not in (torch.float32, torch.float64) or s.device != first.device:
            fail(
                op,
                f"lses[{n}] is {_name(s.dtype)} on {s.device}; want float32 on {first.device}",
            )


def index_tensors(
    op: str,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    seqused_k: Tensor | None,
    totals: tuple[int, int],
    max_seqlens: tuple[int, int],
    used_name: str = "seqused_k",
) -> tuple[int, int, int, int]:
    """Check the values of index tensors; this reads them, so it runs inside the operator.

    totals: rows of q and keys of k (varlen: in all; dense: in one sequence). Returns the rows
    and keys that sequences cover and the longest sequence in rows and keys.
    """
    if cu_seqlens is None:
        rows, keys = totals
        if seqused_k is not None:
            _used(op, used_name, seqused_k.tolist(), None, keys)
        return rows, keys, rows, keys
    starts = [x.tolist() for x in cu_seqlens]
    longest = [
        boundaries(op, side, values, total, limit)
        for side, values, total, limit in zip("qk", starts, totals, max_seqlens, strict=True)
    ]
    if seqused_k is not None:
        _used(op, used_name, seqused_k.tolist(), starts[1], totals[1])
    return starts[0][-1], starts[1][-1], longest[0], longest[1]


def boundaries(op: str, side: str, values: list[int], total: int, limit: int) -> int:
    """The longest sequence between boundaries ``cu_seqlens_<side>``, which lie within ``total``."""
    name = f"cu_seqlens_{side}"
    if values[0] != 0:
        fail(op, f"{name} starts at {values[0]}; want 0 first; prepend a 0 to the ends")
    top = 0
    for n in range(1, len(values)):
        length = values[n] - values[n - 1]
        if length < 0:
            fail(
                op,
                f"{name} decreases at entry {n}; got {values[n - 1]} then {values[n]}; want "
                "boundaries in rising order, such as a cumulative sum of lengths",
            )
        top = max(top, length)
    if values[-1] > total:
        fail(
            op,
            f"{name} ends at {values[-1]}; got {total} rows of {side}; want an end within "
            "them; pass boundaries of this very batch",
        )
    if top > limit:
        fail(
            op,
            f"max_seqlen_{side} is {limit}; got a sequence of {top}; want at least {top}; "
            "None takes a safe bound",
        )
    return top


def _used(op: str, name: str, used: list[int], starts: list[int] | None, keys: int) -> None:
    for b, length in enumerate(used):
        room = keys if starts is None else starts[b + 1] - starts[b]
        if not 0 <= length <= room:
            fail(
                op,
                f"{name}[{b}] is {length}; got room for {room} keys in that sequence; want "
                f"0 <= {name} <= {room}; pass how many leading keys are valid",
            )
