"""What may happen to single scores, in plain PyTorch: rotation, biases, masks, weights, dropout.

``Scores`` holds the mods of one sequence (or of a batch of equal ones); everything is asked for a
chunk of rows and keys and comes as [B|1, Hk|1, G|1, R, N]: the heads of a group stand apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashGrads, FlashMods, FlashParams

__all__ = [
    "Scores",
    "Weights",
    "add_mod_grads",
    "add_row_scale_grad",
    "differentiate",
    "exp_gap",
    "philox",
    "rotate",
    "weigh",
]

_WORD = 0xFFFFFFFF


def rotate(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> Tensor:
    """``x`` [B, H, S, D] with its first 2 * half channels turned by the angles of its positions.

    cos, sin [H|1, P, half]; at [B|1, S], clamped to the tables. The inverse takes -sin.
    """
    half = cos.shape[-1]
    at = at.to(torch.int64).clamp(0, cos.shape[-2] - 1)
    c, s = (t.to(x.dtype)[:, at].transpose(0, 1) for t in (cos, sin))  # [B|1, H|1, S, half]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned, rest), -1)


def _low_high(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Low and high words of the 64-bit product of 32-bit words: int64 cannot hold it whole."""
    part = (a & 0xFFFF) * b
    high = (a >> 16) * b + (part >> 16)
    return (high << 16 | part & 0xFFFF) & _WORD, high >> 16


def philox(counter: list[Tensor], seed: int, offset: int) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words per counter, as int64 tensors.

    counter: three words (c0, c1, c2) that broadcast; c3 is the low word of ``offset``, whose high
    word goes into the key.
    """
    c0, c1, c2 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    c3 = torch.full_like(c0, offset & _WORD)
    k0, k1 = seed & _WORD, (seed >> 32 ^ offset >> 32) & _WORD
    for _ in range(10):
        lo0, hi0 = _low_high(c0, 0xD2511F53)
        lo1, hi1 = _low_high(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def dropout_keep(p: float, rng: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Which weights stay. head = batch * Hq + query head; row, key: places in the sequence.

    A counter serves 4 keys: 64 in a row take words 0 to 3 of 16 counters, so that 16 neighbours
    have the same word (a vector of them comes from one run of the generator).
    """
    seed, offset = rng.tolist()
    words = philox([(key >> 6) << 4 | key & 15, row, head], seed, offset)
    which = (key >> 4 & 3).expand_as(words[0])
    word = torch.stack(words).gather(0, which.unsqueeze(0)).squeeze(0)
    return word >= round(p * 2.0**32)


