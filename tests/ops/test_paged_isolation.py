"""What a request may touch: its own used slots, and nothing of anybody else's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge.testing.cases import Target
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.paged import PagedCase, PagedInputs
from attnforge.testing.poison import fenced, guarded, lazy

MIXED = PagedCase(lengths=(70, 9, 0, 260), rows=(1, 9, 1, 70), page_size=8, head_dim=64,
                  dtype=torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("code", ["", "fp8"])
def test_unused_slots_and_pages(target: Target, poison: float, code: str) -> None:
    # checks 55, 56: whatever stands in free slots, results are bitwise the same
    inputs = PagedCase(lengths=(70, 9, 0), rows=(2, 2, 2), page_size=8, code=code).make()
    want = inputs.forward(target.backend)
    size = inputs.case.page_size
    used = torch.zeros(inputs.k_pages.shape[:2], dtype=torch.bool)
    for b, length in enumerate((70, 9, 0)):
        key = torch.arange(length)
        used[inputs.options["block_table"][b, key // size].long(), key % size] = True
    k, v = inputs.k_pages.clone(), inputs.v_pages.clone()
    if code:
        for x in (k, v):
            x.view(torch.uint8)[~used] = 0x7E if poison == 1e30 else 0x7F
    else:
        k[~used], v[~used] = poison, poison
    assert_same(inputs.with_(k_pages=k, v_pages=v).forward(target.backend), want)


def alone(inputs: PagedInputs, b: int) -> PagedInputs:
    """Sequence b of a packed call as a call of its own, its table no wider than it must be."""
    o, ends = inputs.options, inputs.options["cu_seqlens_q"].tolist()
    length = int(o["cache_seqlens"][b])
    width = -(-length // inputs.case.page_size)
    return inputs.with_(
        q=inputs.q[ends[b] : ends[b + 1]], block_table=o["block_table"][b : b + 1, :width],
        cache_seqlens=o["cache_seqlens"][b : b + 1],
        cu_seqlens_q=torch.tensor([0, ends[b + 1] - ends[b]], dtype=torch.int32),
    )  # fmt: skip


@pytest.mark.parametrize("num_splits", [0, 3])
def test_neighbours_change_nothing(target: Target, num_splits: int) -> None:
    # check 74
    inputs = MIXED.make()
    whole = inputs.forward(target.backend, num_splits=num_splits)
    ends = inputs.options["cu_seqlens_q"].tolist()
    for b in range(4):
        span = slice(ends[b], ends[b + 1])
        mine = {"out": whole["out"][span], "lse": whole["lse"][:, span]}
        got = alone(inputs, b).forward(target.backend, num_splits=num_splits)
        assert_same(got, mine, exact=target.exact)
    assert not whole["out"][ends[-1] :].any()
    assert (whole["lse"][:, ends[-1] :] == -torch.inf).all()


def test_threads_and_repeats(level: Target) -> None:
    # checks 72, 73
    inputs = PagedCase(lengths=(4100, 70, 900), rows=(1, 30, 130), head_dim=32).make()
    want = inputs.forward("cpu")
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        assert_same(inputs.forward("cpu"), want)


def test_a_nan_stays_in_its_request(target: Target) -> None:
    # checks 18, 19
    inputs = MIXED.make()
    want = inputs.forward(target.backend)
    k = inputs.k_pages.clone()
    k[inputs.options["block_table"][3, 2].long(), 3, 1, 5] = float("nan")
    got = inputs.with_(k_pages=k).forward(target.backend)
    first = int(inputs.options["cu_seqlens_q"][3])
    assert same_bits(got["out"][:first], want["out"][:first])
    assert got["out"][first:-3, 2:].isnan().all()
    assert same_bits(got["out"][first:, :2].contiguous(), want["out"][first:, :2].contiguous())


def test_shared_pages(target: Target) -> None:
    # check 39: reading one page from two requests
    inputs = PagedCase(lengths=(64, 64), rows=(3, 3)).make()
    table = inputs.options["block_table"].clone()
    table[1] = table[0]
    shared = inputs.with_(block_table=table)
    compare(shared.forward(target.backend), shared.truth()).check()


@pytest.mark.parametrize("bad", [-1, -(1 << 31), 2147480000, 99999])
@pytest.mark.parametrize("rows", [1, 20, 120])
def test_bad_page_ids(backend: str, bad: int, rows: int) -> None:
    # check 38: an id within the length is an error, behind it nobody looks
    inputs = PagedCase(lengths=(70, 30), rows=(rows, rows)).make()
    table = inputs.options["block_table"].clone()
    table[1, 2:] = bad
    want = inputs.forward(backend)
    assert_same(inputs.with_(block_table=table).forward(backend), want)
    table[0, 3] = bad
    text = rf"paged_attention: block_table\[0, 3\] is {bad}; got \d+ pages"
    with pytest.raises(ValueError, match=text):
        inputs.with_(block_table=table).forward(backend)


def test_pages_left_of_the_window_may_be_gone(target: Target) -> None:
    inputs = PagedCase(lengths=(90, 50), rows=(2, 2), window=(20, 0), page_size=8).make()
    want = inputs.forward(target.backend)
    table = inputs.options["block_table"].clone()
    table[0, :8] = -1  # keys below 90 - 2 - 20 = 68
    assert_same(inputs.with_(block_table=table).forward(target.backend), want)
    table[0, 8] = -1
    with pytest.raises(ValueError, match=r"block_table\[0, 8\] is -1"):
        inputs.with_(block_table=table).forward(target.backend)


def test_masked_pages_of_unchecked_devices() -> None:
    # Without a look at values (the operator on a GPU) keys of missing pages are masked.
    from attnforge._params import PagedCache, PagedParams
    from attnforge.reference import paged as reference

    inputs = PagedCase(lengths=(12, 12), rows=(1, 1), page_size=4, causal=False).make()
    o, table = inputs.options, inputs.options["block_table"].clone()
    table[0, 1] = -(1 << 31)
    results = []
    for ids in (table, o["block_table"]):
        cache = PagedCache(inputs.k_pages, inputs.v_pages, ids, o["cache_seqlens"])
        p = PagedParams(None, None, None, None, 1, 0.2, -1, -1, 0.0)
        out, lse = torch.empty(2, 1, 4, 32), torch.empty(2, 4, 1)
        reference.forward(inputs.q, cache, p, out, lse)
        results.append((out, lse))
    (out, lse), (whole, whole_lse) = results
    assert same_bits(out[1], whole[1])
    assert same_bits(lse[1], whole_lse[1])
    kept = inputs.with_(block_table=o["block_table"][:, [0, 2]].clone(),
                        cache_seqlens=torch.tensor([8, 8], dtype=torch.int32),
                        softmax_scale=0.2)  # fmt: skip
    torch.testing.assert_close(out[0], kept.forward("reference")["out"][0])


def test_fences_and_guard_pages(level: Target) -> None:
    # checks 57, 58
    inputs = PagedCase(lengths=(32, 17), rows=(2, 2), head_dim=24, page_size=16).make()
    want = inputs.forward("cpu")
    fences = {n: fenced(x) for n, x in (("q", inputs.q), ("k_pages", inputs.k_pages),
                                        ("v_pages", inputs.v_pages))}  # fmt: skip
    got = inputs.with_(**{n: f.tensor for n, f in fences.items()}).forward("cpu")
    assert_same(got, want)
    assert all(f.intact() for f in fences.values())
    for side in ("start", "end"):
        walls: dict[str, Any] = {n: guarded(getattr(inputs, n), side) for n in fences}
        walls |= {n: guarded(inputs.options[n], side) for n in ("block_table", "cache_seqlens")}
        assert_same(inputs.with_(**walls).forward("cpu"), want)


def test_offsets_past_32_bits(level: Target) -> None:
    # checks 63, 65: page ids high in a pool of more than 2^31 elements
    inputs = PagedCase(lengths=(40, 20), rows=(1, 40), page_size=8, head_dim=64).make()
    want = inputs.forward("cpu")
    p, s, h, d = inputs.k_pages.shape
    count = (1 << 31) // (s * h * d) + 64
    pools = []
    for x in (inputs.k_pages, inputs.v_pages):
        pool = lazy(count * s * h * d, torch.float32).view(count, s, h, d)
        pool[count - p :] = x
        pools.append(pool)
    table = inputs.options["block_table"] + (count - p)
    got = inputs.with_(k_pages=pools[0], v_pages=pools[1], block_table=table).forward("cpu")
    assert_same(got, want)


def test_inputs_are_not_changed(level: Target) -> None:
    # check 71
    inputs = MIXED.make()
    tensors = [inputs.q, inputs.k_pages, inputs.v_pages, inputs.options["block_table"]]
    before = [x.clone() for x in tensors]
    inputs.forward("cpu")
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_freed_page_tells_nothing() -> None:
    """A page that was another request's: its old content does not reach the new owner."""
    k, v = torch.randn(2, 8, 1, 16), torch.randn(2, 8, 1, 16)
    ids = torch.tensor([[0]], dtype=torch.int32)
    results = []
    for old in (0.0, float("nan"), 1e30):
        pools = [torch.full((1, 8, 1, 16), old) for _ in range(2)]
        attnforge.paged_append(k[:1, :3], v[:1, :3], *pools, block_table=ids,
                               cache_seqlens=torch.zeros(1, dtype=torch.int32))  # fmt: skip
        out = attnforge.paged_attention(
            k[1:, :1], *pools, block_table=ids, cache_seqlens=torch.tensor([3], dtype=torch.int32)
        )
        results.append(out)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
