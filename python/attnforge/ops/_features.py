"""Features of single scores: keywords of the flash functions, checked and brought to FlashMods.

Masks that are one interval of keys per row (per-head windows, prefix-LM, documents) become
``row_bounds``, which kernels use to skip what nobody sees; the others stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from attnforge._params import FlashMods, FlashParams
from attnforge.jit import Mod, remember
from attnforge.ops import _feature_checks
from attnforge.ops._checks import fail

__all__ = ["Features", "apply_features", "drawn_seed", "split_window"]

_FAR = (1 << 31) - 1
# The log of a gate that is shut: exp of it is 0 in every dtype, and sums of many stay exact enough.
_CLOSED = -1e4


class Features(TypedDict, total=False):
    """Optional keywords of ``flash_attention``, ``flash_attention_varlen`` and ``flash_decode``.

    A leading size of 1 broadcasts. With varlen tensors the batch is left out and Sq, Sk count
    packed rows and keys. Order: RoPE, scale, softcap, ALiBi, biases, masks, score_fn, dropout.

    prefix_lens: [B] int32; the first keys of a sequence, seen by all its rows (prefix-LM).
    segment_ids_q, segment_ids_k: [B, Sq], [B, Sk] int32; a row sees keys of its own id only.
    mask: [B|1, Hq|1, Sq, Sm] bool, True is seen; of the last Sm <= Sk keys (a tree of drafts);
        keys before them are not touched by it. Batched calls only, as bias.
    key_bias: [B|1, Hq|1, Sk], added to the logits of a key; differentiable.
    bias: [B|1, Hq|1, Sq, Sk], added to logits; differentiable (T5, Evoformer pair bias).
    rel_bias: [Hq|1, 2 R + 1]; adds rel_bias[h, R + j - i - offset], distances beyond R take the
        end entries; differentiable. ``t5_rel_bias`` makes one of T5's buckets.
    log_forget: [B, Sk, Hq|1] log forget gates <= 0 of the Forgetting Transformer (Lin et al.,
        2025): adds the sum of log_forget[j + 1 .. i + offset]; needs causal; differentiable.
        Values below -1e4, -inf too, count as -1e4: nothing passes such a gate.
    row_scale: [B|1, Hq|1, Sq]; multiplies a row's logits (an inverse temperature);
        differentiable.
    score_fn: "softmax"; "sigmoid" and "relu" weigh without normalising (LSE is then 0 for rows
        that see a key); "softplus" over the sum of them; "signed_softmax" is sign(s)
        softmax(|s|) (Cog Attention). All but softmax refuse sinks, a gradient of LSE among them
        is defined for signed_softmax alone.
    dropout_p, dropout_seed, dropout_offset: weights are dropped after normalising, by Philox4x32
        counters of (offset, batch, head, row, key): the same on every backend, replayable.
    sink_kv: (k', v'), [n, Hk, D] and [n, Hk, Dv]: learned keys that every row sees, with their
        values; differentiable. Not masked, biased or rotated.
    head_scale: [Hq], multiplies a head's output (0 masks it); differentiable; LSE is untouched.
    rope: (cos, sin) fp32 tables [Hk|1, P, rotary_dim / 2]; q and k are rotated as they are
        loaded, in their first rotary_dim channels, and v is not. positions_q [B|1, Sq] and
        positions_k [B|1, Sk] int32 are rows of the tables (default: key positions, and
        i + offset for queries); rope_interleaved pairs channels (2 n, 2 n + 1).
    q_descale, k_descale, v_descale: [B|1, Hk|1], [Hk] or []; a float8_e4m3fn q, k or v stands for
        itself times its descale (q's too is one per KV head, as in FlashAttention-3); packed calls
        have one row per sequence.
    out_dtype: of the output beside float8 k and v: float32, bfloat16 or float16; default: q's, or
        bfloat16 if q is float8.
    score_mod, mask_mod: functions of your own in CUDA C++, made by ``attnforge.jit.score_mod`` and
        ``mask_mod``: another logit for one of the call, after softcap and ALiBi, and whether a key
        is seen. Backend jit, forward only, beside no other keyword of this list.
    """

    prefix_lens: Tensor | None
    segment_ids_q: Tensor | None
    segment_ids_k: Tensor | None
    mask: Tensor | None
    key_bias: Tensor | None
    bias: Tensor | None
    rel_bias: Tensor | None
    log_forget: Tensor | None
    row_scale: Tensor | None
    score_fn: str
    dropout_p: float
    dropout_seed: int
    dropout_offset: int
    sink_kv: tuple[Tensor, Tensor] | None
    head_scale: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    positions_q: Tensor | None
    positions_k: Tensor | None
    rope_interleaved: bool
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    out_dtype: torch.dtype | None
    score_mod: Mod | None
    mask_mod: Mod | None


class _Rows(NamedTuple):
    """Where queries stand, as int64 tensors that broadcast to [B, 1, Sq] (varlen [1, Tq])."""

    at: Tensor  # key position of each query: i + offset
    start: Tensor | int  # varlen: first packed key of its sequence, else 0
    sequence: Tensor | None  # varlen: index of its sequence [Tq]


def drawn_seed() -> int:
    """A dropout seed from torch's generator of the CPU, as ``torch.manual_seed`` set it."""
    return int(torch.randint(1 << 62, (), dtype=torch.int64))


def split_window(op: str, window_size: Any, q: Tensor) -> tuple[Any, Tensor | None]:
    """(window for all heads, per-head windows [Hq, 2] or None)."""
    if not isinstance(window_size, Tensor):
        return window_size, None
    _feature_checks.shaped(op, "window_size", window_size, q, [(q.shape[-2],), (2,)], torch.int32)
    return (-1, -1), window_size


def _rows(q: Tensor, k: Tensor, p: FlashParams) -> _Rows:
    if p.cu_seqlens_q is None or p.cu_seqlens_k is None:
        length: Any = k.shape[1]
        if p.seqused_k is not None:
            length = p.seqused_k.to(torch.int64).view(-1, 1, 1)
        i = torch.arange(q.shape[1], device=q.device).view(1, 1, -1)
        return _Rows(i + (length - q.shape[1]), 0, None)
    cu_q, cu_k = p.cu_seqlens_q.to(torch.int64), p.cu_seqlens_k.to(torch.int64)
    row = torch.arange(q.shape[0], device=q.device)
    last = max(cu_q.shape[0] - 2, 0)
    sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True).clamp_max(last)
    lengths = cu_k.diff() if p.seqused_k is None else p.seqused_k.to(torch.int64)
    offset = (lengths - cu_q.diff())[sequence]
    return _Rows((row - cu_q[sequence] + offset).view(1, -1), cu_k[sequence].view(1, -1), sequence)


