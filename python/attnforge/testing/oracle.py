"""The float64 truth of a flash attention call, and how far a right kernel may be from it.

Whole matrices, explicit masks, explicit gradient formulas: nothing here is shared with the
library's own reference. Inputs are taken as they were rounded. For row i of one head, with
P = softmax and M_i = sum_j p_ij |v_j|, the bound of each element is (u: unit roundoff of the
stored dtype, u32 = 2^-24, K_i = 4 u32 (1 + S_max,i) + 16 u32)

    O     1.05 u |o| + K M                                LSE   K
    dV    (2 u16 + K) sum_i p |dO|                        dsink K sum p_sink |delta|
    dQ    (2 u16 + K) scale sum_j p (|dP| + |delta|) |k|  dK    the same over i with |q|

where u16 counts for 16-bit dtypes only. S_max,i bounds the row's logits: scale |q_i| max |k_j|
over visible keys, plus the ALiBi term and the sink. dP and delta are dot products themselves, so
their own rounding, a few u32 of sum |dO| |v|, is added where cancellation makes |dP| small.
Features of single scores are explicit matrices too (``oracle_mods``). A row's scale and biases
enter its logits and S_max (a rotation doubles the product's part of it: both factors are rounded),
masks say what is visible, dropout multiplies P in O and dV, and dP in dS. Gradients of biases are
sums of dS, their bounds sums of its bound: K (|dP| + |delta|) p and what rounds inside the dot
products. The row scale's is that of dQ times |q|, since a kernel may take it from dQ.

Per-element bounds see a single wrong row of a long sequence, which norms and ratios average away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnforge import _native
from attnforge._params import FLOAT8
from attnforge.testing import oracle_mods as om

__all__ = ["Truth", "merged_truth", "rounds_weights", "truth", "unit_roundoff", "visible"]

_UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_HALF = (torch.float16, torch.bfloat16)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance of 1 to the next number of ``dtype``."""
    return _UNIT[dtype]


def rounds_weights(q: Tensor, k: Tensor) -> bool:
    """Whether the CPU level in force has P in 16 bits for these: bf16 on matrix tiles."""
    if not q.dtype == k.dtype == torch.bfloat16 or _native.unavailable() is not None:
        return False
    return _native.isa() in _native.TILE_LEVELS


@dataclass
class Truth:
    """Values in float64 by name (``out lse dq dk dv dsinks``) and the bound of each element."""

    values: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, value: Tensor, bound: Tensor) -> None:
        """Add one result."""
        self.values[name], self.bounds[name] = value, bound


