"""CUDA kernels of block-sparse attention under the emulator: values within the bounds of float64,
what must not matter, and decode through the paged kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge._params import BlockLists, FlashParams
from attnforge.backends.cuda import block_sparse
from attnforge.testing.block_sparse import check, random_lists
from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import assert_same, same_bits

pytestmark = pytest.mark.usefixtures("twin")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32, BF16, FP16 = DTYPES
NAMES = ["fp32", "bf16", "fp16"]


def run(inputs: FlashInputs, selection: BlockSelection) -> dict[str, Tensor]:
    call = functools.partial(attnforge.block_sparse_attention, selection=selection)
    return dataclasses.replace(inputs, call=call).run("emulated")


def bounded(case: FlashCase, heads: int, q_block: int, kv_block: int, density: float = 0.6) -> None:
    lists = random_lists(case, heads, q_block, kv_block, density)
    check(case, lists, "emulated", rounded=True)


@pytest.mark.parametrize("q_block", [2, 20], ids=["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("d", "dv"), block_sparse.HEAD_DIMS)
def test_every_kernel(d: int, dv: int, dtype: torch.dtype, q_block: int) -> None:
    # 3 heads share a list: 6 rows for the warps of a block together, or 60 in a tile
    bounded(FlashCase(batch=1, seqlen_q=q_block + 3, seqlen_k=40, heads_q=3, heads_k=1, head_dim=d,
                      v_head_dim=dv, causal=True, dtype=dtype), 1, q_block, 16)  # fmt: skip


# q_block, kv_block, list heads; of 4 query heads on 2 KV heads
SHAPES = {
    "token": (1, 16, 2),
    "token-query-heads": (1, 40, 4),
    "square": (32, 32, 4),
    "wide": (20, 90, 2),
    "large": (64, 4096, 1),
    "keys": (8, 1, 2),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, causal: bool) -> None:
    q_block, kv_block, heads = SHAPES[shape]
    rows, keys = (26, 150) if min(q_block, kv_block) > 1 else (9, 50 if kv_block > 1 else 17)
    bounded(FlashCase(batch=1, seqlen_q=rows, seqlen_k=keys, heads_q=4, heads_k=2, head_dim=24,
                      v_head_dim=40, causal=causal, dtype=DTYPES[causal]), heads, q_block,
            kv_block)  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 8), (32, 16)], ids=["few", "many"])
@pytest.mark.parametrize(
    "case",
    [
        FlashCase(batch=1, softcap=5.0, causal=True, dtype=BF16),
        FlashCase(batch=2, alibi="batch", sinks="mixed", causal=True, dtype=FP16),
        FlashCase(batch=1, window=(20, 3), dtype=BF16),
        FlashCase(batch=1, sinks="normal", layout="heads_first"),
    ],
    ids=["softcap", "alibi", "window", "layout"],
)
def test_options(case: FlashCase, shape: tuple[int, int]) -> None:
    case = dataclasses.replace(case, seqlen_q=34, seqlen_k=50, heads_q=2, heads_k=1, head_dim=16)
    bounded(case, 1, *shape)


@pytest.mark.parametrize(
    ("group", "per_query_head"), [(1, False), (3, True), (5, False), (7, False), (16, False)]
)
def test_groups(group: int, per_query_head: bool) -> None:
    case = FlashCase(batch=1, seqlen_q=5, seqlen_k=40, heads_q=2 * group, heads_k=2, head_dim=8,
                     causal=True, dtype=BF16)  # fmt: skip
    bounded(case, 2 * group if per_query_head else 2, 1, 16)


def test_no_block() -> None:
    none = torch.full((1, 1, 9, 3), -1)
    lists = BlockSelection.from_indices(none, q_block=1, kv_block=8)
    got = run(FlashCase(seqlen_q=9, seqlen_k=30).make(), lists)
    assert (got["lse"] == -math.inf).all()
    assert not any(got[name].any() for name in ("out", "dq", "dk", "dv"))


def test_order_repetition_and_slots_past_the_count_do_not_matter() -> None:
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=64, causal=True, dtype=BF16).make()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 4, (1, 2, 5, 4), dtype=torch.int32, generator=g)
    counts = torch.randint(0, 5, (1, 2, 5), dtype=torch.int32, generator=g)
    clean = torch.where(torch.arange(4) < counts.unsqueeze(-1), ids, -1)

    def lists(ids: Tensor, **more: Any) -> BlockSelection:
        return BlockSelection.from_indices(ids, q_block=4, kv_block=16, **more)

    want = run(inputs, lists(clean))
    assert_same(run(inputs, lists(ids, counts=counts)), want)
    assert_same(run(inputs, lists(torch.cat([clean.flip(-1), clean], -1))), want)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("q_block", [8, 40], ids=["few", "many"])
def test_hidden_values_do_not_leak(value: float, q_block: int) -> None:
    """Keys of no list, and keys behind a row's position in a block that it does list."""
    inputs = FlashCase(batch=1, seqlen_q=64, seqlen_k=64, causal=True, heads_q=2, heads_k=1,
                       dtype=BF16).make()  # fmt: skip
    ids = torch.tensor([[0, 2]]).expand(1, 1, -(-64 // q_block), 2)
    lists = BlockSelection.from_indices(ids, q_block=q_block, kv_block=16)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, 16:32], v[:, 16:32] = value, value  # block 1 is in no list
    k[:, 40:48], v[:, 40:48] = value, value  # the end of block 2
    clean, dirty = run(inputs, lists), run(inputs.with_(k=k, v=v), lists)
    for name in ("out", "dq"):
        assert same_bits(clean[name][:, :40], dirty[name][:, :40])
        assert not bool(dirty[name][:, 40:].isfinite().all())
    assert same_bits(clean["lse"][..., :40], dirty["lse"][..., :40])
    for name in ("dk", "dv"):
        assert not dirty[name][:, 16:32].any()
        assert not dirty[name][:, 48:].any()


def test_a_seen_nan_reaches_its_pairs_alone() -> None:
    """Of a key: the rows that list it and see it. Of a row: the keys that it sees."""
    inputs = FlashCase(batch=1, seqlen_q=32, seqlen_k=32, causal=True, heads_q=2, heads_k=1).make()
    ids = torch.tensor([[0, -1], [0, 1]]).repeat(1, 1, 2, 1)  # every other block row
    lists = BlockSelection.from_indices(ids, q_block=8, kv_block=16)
    v, q = inputs.v.clone(), inputs.q.clone()
    v[0, 20, 0, 1] = math.nan
    out = run(inputs.with_(v=v), lists)["out"]
    assert bool(out[0, 24:, :, 1].isnan().all())
    assert bool(out[0, :24].isfinite().all())
    q[0, 12, 1, 3] = math.nan
    got = run(inputs.with_(q=q), lists)
    assert bool(got["dk"][0, :13].isnan().all())
    assert bool(got["dk"][0, 13:].isfinite().all())


@pytest.mark.parametrize("heads", [2, 4], ids=["kv heads", "query heads"])
def test_packed_equals_one_by_one(heads: int) -> None:
    lengths, q_block, kv_block = ((20, 35), (0, 7), (1, 1), (17, 17)), 8, 16
    inputs = FlashCase(lengths=lengths, heads_q=4, heads_k=2, causal=True, dtype=BF16).make()
    g = torch.Generator().manual_seed(0)
    rows = sum(-(-n // q_block) for n, _ in lengths)
    ids = torch.randint(-1, 4, (heads, rows, 3), generator=g, dtype=torch.int32)
    whole = run(inputs, BlockSelection.from_indices(ids, q_block=q_block, kv_block=kv_block))
    row = r0 = k0 = 0
    assert inputs.dlse is not None
    for n, m in lengths:
        own = -(-n // q_block)
        lists = BlockSelection.from_indices(
            ids[None, :, row : row + own], q_block=q_block, kv_block=kv_block
        )
        part = inputs.with_(
            q=inputs.q[None, r0 : r0 + n], k=inputs.k[None, k0 : k0 + m],
            v=inputs.v[None, k0 : k0 + m], dout=inputs.dout[None, r0 : r0 + n],
            dlse=inputs.dlse[None, :, r0 : r0 + n],
        )  # fmt: skip
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            del part.options[name]
        got = run(part, lists)
        for name in ("out", "dq"):
            assert same_bits(whole[name][r0 : r0 + n], got[name][0])
        for name in ("dk", "dv"):
            assert same_bits(whole[name][k0 : k0 + m], got[name][0])
        assert same_bits(whole["lse"][:, r0 : r0 + n], got["lse"][0])
        row, r0, k0 = row + own, r0 + n, k0 + m


def test_boundaries_beyond_the_tensors_are_clamped() -> None:
    """As on a GPU, where nobody has looked at them: no access outside, other rows as they were."""
    inputs = FlashCase(lengths=((20, 35), (17, 17)), heads_q=2, heads_k=1, causal=True).make()
    ids = torch.zeros((1, 6, 2), dtype=torch.int32)

    def forward(last: int) -> Tensor:
        ends_q, ends_k = (torch.tensor([0, n, last], dtype=torch.int32) for n in (20, 35))
        p = FlashParams(ends_q, ends_k, None, None, None, 20, 35, 0.2, -1, 0, 0.0)
        out, lse = torch.empty_like(inputs.q), torch.empty(2, 37)
        block_sparse.fwd(inputs.q, inputs.k, inputs.v, p, BlockLists(ids, None, 8, 16), out, lse,
                         inputs.q.new_empty(0))  # fmt: skip
        return out

    assert same_bits(forward(1 << 20)[:20], forward(37)[:20])
    assert not forward(-5)[20:].any()


def test_keys_in_use() -> None:
    inputs = FlashCase(seqlen_q=10, seqlen_k=50, causal=True, used=(50, 23), dtype=BF16).make()
    lists = random_lists(FlashCase(seqlen_q=10, seqlen_k=50), 2, 4, 16, 0.7)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[1, 23:], v[1, 23:] = math.nan, math.nan
    got = run(inputs.with_(k=k, v=v), lists)
    short = FlashCase(batch=1, seqlen_q=10, seqlen_k=23, causal=True).make()
    assert inputs.dlse is not None
    short = short.with_(q=inputs.q[1:], k=inputs.k[1:, :23], v=inputs.v[1:, :23],
                        dout=inputs.dout[1:], dlse=inputs.dlse[1:])  # fmt: skip
    own = BlockSelection.from_indices(lists.indices[1:], q_block=4, kv_block=16)
    want = run(short, own)
    assert same_bits(got["out"][1:], want["out"])
    assert same_bits(got["dk"][1:, :23], want["dk"])
    assert not got["dk"][1, 23:].any()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}], ids=str)
def test_nothing_to_attend_to(sizes: dict[str, Any]) -> None:
    case = dataclasses.replace(FlashCase(batch=2, seqlen_q=5, seqlen_k=7, causal=True), **sizes)
    rows = -(-case.seqlen_q // 4)
    lists = BlockSelection(torch.zeros((1, 1, rows, 2), dtype=torch.int32), 4, 4)
    got = run(case.make(), lists)
    for name in ("out", "dq", "dk", "dv"):
        assert not got[name].any()


@settings(max_examples=8)
@given(st.data())
def test_any_call(data: st.DataObject) -> None:
    def pick(*choices: Any) -> Any:
        return data.draw(st.sampled_from(choices))

    heads_k = pick(1, 2)
    group = pick(1, 3, 4)
    case = FlashCase(
        batch=pick(1, 2), seqlen_q=pick(1, 5, 17, 40), seqlen_k=pick(1, 16, 33, 70),
        heads_k=heads_k, heads_q=heads_k * group, head_dim=pick(8, 40, 72),
        v_head_dim=pick(16, 64), causal=pick(False, True), window=pick((-1, -1), (9, 0), (20, 5)),
        softcap=pick(0.0, 4.0), dtype=pick(*DTYPES), seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    bounded(case, pick(1, heads_k, heads_k * group), pick(1, 3, 16, 60), pick(1, 7, 16, 64),
            pick(0.2, 0.7))  # fmt: skip


def decode_case(paged: bool, dtype: torch.dtype) -> tuple[dict[str, Any], BlockSelection]:
    g = torch.Generator().manual_seed(1)
    heads, heads_kv, keys = 6, 2, 90
    call: dict[str, Any] = {
        "q": torch.randn(2, 2, heads, 64, generator=g).to(dtype),
        "k": torch.randn(2, 96, heads_kv, 64, generator=g).to(dtype),
        "v": torch.randn(2, 96, heads_kv, 64, generator=g).to(dtype),
        "cache_seqlens": torch.tensor([keys, 41], dtype=torch.int32),
    }
    if paged:
        order = torch.randperm(24, generator=g)
        table = torch.empty_like(order)
        table[order] = torch.arange(24)
        for name in ("k", "v"):
            call[name] = call[name].reshape(24, 8, heads_kv, 64)[order].contiguous()
        call["block_table"] = table.view(2, 12).int()
    ids = torch.randint(-2, 8, (2, heads_kv, 2, 5), generator=g, dtype=torch.int32)
    return call, BlockSelection(ids, 1, 16)


@pytest.mark.parametrize("paged", [False, True], ids=["cache", "pages"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_decode(paged: bool, dtype: torch.dtype) -> None:
    """Lists are page tables: ``cuda.paged.fwd`` reads the listed blocks."""
    call, selection = decode_case(paged, dtype)
    decode = functools.partial(attnforge.block_sparse_decode, selection=selection, return_lse=True)
    got = decode(**call, num_splits=2, backend="emulated")
    exact = {n: x.double() if x.is_floating_point() else x for n, x in call.items()}
    want = decode(**exact, backend="reference")
    bound = 1e-5 if dtype is FP32 else 2.0**-6 if dtype is BF16 else 2.0**-9
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, atol=bound, rtol=bound)
