"""Features of single scores for the float64 truth: each as an explicit dense matrix.

Nothing here is shared with the library's reference. One sequence of one batch entry at a time;
H are query heads. What a row sees is a matrix of booleans, what is added to its logits a matrix of
sums, a rotation a [D, D] matrix per position, a score function a formula with its derivative:

    fn              P                   G = factor of dP     bound of P      of dS
    softmax         e^s / total         P                    K P             K |dS|
    sigmoid         1 / (1 + e^-s)      P (1 - P)            K P             K |dS|
    relu            max(s, 0)           s > 0                K               |dP| where |s| < K
    softplus        log(1 + e^s) / sum  sigmoid(s) / sum     3 K P           3 K |dS|
    signed_softmax  sign(s) e^|s| / sum |P|                  K |P|, 2 |P|    K |dS|, 2 |P delta|

K is the relative error of e^s (see oracle.py), and so an absolute bound of the error of s. Where
|s| is below it the sign of s is not known, and P or dS may jump: the second terms. Otherwise
|d log P / ds| <= 1; softplus counts once more for the sum and once for the stored LSE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["GRADS", "Shape", "Weights", "added", "descale", "kept", "philox_words", "rotations",
           "row_scale", "seen", "spread", "spread_gates", "weigh"]  # fmt: skip

GRADS = ("key_bias", "bias", "rel_bias", "log_forget", "row_scale")  # options with a gradient


@dataclass(frozen=True)
class Shape:
    """One sequence. rows, keys: its slices of packed tensors, or of dim 1 of dense ones."""

    packed: bool
    batch: int
    rows: slice
    keys: slice
    heads: int
    heads_kv: int
    sq: int
    sk: int

    @property
    def offset(self) -> int:
        """Query i stands at key i + offset."""
        return self.sk - self.sq

    def own(self, x: Tensor) -> Tensor:
        """The sequence's entry of the batch dimension; packed tensors have none."""
        return x if self.packed else x[self.batch if x.shape[0] > 1 else 0]

    def at(self) -> Tensor:
        """[Sq, 1] key positions of the queries."""
        return torch.arange(self.sq).unsqueeze(1) + self.offset


def _double(x: Tensor) -> Tensor:
    return x.detach().double()


def seen(o: Mapping[str, Any], n: Shape, inside: Tensor) -> Tensor:
    """[H, Sq, Sk] bool from ``inside`` [Sq, Sk], the causal mask and a window for all heads."""
    at, j = n.at(), torch.arange(n.sk)
    see = inside.expand(n.heads, n.sq, n.sk).clone()
    windows = o.get("window_size")
    if isinstance(windows, Tensor):
        for head, (left, right) in enumerate(windows.tolist()):
            if left >= 0:
                see[head] &= at - j <= left
            if right >= 0 and not o.get("causal"):
                see[head] &= j - at <= right
    if (prefix := o.get("prefix_lens")) is not None:
        see |= j < prefix[n.batch]
    if (ids := o.get("segment_ids_q")) is not None:
        rows, keys = n.own(ids)[n.rows], n.own(o["segment_ids_k"])[n.keys]
        see &= rows.unsqueeze(1) == keys
    if (mask := o.get("mask")) is not None:
        own = n.own(mask)  # [H|1, Sq, Sm] of the last Sm keys
        covered = own.shape[-1]
        column = j - (n.sk - covered)
        for key in j.tolist():
            if covered and column[key] >= 0:
                see[:, :, key] &= own[:, :, int(column[key])]
    return see


def added(o: Mapping[str, Any], n: Shape) -> tuple[Tensor, Tensor]:
    """What biases add to the logits, [H, Sq, Sk], and the sum of their sizes."""
    terms = []
    if (x := o.get("key_bias")) is not None:
        terms.append(_double(n.own(x))[:, n.keys].unsqueeze(1))
    if (x := o.get("bias")) is not None:
        terms.append(_double(n.own(x))[..., : n.sk])
    if (x := o.get("rel_bias")) is not None:
        terms.append(_double(x)[:, _distance(x, n)])
    if (x := o.get("log_forget")) is not None:
        c = _double(n.own(x))[n.keys].T.cumsum(-1)  # [H|1, Sk]
        here = c[:, n.at().flatten().clamp(0, max(n.sk - 1, 0))] if n.sk else c.new_zeros(1, n.sq)
        terms.append(here.unsqueeze(2) - c.unsqueeze(1))
    total, size = torch.zeros(2, n.heads, n.sq, n.sk, dtype=torch.float64)
    for term in terms:
        total, size = total + term, size + term.abs()
    return total, size


