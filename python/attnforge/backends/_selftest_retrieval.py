"""The problems of the self-test of the retrieval kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FlashTape, IndexedGrads, IndexedParams, SelectParams
from attnforge.reference import lsh, retrieval, selection

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {"pages": frozenset({"paged"})}
_ROWS, _KEYS, _HEADS, _HEADS_KV, _DIM, _ENTRIES = 3, 150, 4, 2, 64, 70
_PAGE = 10


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference)."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    if kind.startswith("indexed"):
        return _attention(kind, group, run, normal, g)
    if kind == "select_columns":
        return _selection(run, normal(4, 3 * _KEYS).float())
    if kind in ("lsh_insert", "lsh_truncate"):
        return _tables(kind, run, g, device)
    if kind.startswith("lsh"):
        return _hashed(kind, run, normal)
    return _scores(kind, group, run, normal, g)


def _in_pages(g: torch.Generator, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A table, and tensors [B, S, Hk, X] as pages."""
    pages = 2 * _KEYS // _PAGE
    table = torch.randperm(pages, generator=g).view(2, -1).int().to(tensors[0].device)
    return table, *(x.view(pages, _PAGE, *x.shape[2:]) for x in tensors)


def _used(x: Tensor) -> Tensor:
    return torch.tensor([_KEYS, _KEYS - 30], dtype=torch.int32, device=x.device)