def _segment_hull(
    ids_q: Tensor, ids_k: Tensor, rows: _Rows, p: FlashParams
) -> tuple[Tensor, Tensor]:
    """First and last + 1 key of each row's segment, [B, 1, Sq] (varlen [1, Tq]); empty: 0, 0."""
    wide_q, wide_k = ids_q.to(torch.int64), ids_k.to(torch.int64)
    if rows.sequence is not None and p.cu_seqlens_k is not None:  # ids are local to a sequence
        key = torch.arange(ids_k.shape[0], device=ids_k.device)
        ends = p.cu_seqlens_k[1:].to(torch.int64).contiguous()
        wide_k = wide_k + (torch.searchsorted(ends, key, right=True) << 32)
        wide_q = wide_q + (rows.sequence << 32)
    ordered, order = torch.sort(wide_k, dim=-1, stable=True)
    first = torch.searchsorted(ordered, wide_q.contiguous(), right=False)
    end = torch.searchsorted(ordered, wide_q.contiguous(), right=True)
    found = end > first
    top = max(ids_k.shape[-1] - 1, 0)
    lo = order.gather(-1, first.clamp_max(top)) if ids_k.shape[-1] else torch.zeros_like(first)
    hi = order.gather(-1, (end - 1).clamp_min(0)) + 1 if ids_k.shape[-1] else torch.zeros_like(end)
    lo, hi = (torch.where(found, x, 0).unsqueeze(-2) for x in (lo, hi))
    return lo - rows.start * found.unsqueeze(-2), hi - rows.start * found.unsqueeze(-2)


def _row_bounds(
    op: str, q: Tensor, k: Tensor, p: FlashParams, causal: bool, f: dict[str, Any]
) -> tuple[FlashParams, Tensor | None]:
    """Interval masks as [B|1, Hq|1, Sq, 2] int32, and p without the window they took over."""
    windows, prefix, ids_q, ids_k = (
        f.get(n) for n in ("windows", "prefix_lens", "segment_ids_q", "segment_ids_k")
    )
    if windows is None and prefix is None and ids_q is None:
        return p, None
    rows = _rows(q, k, p)
    lo, hi = torch.zeros_like(rows.at), torch.full_like(rows.at, _FAR)
    if windows is not None:
        left, right = windows.to(torch.int64).unbind(-1)
        if causal:
            right = torch.zeros_like(right)
        left, right = left.unsqueeze(-1), right.unsqueeze(-1)  # [Hq, 1]
        lo = torch.where(left < 0, 0, (rows.at - left).clamp_min(0))
        hi = torch.where(right < 0, _FAR, (rows.at + right + 1).clamp_min(0))
    if prefix is not None:
        if p.window_left >= 0 or windows is not None:
            fail(
                op,
                "prefix_lens comes with a left or per-head window; got a union of two intervals; "
                "want one of them; pass mask= for both",
            )
        if p.window_right >= 0:
            hi = (rows.at + p.window_right + 1).clamp_min(0)
        each = prefix.to(torch.int64)
        hi = torch.maximum(hi, each[rows.sequence] if rows.sequence is not None
                           else each.view(-1, 1, 1))  # fmt: skip
        p = p._replace(window_right=-1)
    if ids_q is not None and ids_k is not None:
        first, end = _segment_hull(ids_q, ids_k, rows, p)
        lo, hi = torch.maximum(lo, first), torch.minimum(hi, end)
    bounds = torch.stack((lo + torch.zeros_like(hi), hi + torch.zeros_like(lo)), -1)
    return p, bounds.clamp(0, _FAR).to(torch.int32)


