"""Triton block-sparse attention: values within the bounds of float64, and what must not matter."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge.testing.block_sparse import check, random_lists
from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import assert_same, same_bits

# q_block, kv_block, list heads; of 4 query heads on 2 KV heads
SHAPES = {
    "token": (1, 16, 2),
    "token-query-heads": (1, 40, 4),
    "neighbours": (1, 32, 4),  # of MoBA: rows of lists share a tile
    "neighbours-of-groups": (3, 32, 2),
    "rows16": (16, 32, 1),
    "square": (32, 32, 4),
    "wide": (20, 90, 2),
    "keys": (8, 1, 2),
}


def run(inputs: FlashInputs, selection: BlockSelection) -> dict[str, Tensor]:
    call = functools.partial(attnforge.block_sparse_attention, selection=selection)
    return dataclasses.replace(inputs, call=call).run("triton")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values(shape: str, causal: bool) -> None:
    q_block, kv_block, heads = SHAPES[shape]
    rows, keys = (26, 85) if min(q_block, kv_block) > 1 else (5, 38)
    case = FlashCase(batch=1, seqlen_q=rows, seqlen_k=keys, heads_q=4, heads_k=2, head_dim=24,
                     v_head_dim=40, causal=causal)  # fmt: skip
    check(case, random_lists(case, heads, q_block, kv_block, 0.5), "triton", rounded=True)


@pytest.mark.parametrize(
    "case",
    [
        FlashCase(batch=1, softcap=5.0, causal=True, dtype=torch.bfloat16),
        FlashCase(batch=2, alibi="batch", sinks="mixed", causal=True, dtype=torch.float16),
        FlashCase(batch=1, window=(20, 3), dtype=torch.bfloat16),
        FlashCase(batch=1, sinks="normal", layout="heads_first"),
    ],
    ids=["softcap", "alibi", "window", "layout"],
)
def test_options(case: FlashCase) -> None:
    case = dataclasses.replace(case, seqlen_q=34, seqlen_k=50, heads_q=2, heads_k=1, head_dim=16)
    for q_block, kv_block in ((8, 8), (32, 16)):
        check(case, random_lists(case, 1, q_block, kv_block, 0.6), "triton", rounded=True)


@pytest.mark.parametrize("group", [1, 3])
def test_groups(group: int) -> None:
    case = FlashCase(batch=1, seqlen_q=9, seqlen_k=40, heads_q=2 * group, heads_k=2, head_dim=8,
                     causal=True)  # fmt: skip
    check(case, random_lists(case, 2, 4, 16, 0.6), "triton", rounded=True)


def test_no_block(device: str) -> None:
    none = torch.full((1, 1, 9, 3), -1, device=device)
    lists = BlockSelection.from_indices(none, q_block=1, kv_block=8)
    got = run(FlashCase(seqlen_q=9, seqlen_k=30).make(), lists)
    assert (got["lse"] == -math.inf).all()
    assert not any(got[name].any() for name in ("out", "dq", "dk", "dv"))


def test_order_repetition_and_slots_past_the_count_do_not_matter(device: str) -> None:
    case = FlashCase(batch=1, seqlen_q=20, seqlen_k=64, causal=True)
    inputs = case.make()
    ids = torch.randint(-1, 4, (1, 2, 5, 4), dtype=torch.int32, device=device)
    counts = torch.randint(0, 5, (1, 2, 5), dtype=torch.int32, device=device)
    clean = torch.where(torch.arange(4, device=device) < counts.unsqueeze(-1), ids, -1)

    def lists(ids: Tensor, **more: Any) -> BlockSelection:
        return BlockSelection.from_indices(ids, q_block=4, kv_block=16, **more)

    want = run(inputs, lists(clean))
    assert_same(run(inputs, lists(ids, counts=counts)), want)
    assert_same(run(inputs, lists(torch.cat([clean.flip(-1), clean], -1))), want)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_values_do_not_leak(value: float, device: str) -> None:
    """Keys of no list, and keys behind a row's position in a block that it does list."""
    inputs = FlashCase(batch=1, seqlen_q=64, seqlen_k=64, causal=True, heads_q=2, heads_k=1).make()
    ids = torch.tensor([[0, 2]], device=device).expand(1, 1, 8, 2)
    lists = BlockSelection.from_indices(ids, q_block=8, kv_block=16)
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


@pytest.mark.parametrize(("q_block", "n"), [(8, 1), (1, 2)], ids=["own tiles", "shared tiles"])
def test_a_seen_nan_reaches_its_pairs_alone(q_block: int, n: int, device: str) -> None:
    """Of a key: the rows that list it and see it. Of a row: the keys that it sees."""
    case = FlashCase(batch=1, seqlen_q=32 * n, seqlen_k=32 * n, causal=True, heads_q=2, heads_k=1)
    inputs = case.make()
    ids = torch.tensor([[0, -1], [0, 1]], device=device)  # every other 8 n rows
    ids = ids.repeat_interleave(8 * n // q_block, 0).repeat(1, 1, 2, 1)
    lists = BlockSelection.from_indices(ids, q_block=q_block, kv_block=16 * n)
    v, q = inputs.v.clone(), inputs.q.clone()
    v[0, 20 * n, 0, 1] = math.nan
    got = run(inputs.with_(v=v), lists)["out"]
    assert bool(got[0, 24 * n :, :, 1].isnan().all())
    assert bool(got[0, : 24 * n].isfinite().all())
    q[0, 12 * n, 1, 3] = math.nan
    got = run(inputs.with_(q=q), lists)
    assert bool(got["dk"][0, : 12 * n + 1].isnan().all())
    assert bool(got["dk"][0, 12 * n + 1 :].isfinite().all())


@pytest.mark.parametrize(
    ("q_block", "kv_block", "heads"), [(8, 16, 2), (1, 32, 4)], ids=["own tiles", "shared tiles"]
)
def test_packed_equals_one_by_one(q_block: int, kv_block: int, heads: int, device: str) -> None:
    lengths = ((20, 35), (0, 7), (1, 1), (17, 17))
    inputs = FlashCase(lengths=lengths, heads_q=4, heads_k=2, causal=True).make()
    g = torch.Generator().manual_seed(0)
    rows = sum(-(-n // q_block) for n, _ in lengths)
    ids = torch.randint(-1, 4, (heads, rows, 3), generator=g, dtype=torch.int32).to(device)
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


def test_keys_in_use() -> None:
    inputs = FlashCase(seqlen_q=10, seqlen_k=50, causal=True, used=(50, 23)).make()
    case = FlashCase(seqlen_q=10, seqlen_k=50)
    lists = random_lists(case, 2, 4, 16, 0.7)
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


def test_broadcast_batch_and_neighbours(device: str) -> None:
    """Lists for all batch entries; a sequence alone and among others has the same bits."""
    inputs = FlashCase(batch=2, seqlen_q=20, seqlen_k=40, heads_q=2, heads_k=2, causal=True).make()
    ids = torch.randint(-1, 5, (1, 1, 3, 3), dtype=torch.int32, device=device)
    lists = BlockSelection.from_indices(ids, q_block=8, kv_block=8)
    both = run(inputs, lists)
    assert inputs.dlse is not None
    one = inputs.with_(q=inputs.q[1:], k=inputs.k[1:], v=inputs.v[1:], dout=inputs.dout[1:],
                       dlse=inputs.dlse[1:])  # fmt: skip
    for name, got in run(one, lists).items():
        assert same_bits(got, both[name][1:])
