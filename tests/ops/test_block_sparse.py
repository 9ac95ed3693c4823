"""Block-sparse attention against the float64 truth of the same mask, and what must not matter."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge.testing.block_sparse import check, random_lists
from attnforge.testing.cases import FlashCase, FlashInputs, Target
from attnforge.testing.compare import same_bits

SHAPES = {
    # q_block, kv_block, list heads: per token and per block, small and large, per KV head or not
    "token": (1, 16, 2),
    "token-query-heads": (1, 48, 4),
    "moba": (1, 128, 4),
    "rows16": (16, 64, 1),
    "seer": (64, 64, 4),
    "wide": (32, 300, 2),
    "keys": (8, 1, 2),
}

# bf16 beside fp32: matrix tiles serve it alone.
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values(target: Target, shape: str, causal: bool, dtype: torch.dtype) -> None:
    q_block, kv_block, heads = SHAPES[shape]
    case = FlashCase(seqlen_q=70, seqlen_k=333, heads_q=4, heads_k=2, head_dim=40, v_head_dim=24,
                     causal=causal, dtype=dtype)  # fmt: skip
    check(case, random_lists(case, heads, q_block, kv_block, 0.4), target.backend)


def test_backward_goes_by_bands(target: Target) -> None:
    """128 heads of one KV head: the slabs of dQ take 128 queries, so these are three bands."""
    case = FlashCase(batch=1, seqlen_q=300, seqlen_k=333, heads_q=128, heads_k=1, head_dim=32,
                     v_head_dim=8, causal=True)  # fmt: skip
    check(case, random_lists(case, 1, 8, 64, 0.4), target.backend)


def test_bands_of_packed_sequences(level: Target) -> None:
    """Short ones end in an early band; each has the bits that it has alone."""
    ends = (0, 300, 305, 455)
    q, k, v = (torch.randn(455, h, 32) for h in (128, 1, 1))
    rows = [-(-(b - a) // 8) for a, b in itertools.pairwise(ends)]
    ids = torch.randint(-1, 5, (1, sum(rows), 3), dtype=torch.int32)

    def gradients(x: Any, lists: Tensor, **more: Any) -> Any:
        x = [t.clone().requires_grad_() for t in x]
        selection = BlockSelection(lists, 8, 64)
        out = attnforge.block_sparse_attention(*x, selection, backend=level.backend, **more)
        return torch.autograd.grad(out.square().sum(), x)

    cu = torch.tensor(ends, dtype=torch.int32)
    whole = gradients((q, k, v), ids, cu_seqlens_q=cu, cu_seqlens_k=cu)
    lists = ids.split(rows, 1)
    for (a, b), own in zip(itertools.pairwise(ends), lists, strict=True):
        alone = gradients([x[None, a:b] for x in (q, k, v)], own[None])
        for got, want in zip(whole, alone, strict=True):
            assert same_bits(got[a:b], want[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(level: Target, dtype: torch.dtype) -> None:
    for head_dim, q_block, kv_block in ((64, 1, 64), (128, 64, 64), (192, 128, 48), (256, 4, 32)):
        case = FlashCase(batch=1, seqlen_q=66, seqlen_k=130, heads_q=4, heads_k=2, causal=True,
                         head_dim=head_dim, dtype=dtype)  # fmt: skip
        check(case, random_lists(case, 2, q_block, kv_block, 0.5), level.backend)


@pytest.mark.parametrize(
    "case",
    [
        FlashCase(seqlen_q=33, seqlen_k=65, softcap=5.0, causal=True),
        FlashCase(seqlen_q=33, seqlen_k=65, alibi="batch", sinks="mixed", causal=True),
        FlashCase(seqlen_q=65, seqlen_k=65, window=(20, 3)),
        FlashCase(seqlen_q=5, seqlen_k=65, sinks="normal", layout="heads_first"),
        FlashCase(seqlen_q=70, seqlen_k=20, causal=True),
        FlashCase(seqlen_q=33, seqlen_k=65, spread=60.0),
    ],
    ids=lambda case: f"{case.seqlen_q}-{case.window}-{case.softcap}-{case.alibi}-{case.sinks}",
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(target: Target, case: FlashCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    for q_block, kv_block in ((1, 8), (64, 16)):
        check(case, random_lists(case, 2, q_block, kv_block, 0.6), target.backend)


# Fixtures hold for all examples of a test, which is meant: the ISA level does not change.
@settings(max_examples=25, suppress_health_check=list(settings().suppress_health_check))
@given(data=st.data())
def _any_shape(level: Target, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([1, 2, 3, 7]), "group")
    heads_k = data.draw(st.integers(1, 2), "heads_k")
    case = FlashCase(
        batch=data.draw(st.integers(1, 2), "batch"),
        seqlen_q=data.draw(st.integers(1, 80), "rows"),
        seqlen_k=data.draw(st.integers(1, 150), "keys"),
        heads_q=group * heads_k,
        heads_k=heads_k,
        head_dim=data.draw(st.sampled_from([8, 24, 64]), "head_dim"),
        causal=data.draw(st.booleans(), "causal"),
        dtype=data.draw(st.sampled_from(DTYPES), "dtype"),
    )
    heads = data.draw(st.sampled_from(sorted({1, heads_k, group * heads_k})), "list heads")
    q_block = data.draw(st.sampled_from([1, 3, 16, 64, 128]), "q_block")
    kv_block = data.draw(st.sampled_from([1, 5, 32, 64, 100]), "kv_block")
    density = data.draw(st.sampled_from([0.0, 0.2, 1.0]), "density")
    check(case, random_lists(case, heads, q_block, kv_block, density), level.backend)


def test_any_shape(level: Target) -> None:
    _any_shape(level)


def test_every_block_is_dense_attention(target: Target) -> None:
    case = FlashCase(seqlen_q=70, seqlen_k=130, heads_q=4, heads_k=2, causal=True)
    for q_block, kv_block in ((1, 32), (64, 64)):
        every = random_lists(case, 1, q_block, kv_block, 2.0)
        check(case, every, target.backend, torch.ones(1, 1, 70, 130, dtype=torch.bool))


def test_no_block(target: Target) -> None:
    case = FlashCase(seqlen_q=9, seqlen_k=30)
    none = BlockSelection.from_indices(torch.full((1, 1, 9, 3), -1), q_block=1, kv_block=8)
    call = functools.partial(attnforge.block_sparse_attention, selection=none)
    got = dataclasses.replace(case.make(), call=call).run(target.backend)
    assert (got["lse"] == -math.inf).all()
    assert not any(got[name].any() for name in ("out", "dq", "dk", "dv"))


def run(inputs: FlashInputs, selection: BlockSelection, backend: str, **more: Any) -> Any:
    call = functools.partial(attnforge.block_sparse_attention, selection=selection, **more)
    return dataclasses.replace(inputs, call=call).run(backend)


def test_order_and_repetition_do_not_matter(target: Target) -> None:
    case = FlashCase(seqlen_q=40, seqlen_k=100, causal=True)
    one = random_lists(case, 2, 4, 16, 0.5)
    ids = one.indices.flip(-1)
    two = BlockSelection.from_indices(torch.cat([ids, ids], -1), q_block=4, kv_block=16)
    inputs = case.make()
    for a, b in zip(run(inputs, one, target.backend).values(),
                    run(inputs, two, target.backend).values(), strict=True):  # fmt: skip
        assert same_bits(a, b)


def test_slots_past_the_count_are_not_read(target: Target) -> None:
    case = FlashCase(seqlen_q=20, seqlen_k=64)
    inputs = case.make()
    ids = torch.randint(0, 4, (2, 2, 20, 4), dtype=torch.int32)
    counts = torch.randint(0, 5, (2, 2, 20), dtype=torch.int32)
    clean = torch.where(torch.arange(4) < counts.unsqueeze(-1), ids, -1)
    dirty = BlockSelection.from_indices(ids, q_block=1, kv_block=16, counts=counts)
    want = run(inputs, BlockSelection.from_indices(clean, q_block=1, kv_block=16), target.backend)
    for a, b in zip(run(inputs, dirty, target.backend).values(), want.values(), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_block", [1, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_values_do_not_leak(
    target: Target, value: float, q_block: int, dtype: torch.dtype
) -> None:
    """Keys of no list, and keys behind a row's position in a block that it does list."""
    case = FlashCase(seqlen_q=64, seqlen_k=64, causal=True, dtype=dtype)
    inputs = case.make()
    ids = torch.tensor([[0, 2]]).expand(1, 1, 64 // q_block, 2)
    lists = BlockSelection.from_indices(ids, q_block=q_block, kv_block=16)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, 16:32], v[:, 16:32] = value, value  # block 1 is in no list
    k[:, 40:48], v[:, 40:48] = value, value  # the end of block 2
    clean = run(inputs, lists, target.backend)
    dirty = run(inputs.with_(k=k, v=v), lists, target.backend)
    for name in ("out", "dq"):
        assert same_bits(clean[name][:, :40], dirty[name][:, :40])
    assert same_bits(clean["lse"][..., :40], dirty["lse"][..., :40])
    for name in ("dk", "dv"):
        assert not dirty[name][:, 16:32].any()
        assert not dirty[name][:, 48:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_one_by_one(target: Target, dtype: torch.dtype) -> None:
    lengths, q_block, kv_block = ((30, 50), (0, 7), (1, 40), (33, 33)), 8, 16
    inputs = FlashCase(lengths=lengths, heads_q=4, heads_k=2, causal=True, dtype=dtype).make()
    g = torch.Generator().manual_seed(0)
    rows = sum(-(-n // q_block) for n, _ in lengths)
    ids = torch.randint(-1, 4, (2, rows, 3), generator=g, dtype=torch.int32)
    whole = run(inputs, BlockSelection.from_indices(ids, q_block=q_block, kv_block=kv_block),
                target.backend)  # fmt: skip
    row = r0 = k0 = 0
    assert inputs.dlse is not None
    for n, m in lengths:
        own = -(-n // q_block)
        lists = BlockSelection.from_indices(ids[None, :, row : row + own], q_block=q_block,
                                            kv_block=kv_block)  # fmt: skip
        part = inputs.with_(
            q=inputs.q[None, r0 : r0 + n], k=inputs.k[None, k0 : k0 + m],
            v=inputs.v[None, k0 : k0 + m], dout=inputs.dout[None, r0 : r0 + n],
            dlse=inputs.dlse[None, :, r0 : r0 + n],
        )  # fmt: skip
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            del part.options[name]
        got = run(part, lists, target.backend)
        for name in ("out", "dq"):
            assert same_bits(whole[name][r0 : r0 + n], got[name][0])
        for name in ("dk", "dv"):
            assert same_bits(whole[name][k0 : k0 + m], got[name][0])
        assert same_bits(whole["lse"][:, r0 : r0 + n], got["lse"][0])
        row, r0, k0 = row + own, r0 + n, k0 + m


def test_keys_in_use(target: Target) -> None:
    case = FlashCase(seqlen_q=20, seqlen_k=70, causal=True, used=(70, 33))
    inputs = case.make()
    lists = random_lists(case, 2, 1, 16, 0.7)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[1, 33:], v[1, 33:] = math.nan, math.nan
    got = run(inputs.with_(k=k, v=v), lists, target.backend)
    short = FlashCase(batch=1, seqlen_q=20, seqlen_k=33, causal=True).make()
    assert inputs.dlse is not None
    short = short.with_(q=inputs.q[1:], k=inputs.k[1:, :33], v=inputs.v[1:, :33],
                        dout=inputs.dout[1:], dlse=inputs.dlse[1:])  # fmt: skip
    own = BlockSelection.from_indices(lists.indices[1:], q_block=1, kv_block=16)
    want = run(short, own, target.backend)
    assert same_bits(got["out"][1:], want["out"])
    assert same_bits(got["dk"][1:, :33], want["dk"])
    assert not got["dk"][1, 33:].any()


def test_parts_merge(target: Target) -> None:
    """attention(A + B) = merge(attention(A), attention(B)) for disjoint lists."""
    inputs = FlashCase(seqlen_q=40, seqlen_k=96).make()
    whole = torch.rand(2, 2, 40, 6, generator=torch.Generator().manual_seed(0)) < 0.8
    left = whole & (torch.arange(6) < 3)
    results = []
    for mask in (whole, left, whole & ~left):
        lists = BlockSelection.from_mask(mask, q_block=1, kv_block=16)
        results.append(
            attnforge.block_sparse_attention(inputs.q, inputs.k, inputs.v, lists, causal=False,
                                             return_lse=True, backend=target.backend)
        )  # fmt: skip
    (out, lse), *parts = results
    merged, merged_lse = attnforge.merge_states(*map(list, zip(*parts, strict=True)))
    torch.testing.assert_close(merged, out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_neighbours_do_not_matter(threads: int) -> None:
    case = FlashCase(batch=3, seqlen_q=130, seqlen_k=130, heads_q=4, heads_k=2, causal=True)
    inputs, lists = case.make(), random_lists(case, 4, 1, 32, 0.5)
    before = torch.get_num_threads()
    want = run(inputs, lists, "cpu")
    assert inputs.dlse is not None
    one = inputs.with_(q=inputs.q[1:2], k=inputs.k[1:2], v=inputs.v[1:2], dout=inputs.dout[1:2],
                       dlse=inputs.dlse[1:2])  # fmt: skip
    own = BlockSelection.from_indices(lists.indices[1:2], q_block=1, kv_block=32)
    try:
        torch.set_num_threads(threads)
        for name, got in run(one, own, "cpu").items():
            assert same_bits(got, want[name][1:2])
    finally:
        torch.set_num_threads(before)
