"""Attention to listed keys against the float64 truth of each list, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge.testing.cases import Target
from attnforge.testing.compare import compare, same_bits
from attnforge.testing.retrieval import IndexedCase


def check(case: IndexedCase, target: Target) -> None:
    inputs = case.make()
    truth = inputs.truth(gradients=case.page_size == 0, rounded=target.rounded)
    run = inputs.forward if case.page_size else inputs.run
    compare(run(target.backend), truth, str(case)).check()


@pytest.mark.parametrize("lists", ["one", "kv", "query"])
@pytest.mark.parametrize("order", ["rising", "any"])
@pytest.mark.parametrize("rows", [1, 3])
def test_values(target: Target, lists: str, order: str, rows: int) -> None:
    case = IndexedCase(lists=lists, order=order, rows=rows, head_dim=40, v_head_dim=24)
    check(case, target)
    check(replace(case, bias=False, seed=1), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_16_bits(level: Target, dtype: torch.dtype, head_dim: int) -> None:
    check(IndexedCase(keys=200, entries=150, head_dim=head_dim, dtype=dtype), level)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_groups(target: Target, group: int) -> None:
    check(IndexedCase(heads_q=2 * group, head_dim=16), target)
    check(IndexedCase(heads_q=2 * group, head_dim=16, lists="kv", rows=5), target)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages(target: Target, page_size: int, layout: str) -> None:
    check(IndexedCase(page_size=page_size, layout=layout, used=(70, 41)), target)


def test_keys_in_use(target: Target) -> None:
    check(IndexedCase(used=(13, 0), lists="kv"), target)


def test_lengths_around_the_split(level: Target) -> None:
    for entries in (1023, 1024, 1025, 3000):
        check(IndexedCase(batch=1, keys=3100, entries=entries, head_dim=16, bias=False), level)


def test_many_rows_do_not_split(level: Target) -> None:
    check(IndexedCase(rows=21, keys=400, entries=300, lists="kv", head_dim=16), level)
    check(IndexedCase(rows=21, keys=400, entries=300, lists="query", head_dim=16), level)


# Fixtures hold for all examples of a test, which is meant: the ISA level does not change.
@settings(max_examples=25, suppress_health_check=list(settings().suppress_health_check))
@given(data=st.data())
def _any_shape(level: Target, data: st.DataObject) -> None:
    heads_k = data.draw(st.integers(1, 3), "heads_k")
    check(
        IndexedCase(
            batch=data.draw(st.integers(1, 2), "batch"),
            rows=data.draw(st.integers(1, 6), "rows"),
            keys=data.draw(st.integers(1, 130), "keys"),
            entries=data.draw(st.integers(0, 140), "entries"),
            heads_q=heads_k * data.draw(st.integers(1, 4), "group"),
            heads_k=heads_k,
            head_dim=data.draw(st.sampled_from([8, 24, 64]), "head_dim"),
            lists=data.draw(st.sampled_from(["one", "kv", "query"]), "lists"),
            order=data.draw(st.sampled_from(["rising", "any"]), "order"),
            bias=data.draw(st.booleans(), "bias"),
        ),
        level,
    )


def test_any_shape(level: Target) -> None:
    _any_shape(level)


def test_every_key_is_dense_attention(target: Target) -> None:
    inputs = IndexedCase(rows=3).make()
    k, v = inputs.k.nan_to_num(0.3), inputs.v.nan_to_num(0.3)
    ids = torch.arange(70, dtype=torch.int32).expand(2, 4, 70).contiguous()
    out, lse = attnforge.indexed_attention(
        inputs.q, k, v, ids=ids, return_lse=True, backend=target.backend
    )
    dense, stat = attnforge.flash_attention(inputs.q, k, v, return_lse=True, backend="reference")
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, stat, rtol=1e-6, atol=1e-6)


def test_nothing_listed(target: Target) -> None:
    inputs = IndexedCase(bias=False).make().with_(ids=torch.full((2, 4, 30), -1).int())
    got = inputs.run(target.backend)
    assert (got.pop("lse") == -math.inf).all()
    for name, x in got.items():
        assert not x.any(), name


def test_a_bias_is_a_multiplicity(target: Target) -> None:
    inputs = IndexedCase(bias=False).make()
    k, v = inputs.k.nan_to_num(0.1), inputs.v.nan_to_num(0.1)
    ids = torch.tensor([5, 9, 9, 9, 20], dtype=torch.int32).expand(2, 4, 5).contiguous()
    bias = torch.tensor([0.0, math.log(3), 0.0]).expand(2, 4, 3).contiguous()
    both = [
        attnforge.indexed_attention(
            inputs.q, k, v, ids=i, log_bias=b, return_lse=True, backend=target.backend
        )
        for i, b in ((ids, None), (ids[..., [0, 1, 4]].contiguous(), bias))
    ]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_keys_of_other_heads_do_not_leak(target: Target, value: float) -> None:
    """Heads of a group are gathered together: what one lists must not reach another."""
    inputs = IndexedCase(batch=1, bias=False).make()
    k, v = inputs.k.nan_to_num(0.1), inputs.v.nan_to_num(0.1)
    ids = torch.stack([torch.arange(h, 68, 4) for h in range(4)]).int().unsqueeze(0)
    call = {"ids": ids.contiguous(), "return_lse": True, "backend": target.backend}
    clean = attnforge.indexed_attention(inputs.q, k, v, **call)
    k[:, 1::4, 0], v[:, 1::4, 0] = value, value  # keys of head 1, of the first KV head
    dirty = attnforge.indexed_attention(inputs.q, k, v, **call)
    for a, b in zip(clean, dirty, strict=True):
        a, b = (x if x.dim() == 3 else x.transpose(1, 2)[..., 0, :] for x in (a, b))
        for head in (0, 2, 3):
            torch.testing.assert_close(a[:, head], b[:, head], rtol=1e-6, atol=1e-6)
    assert not dirty[0][0, 0, 1].isfinite().all()


def test_parts_merge(target: Target) -> None:
    inputs = IndexedCase(rows=2, bias=False).make()
    k, v = inputs.k.nan_to_num(0.2), inputs.v.nan_to_num(0.2)
    ids = torch.arange(60, dtype=torch.int32).expand(2, 2, 60)
    parts = [
        attnforge.indexed_attention(
            inputs.q, k, v, ids=own.contiguous(), return_lse=True, backend=target.backend
        )
        for own in (ids, ids[..., :25], ids[..., 25:], ids[..., :0])
    ]
    out, lse = attnforge.merge_states(*map(list, zip(*parts[1:], strict=True)))
    torch.testing.assert_close(out, parts[0][0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, parts[0][1], rtol=1e-6, atol=1e-6)


def test_large_logits_stay_finite(target: Target) -> None:
    inputs = IndexedCase(bias=False).make().with_(softmax_scale=300.0)
    got = inputs.run(target.backend)
    compare(got, inputs.truth()).check()
    assert all(x.isfinite().all() for n, x in got.items() if n in ("out", "dq"))


@pytest.mark.parametrize("lists", ["kv", "query"])
def test_threads_and_neighbours_do_not_matter(lists: str) -> None:
    case = IndexedCase(batch=3, keys=2500, entries=2200, lists=lists, head_dim=16)
    inputs = case.make()
    before = torch.get_num_threads()
    want = inputs.run("cpu")
    one = {n: inputs.options[n][1:2].contiguous() for n in ("ids", "lens", "log_bias")}
    single = replace(inputs.with_(
        q=inputs.q[1:2], k=inputs.k[1:2], v=inputs.v[1:2], dout=inputs.dout[1:2],
        dlse=inputs.dlse[1:2], **one,
    ), case=replace(case, batch=1))  # fmt: skip
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for name, x in single.run("cpu").items():
                assert same_bits(x, want[name][1:2]), name
    finally:
        torch.set_num_threads(before)


def test_errors() -> None:
    inputs = IndexedCase().make()
    q, k, v = inputs.q, inputs.k, inputs.v
    good = inputs.options
    for change, kind, text in (
        ({"ids": good["ids"].long()}, TypeError, "ids has dtype int64; want int32"),
        ({"ids": good["ids"][:, :3]}, ValueError, r"ids has shape \(2, 3, 30\)"),
        ({"lens": good["lens"][:, :1]}, ValueError, r"lens is \(2, 1\)"),
        ({"log_bias": good["log_bias"][..., :2]}, ValueError, r"log_bias has shape \(2, 4, 2\)"),
        ({"log_bias": good["ids"]}, ValueError, "log_bias has dtype int32"),
        ({"kv_layout": "HND"}, ValueError, "kv_layout is 'HND' without block_table"),
        ({"cache_seqlens": torch.tensor([71, 2]).int()}, ValueError, r"cache_seqlens\[0\] is 71"),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale is inf"),
    ):
        with pytest.raises(kind, match=f"attnforge.indexed_attention: {text}"):
            attnforge.indexed_attention(q, k, v, **{**good, **change})
    paged = IndexedCase(page_size=16).make()
    k, v, options = paged.paged()
    with pytest.raises(ValueError, match="k requires grad"):
        attnforge.indexed_attention(q, k.clone().requires_grad_(), v, **options)
    options["block_table"] = options["block_table"] + 1
    with pytest.raises(ValueError, match=r"block_table\["):
        attnforge.indexed_attention(q, k, v, **options)
