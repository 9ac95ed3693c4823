"""From logits to weights and back: softmax and the other score functions, in base 2.

A row's state is (top, total): softmax keeps its maximum and its sum relative to it; the others add
up without a maximum, and their top is what turns the final total into the LSE. A hidden logit is
-inf and weighs 0 under each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnforge.triton_kernels.tensors import INF, LN2, LOG2E

LOG2_LN2 = tl.constexpr(-0.5287663729448977)


@triton.jit
def start_total(scores, BLOCK_M: tl.constexpr):
    """(top, total) of rows before any key."""
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    if scores.softplus is not None:
        top = total + LOG2_LN2  # weights are added up in base 2
    if scores.sigmoid is not None or scores.relu is not None:
        top = total
    return top, total


@triton.jit
def online(s, top, total):
    """One step of online softmax: (p, factor of old sums, new maximum, new sum), all base 2.

    A row that has seen nothing has top = -inf; equal infinities leave old sums alone, and NaN in
    ``s`` reaches the sum even where the maximum drops it.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == -INF, 0.0, new_top)
    p = tl.exp2(s - base[:, None])
    alpha = tl.where(top == new_top, 1.0, tl.exp2(top - base))
    return p, alpha, new_top, total * alpha + tl.sum(p, 1)


@triton.jit
def softplus(s):
    """log2(1 + 2^s): log1p by the series of atanh, so that small results keep their digits."""
    x = tl.exp2(-tl.abs(s))
    t = x / (2.0 + x)
    z = t * t  # <= 1 / 9
    series = 1.0 / 13 + z * (1.0 / 15 + z / 17)
    series = 1.0 / 7 + z * (1.0 / 9 + z * (1.0 / 11 + z * series))
    series = 1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * series))
    return tl.maximum(s, 0.0) + 2 * LOG2E * t * series


@triton.jit
def weigh(s, top, total, scores):
    """One step of a row's sums for any score function, as ``online``."""
    alpha = tl.full(top.shape, 1.0, tl.float32)
    if scores.signed_softmax is not None:
        size = tl.where(s == -INF, s, tl.abs(s))
        p, alpha, top, total = online(size, top, total)
        p = tl.where(s < 0.0, -p, tl.where(s == 0.0, 0.0, p))
    elif scores.softplus is not None:
        p = softplus(s)
        total = total + tl.sum(p, 1)
    elif scores.sigmoid is not None or scores.relu is not None:
        p, _, _ = probability(s, 0.0, scores)
        sees = tl.max((s != -INF).to(tl.int32), 1)
        total = tl.maximum(total, sees.to(tl.float32))
    else:
        p, alpha, top, total = online(s, top, total)
    return p, alpha, top, total


@triton.jit
def probability(s, stat, scores):
    """(P, tilt, sign) from base-2 logits and LSE: dS = tilt * (dP - sign * delta)."""
    sign = 1.0
    if scores.signed_softmax is not None:
        tilt = tl.exp2(tl.where(s == -INF, s, tl.abs(s)) - stat)
        sign = tl.where(s < 0.0, -1.0, tl.where(s == 0.0, 0.0, 1.0))
        p = tilt * sign
    elif scores.softplus is not None:
        share = tl.exp2(-stat)
        p = softplus(s) * (LN2 * share)
        tilt = share / (1.0 + tl.exp2(-s))
    elif scores.sigmoid is not None:
        p = 1.0 / (1.0 + tl.exp2(-s))
        tilt = p / (1.0 + tl.exp2(s))
    elif scores.relu is not None:
        p = tl.where(s < 0.0, 0.0, s * LN2)
        tilt = (s > 0.0).to(tl.float32)
    else:
        p = tl.exp2(s - stat)
        tilt = p
    return p, tilt, sign


@triton.jit
def score_gradient(tilt, sign, dp, rest, scores):
    """dS of a tile from what ``probability`` found; rest: delta, broadcast."""
    if scores.signed_softmax is not None:
        ds = tilt * (dp - sign * rest)
    elif scores.sigmoid is not None or scores.relu is not None:
        ds = tilt * dp  # no sum over the row divides the weights
    else:
        ds = tilt * (dp - rest)
    return ds