def visible(sq: int, sk: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """[sq, sk] bool: which keys each query sees; query i stands at key i + sk - sq."""
    at = torch.arange(sq).unsqueeze(1) + (sk - sq)
    key = torch.arange(sk).unsqueeze(0)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        seen &= key <= at
    if window[0] >= 0:
        seen &= at - key <= window[0]
    if window[1] >= 0:
        seen &= key - at <= window[1]
    return seen


@dataclass
class _Part:
    """One sequence: rows and keys as [H, S, D] float64, and where its results go."""

    index: Any  # of the batch (dense) or slice of rows (varlen)
    keys: Any
    q: Tensor
    k: Tensor
    v: Tensor
    batch: int


def _parts(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Iterator[_Part]:
    def heads(x: Tensor, name: str, b: int) -> Tensor:
        factor = om.descale(options, f"{name}_descale", b, k.shape[-2])
        wide = x.detach().double().transpose(0, 1)
        factor, wide = (t.repeat_interleave(q.shape[-2] // max(1, t.shape[0]), 0)
                        for t in (factor, wide))  # fmt: skip
        return wide * factor

    used = options.get("seqused_k", options.get("cache_seqlens"))
    lengths = None if used is None else used.tolist()
    if options.get("cu_seqlens_q") is not None:
        cu_q, cu_k = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
        for b in range(len(cu_q) - 1):
            rows = slice(cu_q[b], cu_q[b + 1])
            stop = cu_k[b + 1] if lengths is None else cu_k[b] + lengths[b]
            keys = slice(cu_k[b], stop)
            yield _Part(rows, keys, heads(q[rows], "q", b), heads(k[keys], "k", b),
                        heads(v[keys], "v", b), b)  # fmt: skip
        return
    for b in range(q.shape[0]):
        length = k.shape[1] if lengths is None else lengths[b]
        yield _Part((b, slice(None)), (b, slice(0, length)), heads(q[b], "q", b),
                    heads(k[b, :length], "k", b), heads(v[b, :length], "v", b), b)  # fmt: skip


def _slopes(options: Mapping[str, Any], batch: int) -> Tensor | None:
    slopes = options.get("alibi_slopes")
    if slopes is None:
        return None
    per_head = slopes[batch] if slopes.dim() == 2 else slopes
    column: Tensor = per_head.float().double().view(-1, 1, 1)
    return column


def _sum_heads(x: Tensor, heads_kv: int) -> Tensor:
    """[Hq, S, D] -> [S, Hk, D]: gradients of the query heads that share a KV head add up."""
    hq, s, d = x.shape
    return x.view(heads_kv, hq // heads_kv, s, d).sum(1).transpose(0, 1)


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Mapping[str, Any],
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    rounded: bool | None = None,
    sizes: tuple[Tensor, Tensor] | None = None,
) -> Truth:
    """What ``flash_attention(_varlen)`` or ``flash_decode`` should give for these arguments.

    rounded: P goes to the inputs' dtype before P V, as tensor cores take it: u16 M more for O, and
    what follows from it for delta. None: as the CPU level in force does (``rounds_weights``).
    sizes: like k and v, what stands for |k| and |v| in S_max and K M: where a kernel adds up
    larger terms than those of k and v (codes, and their zeros apart).

    options: the keywords of the call. Gradients are those of <out, dout> + <lse, dlse>; they
    are left out if both are None. Needs O(Hq Sq Sk) memory in float64, one sequence at a time.
    """
    if rounded is None:
        rounded = rounds_weights(q, k)
    acc = torch.float64 if q.dtype is torch.float64 else torch.float32
    # fp8 is multiplied as bf16, which holds it exactly.
    product = torch.bfloat16 if q.dtype is FLOAT8 else q.dtype
    stored = options.get("out_dtype") or product
    u, ua = unit_roundoff(stored), unit_roundoff(acc)
    half = unit_roundoff(product) if product in _HALF else 0.0
    # Below the normal range rounding is absolute, once per term that is added up.
    floor = torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
    # A probability below the normal range may become 0: exp need not give subnormal numbers.
    flush = 2 * torch.finfo(acc).smallest_normal
    causal = bool(options.get("causal", False))
    window = options.get("window_size", (-1, -1))
    window = (-1, -1) if isinstance(window, Tensor) else tuple(window)
    score_fn = options.get("score_fn", "softmax")
    cap = float(options.get("softcap", 0.0))
    scale = options.get("softmax_scale")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    sinks = options.get("sinks")
    sink = None if sinks is None else sinks.detach().to(acc).double().view(-1, 1)
    heads_kv, varlen = k.shape[-2], q.dim() == 3

    zeros = torch.zeros
    out = zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    stat_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse = torch.full(stat_shape, float("-inf"), dtype=torch.float64)
    out_b, lse_b = torch.zeros_like(out), zeros(stat_shape, dtype=torch.float64)
    with_grad = dout is not None or dlse is not None
    grads = {n: zeros(x.shape, dtype=torch.float64) for n, x in (("dq", q), ("dk", k), ("dv", v))}
    grad_b = {n: torch.zeros_like(x) for n, x in grads.items()}
    dsink, dsink_b = zeros(2, q.shape[-2], dtype=torch.float64)
    mods = {n: options[n] for n in om.GRADS if options.get(n) is not None}
    d_mods = {n: zeros(x.shape, dtype=torch.float64) for n, x in mods.items()}
    d_mods_b = {n: zeros(x.shape, dtype=torch.float64) for n, x in mods.items()}

    sized = None if sizes is None else _parts(q, *sizes, options)
    for part in _parts(q, k, v, options):
        size = part if sized is None else next(sized)
        sq, sk = part.q.shape[1], part.k.shape[1]
        n = om.Shape(
            varlen, part.batch, part.index if varlen else slice(None),
            part.keys if varlen else part.keys[1], part.q.shape[0], heads_kv, sq, sk,
        )  # fmt: skip
        seen = om.seen(options, n, visible(sq, sk, causal, window))  # [H, Sq, Sk]
        turn_q, turn_k = (om.rotations(options, n, q.shape[-1], side) for side in (True, False))
        rows, keys = _turned(turn_q, part.q), _turned(turn_k, part.k)
        own = om.row_scale(options, n)
        raw = scale * rows @ keys.transpose(1, 2)  # [H, Sq, Sk]
        s, slope = own * raw, torch.ones_like(raw)
        if cap > 0:
            t = torch.tanh(s / cap)
            s, slope = cap * t, 1 - t * t
        key_norm = size.k.norm(dim=-1).unsqueeze(1) * seen  # [H, Sq, Sk]; no rotation changes it
        product = (abs(scale) * own.abs() * rows.norm(dim=-1, keepdim=True)) * _top(key_norm)
        s_max = product * (1 if turn_q is None else 2) + cap
        alibi = _slopes(options, part.batch)
        if alibi is not None:
            distance = (n.at() - torch.arange(sk)).abs()
            s = s - alibi * distance
            s_max = s_max + _top(alibi.abs() * distance * seen)
        bias, bias_size = om.added(options, n)
        s = (s + bias).masked_fill(~seen, float("-inf"))
        s_max = s_max + _top(bias_size * seen)
        if sink is not None:
            s_max = s_max + torch.where(sink.isfinite(), sink.abs(), 0.0).unsqueeze(-1)
        rel = 4 * ua * (1 + s_max) + 16 * ua  # [H, Sq, 1]
        w, kept = om.weigh(score_fn, s, rel, sink), om.kept(options, n)
        p, total = w.prob, w.lse
        o = (p * kept) @ part.v
        half_mass = half * (p.abs() * kept) @ part.v.abs() if rounded else 0.0
        mass = (w.prob_error * kept) @ size.v.abs()
        lost = flush * (kept @ size.v.abs())
        bound = 1.05 * u * o.abs() + mass + half_mass + lost + floor * (1 + sk)
        place = part.index
        out[place] = o.transpose(0, 1)
        out_b[place] = bound.transpose(0, 1)
        stat_place = (slice(None), place) if varlen else place[0]
        lse[stat_place] = total
        lse_b[stat_place] = w.lse_error

        if not with_grad:
            continue
        d_o = zeros(out.shape, dtype=torch.float64)[place] if dout is None else dout.double()[place]
        d_o = d_o.transpose(0, 1)  # [H, Sq, Dv]
        d_l = zeros(s.shape[0], sq, dtype=torch.float64)
        if dlse is not None:
            d_l = dlse.double()[stat_place]
        dead = torch.isinf(total)
        d_l = d_l.masked_fill(dead & (total < 0), 0.0).unsqueeze(-1)
        dp = d_o @ part.v.transpose(1, 2) * kept
        dp_abs = d_o.abs() @ part.v.abs().transpose(1, 2) * kept
        delta = (d_o * o).sum(-1, keepdim=True) - d_l
        delta_abs = (d_o * o).abs().sum(-1, keepdim=True) + d_l.abs()
        ds = w.factor * (dp - w.sign * delta)  # of the logits
        part_of, used = w.factor.abs(), w.sign.abs()
        # Rounding inside the dot products; O is known to u^2 from out + out_lo.
        lost_delta = half * half * delta_abs
        if rounded:  # delta comes from an O of rounded P
            lost_delta = lost_delta + (d_o.abs() * half_mass).sum(-1, keepdim=True)
        if score_fn != "softmax":  # O's error enters delta, where the weights do not sum to 1
            lost_delta = lost_delta + (d_o.abs() * mass).sum(-1, keepdim=True)
        inner = part_of * (4 * ua * dp_abs + used * (4 * ua * delta_abs + lost_delta))
        weight = part_of * (dp.abs() + used * delta.abs())
        jump = dp.abs() if score_fn == "relu" else 2 * part_of * delta.abs()
        each = (2 * half + w.relative * rel) * weight + inner + w.unsure * seen * jump
        each = each + flush * seen * (dp_abs + used * delta_abs)
        for values, matrix, apart in ((d_mods, ds, False), (d_mods_b, each, True)):
            om.spread(values, options, n, matrix, raw * slope if not apart else None)
            om.spread_gates(values, n, matrix, apart)
        # 1 - tanh^2 cancels.
        if cap > 0:
            each = each * slope + inner + 16 * ua * part_of * (dp_abs + used * delta_abs)
        ds, each = ds * slope * scale * own, each * abs(scale)
        if "row_scale" in mods:
            by_size = (each * (rows.abs() @ keys.abs().transpose(1, 2))).sum(-1)
            target = n.own(d_mods_b["row_scale"])[:, n.rows]
            target += by_size.sum_to_size(target.shape)
        each = each * own.abs()
        group_floor = floor * (1 + sk + sq)
        key_place = part.keys
        grads["dq"][place] = _turned(turn_q, ds @ keys, back=True).transpose(0, 1)
        grad_b["dq"][place] = (
            _turned(turn_q, each @ keys.abs(), back=True, size=True).transpose(0, 1) + group_floor
        )
        grads["dk"][key_place] = _sum_heads(
            _turned(turn_k, ds.transpose(1, 2) @ rows, back=True), heads_kv
        )
        grad_b["dk"][key_place] = group_floor + _sum_heads(
            _turned(turn_k, each.transpose(1, 2) @ rows.abs(), back=True, size=True), heads_kv
        )
        grads["dv"][key_place] = _sum_heads((p * kept).transpose(1, 2) @ d_o, heads_kv)
        p_each = (2 * half * p.abs() + w.prob_error + flush) * kept
        grad_b["dv"][key_place] = (
            _sum_heads(p_each.transpose(1, 2) @ d_o.abs(), heads_kv) + group_floor
        )
        if sink is not None:
            p_sink = torch.exp(sink - total).masked_fill(torch.isneginf(sink), 0.0).unsqueeze(-1)
            p_sink = torch.where(torch.isposinf(sink).unsqueeze(-1), 1.0, p_sink)
            dsink -= (p_sink * delta).sum((1, 2))
            error = rel * delta.abs() + 4 * ua * delta_abs + lost_delta
            dsink_b += (p_sink * error).sum((1, 2))

    found = Truth()
    found.put("out", out, out_b)
    found.put("lse", lse, lse_b)
    if with_grad:
        for name, value in grads.items():
            found.put(name, value, grad_b[name])
        if sink is not None:
            found.put("dsinks", dsink, dsink_b + torch.finfo(torch.float32).tiny)
        for name, value in d_mods.items():
            stored = 1.05 * unit_roundoff(mods[name].dtype) * value.abs()
            found.put("d" + name, value, d_mods_b[name] + stored + 64 * floor)
    return found


def _turned(turn: Tensor | None, x: Tensor, back: bool = False, size: bool = False) -> Tensor:
    """Rows of x [H, S, D] under their matrices; back: transposed ones, size: of absolute values."""
    if turn is None:
        return x
    matrix = turn.transpose(-1, -2) if back else turn
    return ((matrix.abs() if size else matrix) @ x.unsqueeze(-1)).squeeze(-1)


def _top(x: Tensor) -> Tensor:
    """max over the last dimension, kept; 0 if that is empty."""
    return x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)


def merged_truth(outs: list[Tensor], lses: list[Tensor]) -> Truth:
    """What ``merge_states`` should give: a weighted sum in float64, empty parts left out."""
    dtype = outs[0].dtype
    u, ua = (
        unit_roundoff(dtype),
        unit_roundoff(torch.float64 if dtype is torch.float64 else torch.float32),
    )
    stats = torch.stack([x.double() for x in lses])
    stats = stats.masked_fill(stats == float("inf"), float("-inf"))
    lse = torch.logsumexp(stats, 0)
    out = torch.zeros(outs[0].shape, dtype=torch.float64)
    mass = torch.zeros_like(out)
    for o, s in zip(outs, stats, strict=True):
        weight = torch.where(s == float("-inf"), 0.0, torch.exp(s - lse))
        weight = weight.transpose(-1, -2).unsqueeze(-1)
        clean = torch.where(weight == 0, 0.0, o.double())
        out += weight * clean
        mass += weight * clean.abs()
    spread = torch.where(lse.isfinite(), lse.abs(), 0.0)
    rel = 4 * ua * (1 + spread) + 16 * ua
    found = Truth()
    wide = rel.transpose(-1, -2).unsqueeze(-1)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    found.put("out", out, 1.05 * u * out.abs() + wide * mass + tiny * (1 + len(outs)))
    found.put("lse", lse, rel)
    return found
