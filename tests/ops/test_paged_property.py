"""Property tests of the paged operators: pages, lengths, groups, masks, codes, splits at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge.reference.paged import decoded, encoded
from attnforge.testing.cases import Target
from attnforge.testing.compare import compare, same_bits
from attnforge.testing.paged import CODES, PagedCase

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HEAD_DIMS = st.sampled_from([8, 16, 24, 40, 64, 72])
LENGTHS = st.one_of(st.integers(0, 12), st.integers(12, 90))
PAGE_SIZES = st.one_of(st.integers(1, 9), st.sampled_from([16, 19, 32, 64]))
bounded = settings(max_examples=40, suppress_health_check=list(settings().suppress_health_check))


@st.composite
def cases(draw: st.DrawFn) -> PagedCase:
    """Any call of `paged_attention` but for tree masks and latent pages, which have tests apart."""
    batch, heads_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if draw(st.integers(0, 3)) == 0:  # a length of its own per KV head
        head = st.tuples(*[LENGTHS] * heads_k)
        lengths: Any = draw(st.tuples(*[head] * batch))
    else:
        lengths = draw(st.tuples(*[LENGTHS] * batch))
    rows = st.one_of(st.just(1), st.integers(0, 5), st.integers(0, 30))
    counts = draw(
        st.one_of(st.tuples(*[rows] * batch), st.integers(1, 9).map(lambda n: (n,) * batch))
    )
    code = draw(st.sampled_from(["", "", *CODES]))
    window = draw(st.sampled_from([-1, -1, 0, 3, 40])), draw(st.sampled_from([-1, 0, 2]))
    head_dim = draw(HEAD_DIMS)
    return PagedCase(
        lengths=lengths,
        rows=counts,
        page_size=draw(PAGE_SIZES),
        heads_q=heads_k * draw(st.sampled_from([1, 2, 3, 5, 8])),
        heads_k=heads_k,
        head_dim=head_dim,
        v_head_dim=draw(st.one_of(st.just(head_dim), HEAD_DIMS)),
        dtype=draw(DTYPES),
        code=code,
        scales=draw(st.sampled_from(["head", "page", "token"])),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        strided=draw(st.booleans()),
        packed=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=window,
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@bounded
@given(case=cases(), num_splits=st.sampled_from([0, 0, 1, 2, 7, 64]))
def _attention(target: Target, case: PagedCase, num_splits: int) -> None:
    inputs = case.make()
    got = inputs.forward(target.backend, num_splits=num_splits)
    compare(got, inputs.truth(), str(case)).check()


def test_attention(target: Target) -> None:
    _attention(target)


@settings(max_examples=25)
@given(case=cases(), data=st.data())
def _alone(target: Target, case: PagedCase, data: st.DataObject) -> None:
    """Any one sequence alone, with a table of its own width, gives the bits that it gave."""
    if len(set(case.rows)) > 1 or case.packed:
        case = replace(case, rows=(max(case.rows),) * len(case.rows), packed=False)
    if case.rows[0] == 0:
        return
    inputs = case.make()
    together = inputs.forward(target.backend)
    b = data.draw(st.integers(0, len(case.lengths) - 1))
    o = inputs.options
    mine: dict[str, Any] = {n: o[n][b : b + 1] for n in ("cache_seqlens", "block_table")}
    if case.alibi:
        mine["alibi_slopes"] = o["alibi_slopes"][b : b + 1]
    need = -(-int(mine["cache_seqlens"].max()) // case.page_size)
    spare = data.draw(st.integers(0, 2))
    mine["block_table"] = mine["block_table"][:, : need + spare]
    alone = inputs.with_(q=inputs.q[b : b + 1], **mine).forward(target.backend)
    assert all(same_bits(alone[n][0], together[n][b]) for n in together)


def test_a_sequence_alone(target: Target) -> None:
    _alone(target)


@settings(max_examples=40)
@given(data=st.data())
def _append(target: Target, data: st.DataObject) -> None:
    """New rows are read back from their slots, bounds are those of what is held, the rest stays."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch, heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(PAGE_SIZES)
    dims = [draw(st.sampled_from([2, 6, 8, 34, 40, 64])) for _ in range(2)]
    dtype, code = draw(DTYPES), draw(st.sampled_from(["", "", *CODES]))
    held = CODES[code] if code else dtype
    rows = [draw(st.integers(0, 40)) for _ in range(batch)]
    own = draw(st.booleans())
    before = torch.tensor(
        [[draw(st.integers(0, 50)) for _ in range(heads if own else 1)] for _ in range(batch)]
    ).expand(batch, heads)
    width = int(-(-(before.amax(1) + torch.tensor(rows)).max() // size)) + draw(st.integers(0, 1))
    count = batch * max(width, 1) + 2
    table = torch.randperm(count)[: batch * width].view(batch, width).to(torch.int32)
    layout = draw(st.sampled_from(["NHD", "HND"]))

    def pages(dim: int) -> torch.Tensor:
        last = dim // 2 if code == "int4" else dim
        shape = (count, size, heads, last) if layout == "NHD" else (count, heads, size, last)
        raw = torch.randint(0, 256, (*shape[:-1], last * held.itemsize), dtype=torch.uint8)
        return raw.view(held)

    pool = [pages(d) for d in dims]
    old = [x.clone().view(torch.uint8) for x in pool]
    total = sum(rows)
    new = [torch.randn(total, heads, d).to(dtype) for d in dims]
    extra: dict[str, Any] = {}
    if code:
        extra["kv_scales"] = tuple(torch.rand(count, size, heads) * 0.1 + 0.01 for _ in dims)
    bounds = draw(st.booleans())
    if bounds:
        extra["page_min"], extra["page_max"] = (torch.full((count, heads, dims[0]), s * 1e9)
                                                for s in (1.0, -1.0))  # fmt: skip
        low, high = extra["page_min"].clone(), extra["page_max"].clone()
    ends = torch.tensor([0, *rows]).cumsum(0)
    lengths = (before if own else before[:, 0]).to(torch.int32).contiguous()
    attnforge.paged_append(
        *new, *pool, block_table=table, cache_seqlens=lengths, kv_layout=layout,
        cu_seqlens=ends.to(torch.int32), backend=target.backend, **extra,
    )  # fmt: skip
    for n, (x, written, was) in enumerate(zip(new, pool, old, strict=True)):
        view, was = (y.transpose(1, 2) if layout == "HND" else y
                     for y in (written.view(torch.uint8), was))  # fmt: skip
        touched = torch.zeros(count, size, heads, dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                key = before[b, h] + torch.arange(rows[b])
                page, slot = table[b, key // size].long(), key % size
                touched[page, slot, h] = True
                mine = x[ends[b] : ends[b + 1], h : h + 1]
                scale = extra["kv_scales"][n][page, slot, h].unsqueeze(1) if code else None
                want = encoded(mine, held, scale, None)
                raw = want.squeeze(1).view(torch.uint8)
                assert torch.equal(view[page, slot, h], raw)
                if not bounds or n == 1:
                    continue
                value = decoded(want, scale, None).squeeze(1)
                for p in page.unique():
                    part, fresh = value[page == p], bool((slot[page == p] == 0).any())
                    least, most = part.amin(0), part.amax(0)
                    if not fresh:
                        least, most = least.minimum(low[p, h]), most.maximum(high[p, h])
                    assert torch.equal(extra["page_min"][p, h], least)
                    assert torch.equal(extra["page_max"][p, h], most)
        assert torch.equal(view[~touched], was[~touched])


def test_append(target: Target) -> None:
    _append(target)