def _decay(log_forget: Tensor, p: FlashParams) -> Tensor:
    """Cumulative log gates [B, H, Sk] in fp64: differences of far sums keep fp32 precision.

    Packed sequences (varlen [H, Tk]) do not see each other, in the gradient either: sums double
    their reach step by step and stop at the first key of their sequence.
    """
    sums = log_forget.transpose(-1, -2).to(torch.float64).clamp_min(_CLOSED)
    if p.cu_seqlens_k is None:
        return sums.cumsum(-1)
    total, step = sums.shape[-1], 1
    place = _key_places(total, p.cu_seqlens_k)
    while step < min(total, p.max_seqlen_k):
        before = torch.nn.functional.pad(sums, (step, 0))[..., :total]
        sums = sums + torch.where(place >= step, before, 0.0)
        step *= 2
    return sums


def _key_places(total: int, cu_seqlens_k: Tensor) -> Tensor:
    """[Tk] int32: each packed key's place in its sequence."""
    key = torch.arange(total, device=cu_seqlens_k.device, dtype=torch.int32)
    ends, last = cu_seqlens_k[1:].contiguous(), max(cu_seqlens_k.shape[0] - 2, 0)
    return key - cu_seqlens_k[torch.searchsorted(ends, key, right=True).clamp_max(last)]


def _positions(q: Tensor, k: Tensor, p: FlashParams, f: dict[str, Any]) -> tuple[Tensor, Tensor]:
    at_q, at_k = f.get("positions_q"), f.get("positions_k")
    if at_q is None:
        at_q = _rows(q, k, p).at.squeeze(-2).clamp_min(0).to(torch.int32)
    if at_k is None:
        if p.cu_seqlens_k is not None:
            at_k = _key_places(k.shape[-3], p.cu_seqlens_k)
        else:
            at_k = torch.arange(k.shape[-3], device=k.device, dtype=torch.int32).unsqueeze(0)
    return at_q, at_k


def _descale(batch: int, heads: int, *factors: Tensor | None) -> Tensor | None:
    """The product of descales as [B, Hk] fp32; None if there is none."""
    given = [x.to(torch.float32) for x in factors if x is not None]
    if not given:
        return None
    product = given[0] if len(given) == 1 else given[0] * given[1]
    return product.expand(batch, heads).contiguous()


def apply_features(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: FlashParams,
    features: Mapping[str, Any],
    windows: Tensor | None,
    causal: bool,
) -> FlashParams:
    """``p`` with the features that ``features`` asks for; ValueError or TypeError on bad ones."""
    f = {name: x for name, x in features.items() if x is not None}
    if unknown := sorted(f.keys() - Features.__annotations__.keys()):
        raise TypeError(f"attnforge.{op}: got an unexpected keyword argument {unknown[0]!r}")
    batch = q.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    _feature_checks.features(op, q, k, v.shape[-1], batch, causal, p, f)
    score_fn = f.get("score_fn", "softmax")
    dropout_p = float(f.get("dropout_p", 0.0))
    p, bounds = _row_bounds(op, q, k, p, causal, {**f, "windows": windows})
    cos, sin = f.get("rope", (None, None))
    at_q, at_k = _positions(q, k, p, f) if cos is not None else (None, None)
    rng = None
    if dropout_p > 0:
        state = [int(f.get("dropout_seed", 0)), int(f.get("dropout_offset", 0))]
        rng = torch.tensor(state, dtype=torch.int64)
    stat = torch.float64 if q.dtype is torch.float64 else torch.float32

    def wide(name: str) -> Tensor | None:
        x = f.get(name)
        return None if x is None else x.to(stat)

    mods = FlashMods(
        row_bounds=bounds,
        mask=f.get("mask"),
        segments_q=f.get("segment_ids_q"),
        segments_k=f.get("segment_ids_k"),
        key_bias=wide("key_bias"),
        bias=f.get("bias"),
        rel_bias=wide("rel_bias"),
        decay=_decay(f["log_forget"], p) if "log_forget" in f else None,
        row_scale=wide("row_scale"),
        rope_cos=None if cos is None else cos.to(stat),
        rope_sin=None if sin is None else sin.to(stat),
        positions_q=at_q,
        positions_k=at_k,
        rng=rng,
        qk_descale=_descale(batch, k.shape[-2], f.get("q_descale"), f.get("k_descale")),
        v_descale=_descale(batch, k.shape[-2], f.get("v_descale")),
    )
    jit = tuple(f[name] for name in ("score_mod", "mask_mod") if name in f)
    if jit:
        score_fn = remember(jit)
    used = bool(jit) or any(x is not None for x in mods)
    return p._replace(
        mods=(*mods, *(x for mod in jit for x in mod.tensors)) if used else (),
        score_fn=score_fn,
        dropout_p=dropout_p,
        rope_interleaved=bool(f.get("rope_interleaved", False)),
        out_dtype=f.get("out_dtype"),
    )
