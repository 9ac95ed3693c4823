"""flash-attn's names: masks, packing, caches and paddings against a plain float64 attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from attnforge.compat.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

NAN = float("nan")


def drawn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v in float64 of one sequence; seen [Sq, Sk]; rows of nothing are 0."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
    return (weights @ v).transpose(0, 1)


def band(sq: int, sk: int, causal: bool, left: int = -1) -> Tensor:
    at = torch.arange(sq).unsqueeze(1) + sk - sq
    key = torch.arange(sk)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        seen &= key <= at
    if left >= 0:
        seen &= key >= at - left
    return seen


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=2e-6)


def test_positional_order() -> None:
    q, k, v = drawn(2, 5, 4, 16), drawn(2, 9, 2, 16, seed=1), drawn(2, 9, 2, 16, seed=2)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])
    out, lse, nothing = flash_attn_func(q, k, v, 0.0, 0.3, True, (3, 0), 5.0, slopes, True, True)
    want, want_lse = attnforge.flash_attention(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(3, 0), softcap=5.0,
        alibi_slopes=slopes, return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert nothing is None
    close(flash_attn_func(q, k, v, causal=True)[1], plain(q[1], k[1], v[1], band(5, 9, True)))


def test_packed_tensors_and_their_gradients() -> None:
    qkv = drawn(2, 7, 3, 4, 16, grad=True)
    flash_attn_qkvpacked_func(qkv, causal=True).square().sum().backward()
    packed = qkv.grad
    separate = qkv.detach().clone().requires_grad_()
    flash_attn_func(*separate.unbind(2), causal=True).square().sum().backward()
    assert packed is not None
    assert separate.grad is not None
    assert torch.equal(packed, separate.grad)
    q, kv = drawn(2, 7, 4, 16), drawn(2, 9, 2, 2, 16, seed=3)
    assert torch.equal(
        flash_attn_kvpacked_func(q, kv, 0.0, None, True),
        flash_attn_func(q, *kv.unbind(2), causal=True),
    )


def test_packed_sequences() -> None:
    lengths = [3, 0, 6]
    cu = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    qkv = drawn(9, 3, 4, 16)
    out = flash_attn_varlen_qkvpacked_func(qkv, cu, 6, causal=True)
    at = 0
    for n in lengths:
        rows = slice(at, at + n)
        close(out[rows], plain(*qkv[rows].unbind(1), band(n, n, True)))
        at += n
    q, k, v = qkv.unbind(1)
    same = flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, causal=True)
    halves = flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 6, 6, causal=True)
    assert torch.equal(out, same)
    assert torch.equal(out, halves)


def test_packed_sequences_over_pages() -> None:
    cu_q = torch.tensor([0, 2, 3], dtype=torch.int32)
    cu_k = torch.tensor([0, 5, 12], dtype=torch.int32)
    q = drawn(3, 4, 16)
    pages = torch.full((4, 2, 4, 2, 16), NAN)  # [page, k or v, slot, head, channel]
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    kv = drawn(2, 12, 2, 16, seed=4)
    for b, (first, end) in enumerate([(0, 5), (5, 12)]):
        for j in range(end - first):
            pages[table[b, j // 4], :, j % 4] = kv[:, first + j]
    out = flash_attn_varlen_func(
        q, pages[:, 0], pages[:, 1], cu_q, cu_k, 2, 7, causal=True, block_table=table
    )
    close(out[:2], plain(q[:2], kv[0, :5], kv[1, :5], band(2, 5, True)))
    close(out[2:], plain(q[2:], kv[0, 5:], kv[1, 5:], band(1, 7, True)))
    with pytest.raises(ValueError, match="dropout_p"):
        flash_attn_varlen_func(
            q, pages[:, 0], pages[:, 1], cu_q, cu_k, 2, 7, 0.1, block_table=table
        )


def test_dropout_follows_the_seed() -> None:
    q = drawn(1, 32, 2, 16)
    torch.manual_seed(5)
    first = flash_attn_func(q, q, q, 0.5)
    torch.manual_seed(5)
    again = flash_attn_func(q, q, q, 0.5)
    other = flash_attn_func(q, q, q, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def turned(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> Tensor:
    """x [S, H, D] in float64, its first channels rotated at positions at [S]."""
    half = cos.shape[1]
    x = x.double().clone()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    c, s = (t.double()[at].unsqueeze(1) for t in (cos, sin))
    a, b = x[..., first].clone(), x[..., second].clone()
    x[..., first], x[..., second] = a * c - b * s, b * c + a * s
    return x


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["rows", "batch_idx", "pages"])
def test_cache_grows_and_is_read(form: str, causal: bool, interleaved: bool) -> None:
    """New keys are rotated and written behind the old ones; slots past them stay as they are."""
    q, k, v = (drawn(2, 3, h, 16, seed=s) for h, s in ((4, 0), (2, 1), (2, 2)))
    lengths = torch.tensor([4, 7], dtype=torch.int32)
    cos, sin = drawn(12, 4, seed=5), drawn(12, 4, seed=6)
    cache = torch.full((2, 4, 12, 2, 16), NAN)
    extra: dict[str, Any] = {}
    rows = [0, 1]
    if form == "batch_idx":
        rows = [3, 1]
        extra["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    if form == "pages":
        cache = torch.full((2, 8, 4, 2, 16), NAN)
        table = torch.tensor([[5, 0, 2], [1, 7, 4]], dtype=torch.int32)
        extra["block_table"] = table
    old = drawn(2, 2, 7, 2, 16, seed=7)  # [k or v, sequence, key, ..]

    def slots(b: int, j: int) -> Tensor:
        if form == "pages":
            return cache[:, table[b, j // 4], j % 4]
        return cache[:, rows[b], j]

    for b in range(2):
        for j in range(int(lengths[b])):
            slots(b, j).copy_(old[:, b, j])
    before = cache.clone()
    k_cache, v_cache = cache[:, :2] if form == "rows" else cache
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache,
        k, v, cos, sin, lengths, causal=causal, rotary_interleaved=interleaved,
        return_softmax_lse=True, **extra,
    )  # fmt: skip
    assert lse.shape == (2, 4, 3)
    for b in range(2):
        n = int(lengths[b])
        at = torch.arange(n, n + 3)
        new = turned(k[b], cos, sin, at, interleaved)
        mine = turned(q[b], cos, sin, at if causal else at[:1].expand(3), interleaved)
        keys = torch.cat((old[0, b, :n].double(), new))
        values = torch.cat((old[1, b, :n], v[b]))
        close(out[b], plain(mine, keys, values, band(3, n + 3, causal)))
        for j in range(3):
            close(slots(b, n + j), torch.stack((new[j], v[b, j].double())))
            slots(b, n + j).fill_(NAN)  # all else has to be as before
    assert torch.equal(cache.nan_to_num(9e9), before.nan_to_num(9e9))


def test_new_keys_without_rotation() -> None:
    q, k, v = (drawn(1, 2, h, 16, seed=s) for h, s in ((4, 0), (2, 1), (2, 2)))
    cache = torch.full((2, 1, 8, 2, 16), NAN)
    out = flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=0, causal=True)
    close(out[0], plain(q[0], k[0], v[0], band(2, 2, True)))
    assert torch.equal(cache[:, :, :2], torch.stack((k, v)))


def test_cache_padding_on_the_left_is_not_seen() -> None:
    q, cache = drawn(2, 1, 4, 16), drawn(2, 3, 9, 2, 16, seed=1)
    pad = torch.tensor([2, 0], dtype=torch.int32)
    index = torch.tensor([2, 0], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, *cache, cache_seqlens=8, cache_leftpad=pad, cache_batch_idx=index, causal=True
    )
    for b in range(2):
        first = int(pad[b])
        keys = slice(first, 8)
        close(out[b], plain(q[b], *cache[:, index[b], keys], band(1, 8 - first, True)))


def test_whole_cache_by_default() -> None:
    q, cache = drawn(2, 2, 4, 16), drawn(2, 2, 9, 2, 16, seed=1)
    out = flash_attn_with_kvcache(q, *cache, window_size=(3, 0), causal=True)
    close(out[0], plain(q[0], *cache[:, 0], band(2, 9, True, 3)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"v": None}, "k and v"),
        ({"cache_seqlens": None}, "cache_seqlens"),
        ({"rotary_sin": None}, "rotary_cos and rotary_sin"),
        ({"k": None, "v": None}, "rotary_cos"),
        (
            {
                "block_table": torch.zeros(1, 1, dtype=torch.int32),
                "cache_leftpad": torch.zeros(1, dtype=torch.int32),
            },
            "cache_leftpad",
        ),
        (
            {
                "block_table": torch.zeros(1, 1, dtype=torch.int32),
                "cache_batch_idx": torch.zeros(1, dtype=torch.int32),
            },
            "cache_batch_idx",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], name: str) -> None:
    x = drawn(1, 2, 2, 16)
    call: dict[str, Any] = {
        "k": x, "v": x, "rotary_cos": drawn(8, 4), "rotary_sin": drawn(8, 4),
        "cache_seqlens": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=name):
        flash_attn_with_kvcache(x, drawn(1, 8, 2, 16), drawn(1, 8, 2, 16), **call | changes)


def test_wrong_packing_is_named() -> None:
    with pytest.raises(ValueError, match=r"qkv has shape"):
        flash_attn_qkvpacked_func(drawn(1, 4, 2, 2, 16))


def test_padding_goes_and_comes_back() -> None:
    x = drawn(3, 5, 2, 4, grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    packed, indices, cu, longest, used = unpad_input(x, mask)
    assert cu.tolist() == [0, 2, 2, 6]
    assert longest == 4
    assert used.tolist() == [2, 0, 4]
    assert torch.equal(packed, x[mask.bool()])
    assert torch.equal(index_first_axis(x.flatten(0, 1), indices), packed)
    back = pad_input(packed, indices, 3, 5)
    assert torch.equal(back, x * mask[..., None, None])
    back.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, mask[..., None, None].expand_as(x).to(x.dtype))
    unused = torch.zeros_like(mask)
    unused[1, 0] = 1
    assert unpad_input(x, mask, unused)[2].tolist() == [0, 2, 3, 7]
    assert unpad_input(x, mask, unused)[4].tolist() == [2, 0, 4]


@pytest.mark.parametrize("new", [0, 1])
def test_a_full_table_is_a_runtime_error(new: int) -> None:
    q, cache, table = drawn(1, 1, 1, 8), drawn(2, 4, 1, 8), torch.zeros(1, 1, dtype=torch.int32)
    keys = drawn(1, 1, 1, 8) if new else None
    lengths = torch.tensor([5 - new], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="block_table with room for 4"):
        flash_attn_with_kvcache(
            q, cache, cache.clone(), keys, keys, cache_seqlens=lengths, block_table=table
        )


def test_leftpad_moves_no_rotated_position() -> None:
    """Rotation is relative: keys behind padding are those of an empty cache."""
    q, k, v = (drawn(1, 4, 2, 16, seed=n) for n in range(3))
    angle = drawn(1, 8, seed=3) * torch.arange(9.0).unsqueeze(1)
    outs = []
    for padding in (0, 3):
        cache = torch.full((2, 1, 9, 2, 16), NAN)
        cache[:, :, :padding] = 5.0
        pad = torch.tensor([padding], dtype=torch.int32)
        outs.append(
            flash_attn_with_kvcache(
                q, *cache, k, v, angle.cos(), angle.sin(), cache_seqlens=pad, cache_leftpad=pad,
                causal=True,
            )
        )  # fmt: skip
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_pages_have_no_backward() -> None:
    pages, cu = drawn(1, 4, 1, 16), torch.tensor([0, 3], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    q = drawn(3, 1, 16, seed=1, grad=True)
    out = flash_attn_varlen_func(q, pages, pages, cu, cu, 3, 3, causal=True, block_table=table)
    close(out, plain(q, *(pages[0, :3],) * 2, band(3, 3, True)))
    with pytest.raises(RuntimeError, match="block_table"):
        out.sum().backward()