def _attention(
    kind: str, group: str, run: Callable[..., Any], normal: Callable[..., Tensor],
    g: torch.Generator,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    q, k = normal(2, _ROWS, _HEADS, _DIM), normal(2, _KEYS, _HEADS_KV, _DIM)
    v, dout = normal(*k.shape), normal(*q.shape)
    ids = torch.randint(-1, _KEYS, (2, _HEADS, _ENTRIES), generator=g, dtype=torch.int32)
    bias = torch.randn(ids.shape, generator=g).to(q.device)
    p = IndexedParams(ids.to(q.device), None, bias, None, _used(q), _DIM**-0.5)
    if group:
        table, k, v = _in_pages(g, k, v)
        p = p._replace(block_table=table)
    none = q.new_empty(0)
    low = torch.empty_like(q) if kind == "indexed_bwd" and q.dtype.itemsize == 2 else none
    want = torch.empty_like(q), q.new_empty((2, _HEADS, _ROWS), dtype=torch.float32)
    retrieval.forward(q, k, v, p, *want, low)
    if kind == "indexed_fwd":
        got = torch.empty_like(q), torch.empty_like(want[1])
        run(q, k, v, p, *got, none)
        return list(got), list(want)
    tape, found = FlashTape(q, k, v, *want, low), []
    for backward in (run, retrieval.backward):
        grads = IndexedGrads(*map(torch.empty_like, (q, k, v, bias)))
        backward(dout, None, tape, p, grads)
        found.append(list(grads))
    return found[0], found[1]


def _scores(
    kind: str, group: str, run: Callable[..., Any], normal: Callable[..., Tensor],
    g: torch.Generator,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    q, k = normal(2, _ROWS, _HEADS, _DIM), normal(2, _KEYS, _HEADS_KV, _DIM)
    of_keys, reference = kind == "key_scores", getattr(selection, kind)
    operands, table = [k] if of_keys else [k - 1, k + 1], None
    if group and of_keys:
        table, *operands = _in_pages(g, k)
    elif group:
        operands = [x.flatten(0, 1) for x in operands]
        table = torch.randperm(2 * _KEYS, generator=g).view(2, -1).int().to(q.device)
    size = torch.randint(0, 4, (2, _HEADS_KV, _KEYS), generator=g).int().to(q.device)
    calls = [(table, _used(q), None) if of_keys else (None, table, _used(q))]
    if of_keys and not group:
        calls.append((None, None, size))
    results = []
    for score in (run, reference):
        results.append([q.new_empty((2, _HEADS, _ROWS, _KEYS), dtype=torch.float32) for _ in calls])
        for options, out in zip(calls, results[-1], strict=True):
            score(q, *operands, *options, _DIM**-0.5, *([] if of_keys else [False]), out)
    return results[0], results[1]


def _selection(run: Callable[..., Any], scores: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every kind of choice, with ties and forced columns."""
    scores = (8 * scores).round() / 8
    limit = scores.new_full((1,), 0.5)
    results: list[list[Tensor]] = []
    for select in (run, selection.select_columns):
        found = []
        for p in (
            SelectParams("topk", 40, None, 1.0, 1, 2),
            SelectParams("threshold", 0, limit, 1.0, 0, 1),
            SelectParams("topp", 0, None, 0.7, 2, 0),
        ):
            ids = torch.empty((4, 90), dtype=torch.int32, device=scores.device)
            found += [ids, torch.empty_like(ids[:, 0])]
            select(scores, None, p, *found[-2:])
        results.append(found)
    return results[0], results[1]


def _hashed(
    kind: str, run: Callable[..., Any], normal: Callable[..., Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Codes of small integers, whose products are exact; then what they retrieve."""
    bits, tables = 3, 6
    x = normal(2, _KEYS, _HEADS_KV, _DIM).mul(2).round()
    planes = normal(_DIM, bits * tables).float().mul(4).round()
    codes = [x.new_empty((2, _HEADS_KV, _KEYS, tables), dtype=torch.int16) for _ in range(2)]
    encode = lsh.encode if kind != "lsh_encode" else run
    for hashed, own in zip((encode, lsh.encode), codes, strict=True):
        hashed(x, None, planes, bits, own)
    if kind == "lsh_encode":
        return [codes[0]], [codes[1]]
    shape = (2, _HEADS_KV, 1, tables)
    starts = torch.zeros(*shape, (1 << bits) + 1, dtype=torch.int32, device=x.device)
    ids = torch.zeros(*shape, 256, dtype=torch.int16, device=x.device)
    zero = torch.zeros(2, dtype=torch.int32, device=x.device)
    lsh.insert(starts, ids, bits, codes[0], zero, zero + _KEYS)
    q, asked = normal(2, 1, _HEADS, _DIM), codes[0][:, :, 7].repeat_interleave(2, 1)
    norms = x.float().norm(dim=-1).transpose(1, 2).contiguous()
    results = []
    for retrieve in (run, lsh.retrieve):
        found = torch.empty((2, _HEADS, _KEYS), dtype=torch.int32, device=x.device)
        lens, bias = torch.empty_like(found[..., 0]), torch.empty(found.shape, device=x.device)
        retrieve(starts, ids, bits, asked, q, x, None, norms, zero + 3, _used(x), 2, 0.0, found,
                 lens, bias)  # fmt: skip
        behind = torch.arange(_KEYS, device=x.device) >= lens.unsqueeze(-1)
        results.append([found.masked_fill(behind, -1), lens, bias.masked_fill(behind, 0.0)])
    return results[0], results[1]


def _tables(
    kind: str, run: Callable[..., Any], g: torch.Generator, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Tables of several segments: keys go in at two times, and some leave. Ids behind are -1."""
    bits, tables, segment, grown = 3, 4, 64, 90
    codes = torch.randint(0, 1 << bits, (2, 2, _KEYS, tables), generator=g).short().to(device)
    shape = (2, 2, -(-_KEYS // segment), tables)
    results = []
    inserts, cuts = kind == "lsh_insert", kind == "lsh_truncate"
    for insert, truncate in (
        (run if inserts else lsh.insert, run if cuts else lsh.truncate),
        (lsh.insert, lsh.truncate),
    ):
        starts = torch.zeros(*shape, (1 << bits) + 1, dtype=torch.int32, device=device)
        ids = torch.zeros(*shape, segment, dtype=torch.int16, device=device)
        first = torch.zeros(2, dtype=torch.int32, device=device)
        insert(starts, ids, bits, codes, first, first + grown)
        count = torch.tensor([_KEYS - grown, 5], dtype=torch.int32, device=device)
        insert(starts, ids, bits, codes[:, :, grown:].contiguous(), first + grown, count)
        if cuts:
            truncate(starts, ids, bits, torch.tensor([70, 7], device=device).int())
        behind = torch.arange(segment, device=device) >= starts[..., -1:]
        results.append([starts, ids.masked_fill(behind, -1)])
    return results[0], results[1]
