"""SimHash tables in plain PyTorch: the definition of the ``lsh_*`` operators.

Tables hold, for each sequence, KV head, segment of keys and table, the local ids of every bucket:
``ids[starts[code] : starts[code + 1]]``, ascending. Local ids are unsigned 16-bit numbers in an
int16 tensor. Of a code the low ``bits`` bits count: codes are data, and no value of them leads
outside a table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attend", "encode", "inclusion", "insert", "retrieve", "truncate"]

_LEAST = 1e-12  # of an inclusion probability that is a divisor


def encode(x: Tensor, mean: Tensor | None, planes: Tensor, bits: int, codes: Tensor) -> None:
    """Fill codes [B, H, S, L]: bit j of table l is <x - mean, planes[:, l * bits + j]> > 0."""
    rows = x.to(planes.dtype).transpose(1, 2)
    if mean is not None:
        rows = rows - mean.unsqueeze(2).to(planes.dtype)
    signs = rows @ planes > 0
    signs = signs.view(*signs.shape[:-1], codes.shape[-1], bits)
    weight = 1 << torch.arange(bits, device=x.device)
    codes.copy_((signs * weight).sum(-1))


def inclusion(cosine: Tensor, bits: int, tables: int, min_hits: int = 2) -> Tensor:
    """The probability that a key at ``cosine`` shares at least min_hits buckets with the query.

    P = (1 - angle / pi)^bits; u = 1 - (1 - P)^L - [min_hits = 2] L P (1 - P)^(L - 1), float64.
    Where L P < 1 the difference cancels: the tail of the binomial distribution is summed there.
    """
    c = cosine.double().clamp(-1.0, 1.0)
    p = (torch.acos(-c) / math.pi) ** bits
    miss = 1.0 - p
    term = tables * p * miss ** (tables - 1)
    sure = 1.0 - miss**tables - (term if min_hits == 2 else 0.0)
    ratio = torch.where(miss > 0, p / miss.clamp_min(1e-300), 0.0)
    tail = term if min_hits == 1 else torch.zeros_like(term)
    for j in range(1, 30):
        term = term * ratio * ((tables - j) / (j + 1))
        tail = tail + term
    return torch.where(tables * p < 1, tail, sure)


def _codes_of(starts: Tensor, ids: Tensor) -> Tensor:
    """The code of every local id of one table, -1 where an id is not there: [segment]."""
    found = torch.full((ids.shape[0],), -1, dtype=torch.int64, device=ids.device)
    sizes = starts.long().diff()
    codes = torch.repeat_interleave(torch.arange(sizes.shape[0], device=ids.device), sizes)
    found[ids[: codes.shape[0]].long() & 0xFFFF] = codes
    return found


def _store(starts: Tensor, ids: Tensor, code: Tensor) -> None:
    """Write the table of codes [segment], -1 for no key."""
    order = torch.where(code < 0, starts.shape[0], code).argsort(stable=True)
    count = int((code >= 0).sum())
    ids[:count] = order[:count].to(torch.int16)
    sizes = torch.bincount(code[code >= 0], minlength=starts.shape[0] - 1)
    starts[0] = 0
    starts[1:] = sizes.cumsum(0)


def insert(
    starts: Tensor, ids: Tensor, bits: int, codes: Tensor, first: Tensor, count: Tensor
) -> None:
    """Put keys first[b] .. first[b] + count[b] - 1 with codes [B, H, rows, L] behind the others."""
    _, _, segments, _, size = ids.shape
    for b in range(ids.shape[0]):
        start = int(first[b])
        end = min(start + min(int(count[b]), codes.shape[2]), segments * size)
        own = codes[b].long() & ((1 << bits) - 1)
        _insert_sequence(starts[b], ids[b], own, start, end)


def _insert_sequence(starts: Tensor, ids: Tensor, codes: Tensor, first: int, end: int) -> None:
    heads, segments, tables, size = ids.shape
    for s in range(segments):
        lo, hi = max(first, s * size), min(end, (s + 1) * size)
        if lo >= hi:
            continue
        for h in range(heads):
            for t in range(tables):
                code = _codes_of(starts[h, s, t], ids[h, s, t])
                code[lo - s * size : hi - s * size] = codes[h, lo - first : hi - first, t]
                _store(starts[h, s, t], ids[h, s, t], code)


def truncate(starts: Tensor, ids: Tensor, bits: int, length: Tensor) -> None:
    """Drop keys length[b] and later."""
    batch, heads, segments, tables, size = ids.shape
    for b in range(batch):
        for h in range(heads):
            for s in range(segments):
                keep = max(0, min(int(length[b]) - s * size, size))
                for t in range(tables):
                    code = _codes_of(starts[b, h, s, t], ids[b, h, s, t])
                    code[keep:] = -1
                    _store(starts[b, h, s, t], ids[b, h, s, t], code)


def retrieve(
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
    ids: Tensor,
    lens: Tensor,
    log_bias: Tensor,
) -> None:
    """Fill ids [B, Hq, N], lens and log_bias = -log(u + clip) with the keys that are hit."""
    batch, heads, segments, tables, size = table_ids.shape
    group = q.shape[2] // heads
    ids.fill_(-1)
    log_bias.zero_()
    for b in range(batch):
        for h in range(q.shape[2]):
            hits = torch.zeros(segments * size, dtype=torch.int64, device=q.device)
            for s in range(segments):
                for t in range(tables):
                    own = starts[b, h // group, s, t]
                    code = int(codes[b, h, t]) & ((1 << bits) - 1)
                    bucket = table_ids[b, h // group, s, t, int(own[code]) : int(own[code + 1])]
                    hits[s * size + (bucket.long() & 0xFFFF)] += 1
            hits[int(end[b]) :] = 0
            hits[: int(begin[b])] = 0
            found = (hits >= min_hits).nonzero().flatten()
            key = k[b, found, h // group].double()
            row = q[b, 0, h].double()
            row = row / row.abs().max().clamp_min(1e-300)
            if mean is not None:
                key = key - mean[b, h // group].double()
            sizes = row.norm() * norms[b, h // group, found].double()
            cosine = torch.where(sizes > 0, key @ row / sizes.clamp_min(1e-300), 0.0)
            u = (inclusion(cosine.nan_to_num(), bits, tables, min_hits) + clip).clamp(_LEAST, 1.0)
            n = found.shape[0]
            lens[b, h] = n
            ids[b, h, :n] = found.to(torch.int32)
            log_bias[b, h, :n] = -u.log()


def attend(
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
    v: Tensor,
    length: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out [B, 1, Hq, Dv] and lse [B, Hq, 1]: what is retrieved, and all keys that cannot be.

    Those are the keys before ``begin`` and from ``end`` on, up to ``length``; their log-bias is 0.
    """
    batch, _, heads, _ = q.shape
    group = heads // k.shape[2]
    ids = torch.empty((batch, heads, k.shape[1]), dtype=torch.int32, device=q.device)
    log_bias = torch.empty(ids.shape, dtype=torch.float32, device=q.device)
    lens = torch.empty(ids.shape[:2], dtype=torch.int32, device=q.device)
    retrieve(starts, table_ids, bits, codes, q, k, mean, norms, begin, end, min_hits, clip, ids,
             lens, log_bias)  # fmt: skip
    for b in range(batch):
        key = torch.arange(int(length[b]), device=q.device)
        exact = key[(key < begin[b]) | (key >= end[b])]
        for h in range(heads):
            n = int(lens[b, h])
            at = torch.cat([exact, ids[b, h, :n].long()])
            bias = torch.cat([log_bias.new_zeros(exact.shape), log_bias[b, h, :n]]).double()
            rows, values = (x[b, at, h // group].double() for x in (k, v))
            s = scale * rows @ q[b, 0, h].double() + bias
            total = torch.logsumexp(s, 0) if len(s) else s.new_tensor(-math.inf)
            lse[b, h, 0] = total
            out[b, 0, h] = torch.exp(s - total.nan_to_num(neginf=0.0)) @ values