@dataclass(frozen=True)
class Scores:
    """The mods of one sequence. batch: its slice of batched tensors; rows, keys: of the others."""

    p: FlashParams
    batch: slice
    rows: slice
    keys: slice
    heads_kv: int
    group: int
    sq: int
    sk: int

    @property
    def mods(self) -> FlashMods:
        """The mods by name."""
        return self.p.score_mods

    @property
    def _packed(self) -> bool:
        return self.p.cu_seqlens_q is not None

    def _of_batch(self, x: Tensor) -> Tensor:
        """[B|1, ...] of this sequence; packed tensors get a batch of one."""
        if self._packed:
            return x.unsqueeze(0)
        return x if x.shape[0] == 1 else x[self.batch]

    def heads(self, x: Tensor) -> Tensor:
        """[B|1, Hq|1, ...] -> [B|1, Hk|1, G|1, ...]."""
        if x.shape[1] == 1:
            return x.unsqueeze(1)
        return x.view(x.shape[0], self.heads_kv, self.group, *x.shape[2:])

    def _row_tensor(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of [B|1, Hq|1, Sq, ...] as [B|1, Hk|1, G|1, R, ...]."""
        x = self.heads(self._of_batch(x))
        return x[:, :, :, self.rows][:, :, :, rows]

    def _key_tensor(self, x: Tensor, keys: slice) -> Tensor:
        x = self.heads(self._of_batch(x))
        return x[:, :, :, self.keys][:, :, :, keys]

    def rotated(self, x: Tensor, query: bool, inverse: bool = False) -> Tensor:
        """``x`` [B, Hk, G, S, D] (queries) or [B, Hk, S, D] (keys) under the rotation, if any."""
        cos, sin = self.mods.rope_cos, self.mods.rope_sin
        at = self.mods.positions_q if query else self.mods.positions_k
        if cos is None or sin is None or at is None:
            return x
        at = self._of_batch(at)[:, self.rows if query else self.keys]
        sin = -sin if inverse else sin
        if not query:
            return rotate(x, cos, sin, at, self.p.rope_interleaved)
        flat = x.transpose(1, 2).flatten(0, 1)  # [B * G, Hk, S, D]
        at = at.expand(x.shape[0], -1).repeat_interleave(x.shape[2], 0)
        turned = rotate(flat, cos, sin, at, self.p.rope_interleaved)
        return turned.view(x.shape[0], x.shape[2], *turned.shape[1:]).transpose(1, 2)

    def descaled(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """``x`` [B, Hk, ..] times [B, Hk] of the whole call, if there is one."""
        if factor is None:
            return x
        own = factor[self.batch]
        return x * own.to(x.dtype).view(*own.shape, *(1,) * (x.dim() - 2))

    def row_scale(self, rows: slice) -> Tensor | None:
        """[B|1, Hk|1, G|1, R, 1]."""
        scale = self.mods.row_scale
        return None if scale is None else self._row_tensor(scale, rows).unsqueeze(-1)

    def distance(self, rows: slice, keys: slice) -> Tensor:
        """[R, N] int64: where rel_bias is read."""
        radius = self.mods.rel_bias.shape[-1] // 2  # type: ignore[union-attr]
        i = torch.arange(rows.start, rows.stop).unsqueeze(1) + (self.sk - self.sq)
        j = torch.arange(keys.start, keys.stop)
        return (j - i).clamp(-radius, radius) + radius

    def gate_rows(self, rows: slice) -> Tensor:
        """Key positions of queries, as decay is read there."""
        at = torch.arange(rows.start, rows.stop) + (self.sk - self.sq)
        return at.clamp(0, max(self.sk - 1, 0))

    def bias(self, rows: slice, keys: slice, acc: torch.dtype) -> Tensor | None:
        """The sum of all that is added to the logits of the chunk."""
        m, terms = self.mods, []
        if m.key_bias is not None:
            terms.append(self._key_tensor(m.key_bias, keys).unsqueeze(-2).to(acc))
        if m.bias is not None:
            full = self.heads(self._of_batch(m.bias))
            terms.append(full[..., rows, keys].to(acc))
        if m.rel_bias is not None:
            table = self.heads(m.rel_bias.unsqueeze(0)).to(acc)
            terms.append(table[..., self.distance(rows, keys).to(table.device)])
        if m.decay is not None and self.sk:
            gates = self._key_tensor(m.decay, slice(None))
            here = gates[..., self.gate_rows(rows).to(gates.device)].unsqueeze(-1)
            terms.append((here - gates[..., keys].unsqueeze(-2)).to(acc))
        total = None
        for term in terms:
            total = term if total is None else total + term
        return total

    def visible(self, rows: slice, keys: slice, inside: Tensor | None) -> Tensor | None:
        """``inside`` [R, N] (the window; None is all) and the mods' masks, [.., R, N]."""
        m, seen = self.mods, inside
        j = torch.arange(keys.start, keys.stop)

        def also(condition: Tensor) -> None:
            nonlocal seen
            seen = condition if seen is None else seen & condition

        if m.row_bounds is not None:
            bounds = self._row_tensor(m.row_bounds, rows).unsqueeze(-2)
            place = j.to(bounds.device)
            also((place >= bounds[..., 0]) & (place < bounds[..., 1]))
        if m.segments_q is not None and m.segments_k is not None:
            ids_q = self._of_batch(m.segments_q)[:, self.rows][:, rows]
            ids_k = self._of_batch(m.segments_k)[:, self.keys][:, keys]
            also((ids_q.unsqueeze(-1) == ids_k.unsqueeze(-2))[:, None, None])
        if m.mask is not None:
            full = self.heads(self._of_batch(m.mask))[..., rows, :]
            column = (j - (self.sk - full.shape[-1])).to(full.device)
            if full.shape[-1]:
                also(full[..., column.clamp_min(0)] | (column < 0))
        return seen

    def kept(self, rows: slice, keys: slice, batch: int) -> Tensor | None:
        """Dropout's choice [B, Hk, G, R, N], or None. batch: how many sequences."""
        rng = self.mods.rng
        if rng is None:
            return None
        heads = self.heads_kv * self.group
        number = torch.arange(batch).view(-1, 1) + self.batch.start
        head = (number * heads + torch.arange(heads)).view(batch, self.heads_kv, self.group, 1, 1)
        row = torch.arange(rows.start, rows.stop).view(-1, 1)
        key = torch.arange(keys.start, keys.stop)
        return dropout_keep(self.p.dropout_p, rng, head, row, key)


class Weights(NamedTuple):
    """Weights of a chunk before they are divided, what divides them, and the LSE."""

    value: Tensor  # [.., N]
    total: Tensor  # [.., 1]; 0: nothing to attend to
    lse: Tensor  # [.., 1]


def _row_max(s: Tensor) -> Tensor:
    if s.shape[-1]:
        return s.amax(-1, keepdim=True)
    return torch.full_like(s.sum(-1, keepdim=True), float("-inf"))


def _softplus(s: Tensor) -> Tensor:
    """log(1 + e^s) without overflow: torch's own goes by e^s."""
    return torch.relu(s) + torch.log1p(torch.exp(-s.abs()))


def weigh(s: Tensor, score_fn: str, sinks: Tensor | None) -> Weights:
    """Scores to weights; hidden scores are -inf and get 0."""
    hidden = s == float("-inf")
    if score_fn in ("sigmoid", "relu"):
        value = torch.sigmoid(s) if score_fn == "sigmoid" else torch.relu(s)
        value = value.masked_fill(hidden, 0.0)
        total = (~hidden).any(-1, keepdim=True).to(s.dtype)
        return Weights(value, total, torch.log(total))
    if score_fn == "softplus":
        value = _softplus(s).masked_fill(hidden, 0.0)
        total = value.sum(-1, keepdim=True)
        return Weights(value, total, torch.log(total))
    sign = None
    if score_fn == "signed_softmax":
        sign, s = torch.sign(s), s.abs().masked_fill(hidden, float("-inf"))
    top = _row_max(s)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    base = torch.where(top == float("-inf"), 0.0, top)
    value = torch.exp(s - base)
    total = value.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + exp_gap(sinks, base)
    if sign is not None:
        value = value * sign
    return Weights(value, total, base + torch.log(total))


def exp_gap(x: Tensor, top: Tensor) -> Tensor:
    """exp(x - top) for x <= top, with 1 at equal infinities and 0 at x = -inf."""
    gap = torch.exp(x - top)
    return torch.where(x == float("-inf"), 0.0, torch.where(x == top, 1.0, gap))


def differentiate(
    s: Tensor, score_fn: str, lse: Tensor, dp: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """(P, dS) from dP = d loss / dP and delta = sum_j P dP - dLSE; hidden places are not zeroed."""
    if score_fn == "softmax":
        prob = torch.exp(s - lse)
        return prob, prob * (dp - delta)
    if score_fn == "sigmoid":
        prob = torch.sigmoid(s)
        return prob, prob * torch.sigmoid(-s) * dp
    if score_fn == "relu":
        return torch.relu(s), (s > 0) * dp
    if score_fn == "softplus":
        total = torch.exp(lse)
        prob = _softplus(s) / total
        return prob, torch.sigmoid(s) / total * (dp - delta)
    size, sign = torch.exp(s.abs() - lse), torch.sign(s)
    size = size.masked_fill(s == float("-inf"), 0.0)  # a bias of -inf hides, whatever |s| is
    return size * sign, size * (dp - sign * delta)


def _add(target: Tensor, part: Tensor) -> None:
    """``part`` into a view of a gradient, summed over what the view broadcasts."""
    target += part.sum_to_size(target.shape).to(target.dtype)


def add_mod_grads(m: Scores, grads: FlashGrads, rows: slice, keys: slice, ds: Tensor) -> None:
    """Gradients of the additive mods from dS [B, Hk, G, R, N] of a chunk (before the softcap)."""
    if grads.dkey_bias.numel():
        _add(m._key_tensor(grads.dkey_bias, keys), ds.sum(-2))
    if grads.dbias.numel():
        _add(m.heads(m._of_batch(grads.dbias))[..., rows, keys], ds)
    if grads.drel_bias.numel():
        place = m.distance(rows, keys).to(ds.device).flatten()
        each = ds.sum(0).flatten(-2)  # [Hk, G, R * N]
        sums = each.new_zeros(*each.shape[:2], grads.drel_bias.shape[-1])
        sums.index_add_(-1, place, each)
        _add(m.heads(grads.drel_bias.unsqueeze(0)), sums.unsqueeze(0))
    if grads.ddecay.numel() and m.sk:
        gates = m._key_tensor(grads.ddecay, slice(None))
        sums = ds.new_zeros(*ds.shape[:3], m.sk, dtype=gates.dtype)
        sums[..., keys] -= ds.sum(-2)
        sums.index_add_(-1, m.gate_rows(rows).to(ds.device), ds.sum(-1).to(gates.dtype))
        _add(gates, sums)


def add_row_scale_grad(
    m: Scores, grad: Tensor, rows: slice, ds: Tensor, raw: Tensor, hidden: Tensor
) -> None:
    """d row_scale_i = sum_j dS' raw, with the softcap's slope in dS'."""
    _add(m._row_tensor(grad, rows), (ds * raw).masked_fill(hidden, 0.0).sum(-1))