def _distance(table: Tensor, n: Shape) -> Tensor:
    radius = table.shape[-1] // 2
    return (torch.arange(n.sk) - n.at()).clamp(-radius, radius) + radius


def row_scale(o: Mapping[str, Any], n: Shape) -> Tensor:
    """[H|1, Sq, 1]."""
    x = o.get("row_scale")
    if x is None:
        return torch.ones(1, n.sq, 1, dtype=torch.float64)
    return _double(n.own(x))[:, n.rows].unsqueeze(2)


def descale(o: Mapping[str, Any], name: str, batch: int, heads_kv: int) -> Tensor:
    """[Hk, 1, 1]: what one tensor of one sequence stands for is multiplied by."""
    x = o.get(name)
    if x is None:
        return torch.ones(heads_kv, 1, 1, dtype=torch.float64)
    x = _double(x)
    if x.dim() == 2:
        x = x[batch if x.shape[0] > 1 else 0]
    return x.expand(heads_kv).view(heads_kv, 1, 1)


def rotations(o: Mapping[str, Any], n: Shape, dim: int, query: bool) -> Tensor | None:
    """One matrix per head and position, [H, S, D, D]; None without rope."""
    if o.get("rope") is None:
        return None
    cos, sin = (_double(x) for x in o["rope"])  # [Hk|1, P, half]
    given = o.get("positions_q" if query else "positions_k")
    if given is None:
        at = n.at().flatten() if query else torch.arange(n.sk)
    else:
        at = n.own(given)[n.rows if query else n.keys]
    at = at.long().clamp(0, cos.shape[1] - 1)
    half = cos.shape[2]
    matrix = torch.eye(dim, dtype=torch.float64).repeat(cos.shape[0], at.shape[0], 1, 1)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if o.get("rope_interleaved") else (i, i + half)
        matrix[:, :, a, a] = matrix[:, :, b, b] = cos[:, at, i]
        matrix[:, :, a, b], matrix[:, :, b, a] = -sin[:, at, i], sin[:, at, i]
    return matrix.repeat_interleave(n.heads // matrix.shape[0], 0)


def philox_words(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 in wrapping int64 arithmetic: the bits of a 64-bit product are all there."""
    low = 0xFFFFFFFF
    x = [c.clone() for c in torch.broadcast_tensors(*counter)]  # type: ignore[no-untyped-call]
    for n in range(10):
        k0, k1 = key[0] + n * 0x9E3779B9 & low, key[1] + n * 0xBB67AE85 & low
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [b >> 32 & low ^ x[1] ^ k0, b & low, a >> 32 & low ^ x[3] ^ k1, a & low]
    return x


def kept(o: Mapping[str, Any], n: Shape) -> Tensor:
    """What weights are multiplied by: 0 or 1 / (1 - p), [H, Sq, Sk]; ones without dropout."""
    p = o.get("dropout_p", 0.0)
    if not p:
        return torch.ones(n.heads, n.sq, n.sk, dtype=torch.float64)
    seed, offset, low = o["dropout_seed"], o.get("dropout_offset", 0), 0xFFFFFFFF
    j = torch.arange(n.sk)
    head = (n.batch * n.heads + torch.arange(n.heads)).view(-1, 1, 1)
    row = torch.arange(n.sq).view(-1, 1)
    counter = [j // 64 * 16 + j % 16, row, head, torch.tensor(offset & low)]
    words = philox_words(counter, (seed & low, (seed >> 32 ^ offset >> 32) & low))
    word = torch.stack(words).gather(0, (j // 16 % 4).expand(1, n.heads, n.sq, n.sk))[0]
    factor: Tensor = (word >= round(p * 2**32)).double() / (1 - p)
    return factor


class Weights(NamedTuple):
    """P and its derivative; matrices [H, Sq, Sk] but the last two, [H, Sq]."""

    prob: Tensor
    prob_error: Tensor
    factor: Tensor  # dS = factor * (dP - sign * delta)
    sign: Tensor  # 0 where delta has no part
    relative: float  # error of the factor in units of K
    unsure: Tensor  # the sign of s is not known
    lse: Tensor
    lse_error: Tensor


def weigh(score_fn: str, s: Tensor, rel: Tensor, sink: Tensor | None) -> Weights:
    """s [H, Sq, Sk], hidden ones -inf; rel = K [H, Sq, 1]; sink [H, 1] or None."""
    unsure = s.abs() <= rel
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    see = s > float("-inf")
    if score_fn in ("sigmoid", "relu"):
        lse = torch.where(see.any(-1), 0.0, float("-inf"))
        exact = torch.zeros_like(lse)
        if score_fn == "sigmoid":
            p = torch.sigmoid(s)
            return Weights(p, rel * p, p * torch.sigmoid(-s) * see, zero, 1, unsure & False, lse,
                           exact)  # fmt: skip
        p = torch.relu(s).masked_fill(~see, 0.0)
        return Weights(p, rel * see, (s > 0).double(), zero, 0, unsure, lse, exact)
    if score_fn == "softplus":
        raw = torch.logaddexp(s, zero).masked_fill(~see, 0.0)
        total = raw.sum(-1, keepdim=True)
        share = torch.where(total > 0, 1 / total, 0.0)
        p = raw * share
        return Weights(p, 3 * rel * p, torch.sigmoid(s) * share, one, 3, unsure & False,
                       total.log().squeeze(-1), 3 * rel.squeeze(-1))  # fmt: skip
    signed = score_fn == "signed_softmax"
    size = s.abs().masked_fill(~see, float("-inf")) if signed else s
    every = size
    if sink is not None:
        every = torch.cat([size, sink.unsqueeze(-1).expand(-1, s.shape[1], 1)], -1)
    lse = s.new_full(s.shape[:2], float("-inf"))
    if every.shape[-1]:
        lse = torch.logsumexp(every, -1)
    base = lse.unsqueeze(-1)
    p = torch.where(base.isinf(), 0.0, torch.exp(size - base))
    if not signed:
        return Weights(p, rel * p, p, one, 1, unsure & False, lse, rel.squeeze(-1))
    sign = torch.sign(s).masked_fill(~see, 0.0)
    error = rel * p + 2 * p * unsure
    return Weights(p * sign, error, p, sign, 1, unsure, lse, rel.squeeze(-1))


def spread(
    grads: dict[str, Tensor], o: Mapping[str, Any], n: Shape, ds: Tensor, raw: Tensor | None
) -> None:
    """Add dS [H, Sq, Sk] to the gradients of the mods, named and shaped as options.

    raw: what d row_scale weighs dS by, the softcap's slope in it; None leaves row_scale alone.
    """

    def put(target: Tensor, x: Tensor) -> None:
        target += x.sum_to_size(target.shape)

    if "key_bias" in grads:
        put(n.own(grads["key_bias"])[:, n.keys], ds.sum(1))
    if "bias" in grads:
        put(n.own(grads["bias"])[..., : n.sk], ds)
    if "rel_bias" in grads:
        place = _distance(o["rel_bias"], n).flatten()
        sums = ds.new_zeros(n.heads, o["rel_bias"].shape[-1])
        put(grads["rel_bias"], sums.index_add(1, place, ds.flatten(1)))
    if "row_scale" in grads and raw is not None:
        put(n.own(grads["row_scale"])[:, n.rows], (ds * raw).sum(-1))


def spread_gates(grads: dict[str, Tensor], n: Shape, ds: Tensor, apart: bool) -> None:
    """Add to d log_forget: gate t is between key j < t and row i at or behind t.

    apart: the rows at or behind t and the keys at or behind t as two sums, whose difference it is:
    the bound of a kernel that leaves sums over rows and over keys.
    """
    if "log_forget" not in grads:
        return
    target = n.own(grads["log_forget"])[n.keys]  # [Sk, H|1]
    at = n.at().flatten().clamp_min(0)
    for t in range(n.sk):
        late = at >= t
        if apart:
            value = ds[:, late].sum((1, 2)) + ds[:, :, t:].sum((1, 2))
        else:
            value = ds[:, late, :t].sum((1, 2))
        target[t] += value.sum_to_size(target[t].shape)
