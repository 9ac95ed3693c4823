"""Compressed attention, block importance and NSA's choice against float64, and golden cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnforge
from attnforge.ops import _nsa_ops, compressed, nsa
from attnforge.testing.cases import Target
from attnforge.testing.compare import same_bits

SIZES = ((32, 16, 64), (64, 16, 64), (16, 16, 64), (64, 64, 64), (32, 32, 128), (8, 4, 16))


def names(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("cmp_block", "cmp_stride", "slc_block"), sizes, strict=True))


def truth(
    q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int, int], tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and importance in float64, by tokens and whole matrices."""
    size, d, block = sizes
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
    t = torch.arange(q.shape[2]) + tokens - q.shape[2]
    i = torch.arange(k.shape[2])
    seen = i * d + size - 1 <= t[:, None]
    s = (q @ wide_k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)
    prob = torch.exp(s - lse.unsqueeze(-1)).nan_to_num(nan=0.0)
    blocks = -(-tokens // block)
    # Strides of each window, by brute force over tokens.
    share = torch.zeros(k.shape[2], blocks, dtype=torch.float64)
    for window in range(k.shape[2]):
        for token in range(window * d, window * d + size):
            if token // block < blocks:
                share[window, token // block] += 1 / d
    weights = prob @ share
    return (prob @ wide_v).transpose(1, 2), lse, weights.unflatten(1, (-1, group)).sum(2)


def make(
    tokens: int,
    rows: int,
    sizes: tuple[int, int, int],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    windows = max(0, (tokens - sizes[0]) // sizes[1] + 1)
    shape = [(2, rows, heads[0], dim), (2, windows, heads[1], dim), (2, windows, heads[1], 16)]
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shape)
    return q, k, v


def check_lists(ids: Tensor, weights: Tensor, at: Tensor, block: int, n: int, tol: float) -> None:
    """Forced blocks are there, the number is right, and no left-out block is clearly better."""
    blocks = weights.shape[-1]
    for b, h, r in torch.cartesian_prod(*(torch.arange(x) for x in ids.shape[:3])).tolist():
        t = int(at[r])
        own = [x for x in ids[b, h, r].tolist() if x >= 0]
        valid = min(blocks, t // block + 1) if t >= 0 else 0
        assert own == sorted(set(own))
        assert len(own) == min(n, valid)
        assert all(0 <= x < valid for x in own)
        forced = {x for x in (0, valid - 1, valid - 2) if 0 <= x < valid}
        assert forced <= set(own)
        rest = [float(weights[b, h, r, x]) for x in own if x not in forced]
        out = [float(weights[b, h, r, x]) for x in range(valid) if x not in own]
        if rest and out:
            assert min(rest) >= max(out) - tol


def check(target: Target, tokens: int, rows: int, sizes: tuple[int, int, int],
          heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32,
          top_n: int = 4) -> None:  # fmt: skip
    q, k, v = make(tokens, rows, sizes, heads, dim, dtype)
    want = truth(q, k, v, sizes, tokens)
    out, lse, weights = attnforge.compressed_attention(
        q, k, v, **names(sizes), seqlen_k=tokens, return_lse=True, return_importance=True,
        backend=target.backend,
    )  # fmt: skip
    low = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), want[0], rtol=low, atol=low)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)
    assert weights.shape == want[2].shape
    torch.testing.assert_close(weights.double(), want[2], rtol=3e-5, atol=1e-6)
    lists = attnforge.nsa_select(
        q, k, lse, **names(sizes), top_n=top_n, seqlen_k=tokens, backend=target.backend
    )
    assert lists.indices.shape == (2, heads[1], rows, top_n)
    at = torch.arange(rows) + tokens - rows
    check_lists(lists.indices, want[2], at, sizes[2], top_n, 1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_overlap_rules(target: Target, sizes: tuple[int, int, int]) -> None:
    check(target, 300, 300, sizes, (4, 2), 16)


@pytest.mark.parametrize("tokens", [1, 7, 8, 11, 12, 63, 64, 65])
def test_lengths(target: Target, tokens: int) -> None:
    check(target, tokens, tokens, (8, 4, 16), (3, 1), 24)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (16, 1), (6, 3), (100, 1)], ids=str)
def test_groups(target: Target, heads: tuple[int, int]) -> None:
    check(target, 70, 70, (8, 4, 16), heads, 8, top_n=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(target: Target, dtype: torch.dtype) -> None:
    check(target, 200, 200, (8, 4, 16), (4, 2), 64, dtype)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_queries_at_the_end(target: Target, rows: int) -> None:
    check(target, 1300, rows, (8, 4, 16), (4, 2), 16, top_n=9)


@settings(max_examples=12, suppress_health_check=list(settings().suppress_health_check))
@given(data=st.data())
def _any_shape(level: Target, data: st.DataObject) -> None:
    stride = data.draw(st.sampled_from([1, 4, 16]), "stride")
    sizes = (stride * data.draw(st.integers(1, 4), "l / d"), stride,
             stride * data.draw(st.integers(1, 5), "l' / d"))  # fmt: skip
    tokens = data.draw(st.integers(1, 300), "tokens")
    rows = data.draw(st.integers(1, min(tokens, 70)), "rows")
    heads = data.draw(st.sampled_from([(1, 1), (5, 1), (4, 2)]), "heads")
    check(level, tokens, rows, sizes, heads, 8, top_n=data.draw(st.integers(3, 8), "n"))


def test_any_shape(level: Target) -> None:
    _any_shape(level)


def test_packed_equals_one_by_one(target: Target) -> None:
    lengths, sizes = (50, 0, 1, 130, 7), (8, 4, 16)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.randn(sum(lengths), 2, 16)
    q = torch.randn(sum(lengths), 4, 16)
    k, _ = attnforge.pool_blocks(x, block=8, stride=4, cu_seqlens=cu)
    options: dict[str, Any] = {**names(sizes), "backend": target.backend}
    out, lse, weights = attnforge.compressed_attention(
        q, k, k, cu_seqlens=cu, return_lse=True, return_importance=True, **options
    )
    lists = attnforge.nsa_select(q, k, lse, cu_seqlens=cu, top_n=4, **options)
    for n, first in zip(lengths, cu.tolist(), strict=False):
        own, rows = x[None, first : first + n], slice(first, first + n)
        k1 = attnforge.pool_blocks(own, block=8, stride=4)
        one = attnforge.compressed_attention(
            q[None, rows], k1, k1, return_lse=True, return_importance=True, **options
        )
        assert same_bits(out[rows], one[0][0])
        assert same_bits(lse[:, rows], one[1][0])
        # the reference's products are a BLAS's, whose last bits follow the size
        slack = 1e-6 if target.backend == "reference" else 0.0
        mine = weights[:, rows, : one[2].shape[-1]]
        torch.testing.assert_close(mine, one[2][0], rtol=slack, atol=slack)
        assert not weights[:, rows, one[2].shape[-1] :].any()
        ids = attnforge.nsa_select(q[None, rows], k1, one[1], top_n=4, **options)
        assert torch.equal(lists.indices[:, rows], ids.indices[0])


def test_whole_method_pools_packed_keys_itself() -> None:
    """Pools of packed sequences have room behind the last block; nothing of it is seen."""
    lengths = (21, 0, 12, 17)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    q, gates = (torch.rand(50, 2, n, generator=g, dtype=torch.float64) for n in (8, 3))
    k, v = torch.rand(2, 50, 1, 8, generator=g, dtype=torch.float64)
    options: dict[str, Any] = {**names((8, 4, 16)), "top_n": 3, "window": 5, "backend": "reference"}
    got = attnforge.nsa_attention(q, None, None, k, v, None, None, gates, cu_seqlens=cu, **options)
    for n, first in zip(lengths, cu.tolist(), strict=False):
        if n == 0:
            continue
        q1, k1, v1, g1 = (x[None, first : first + n] for x in (q, k, v, gates))
        one = attnforge.nsa_attention(q1, None, None, k1, v1, None, None, g1, **options)
        torch.testing.assert_close(got[first : first + n], one[0])


def test_importance_of_known_probabilities(target: Target) -> None:
    """(l, d, l') = (32, 16, 64), 192 tokens, p_i = (i + 1) / 66: sums of 16, 48, 68 parts."""
    values = torch.log(torch.arange(1.0, 12.0))
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 11, 1, 8)
    q[..., 0], k[0, :, 0, 0] = 1.0, values
    got = attnforge.compressed_attention(
        q, k, k, seqlen_k=192, softmax_scale=1.0, return_importance=True, backend=target.backend
    )[1]
    torch.testing.assert_close(got.flatten() * 66, torch.tensor([16.0, 48.0, 68.0]))


def test_forced_blocks_and_ties(target: Target) -> None:
    """Equal scores: exactly n, the forced ones kept, the rest from the right."""
    q = torch.zeros(1, 1200, 1, 8)
    k = attnforge.pool_blocks(torch.zeros(1, 1200, 1, 8), block=32, stride=16)
    lse = attnforge.compressed_attention(q, k, k, return_lse=True)[1]
    got = attnforge.nsa_select(q, k, lse, top_n=5, backend=target.backend).indices[0, 0]
    assert got[0].tolist() == [0, -1, -1, -1, -1]
    assert got[63].tolist() == [0, -1, -1, -1, -1]
    assert got[64].tolist() == [0, 1, -1, -1, -1]
    assert got[130].tolist() == [0, 1, 2, -1, -1]
    # Token 1151 is the last of block 17: every window of blocks 1 to 15 was seen as a whole.
    assert got[1151].tolist() == [0, 14, 15, 16, 17]


def test_hidden_windows_do_not_leak(target: Target) -> None:
    q, k, v = make(200, 200, (8, 4, 16), (4, 2), 16)
    dirty = k.clone()
    dirty[:, 20:] = math.nan  # windows 20.. end at token 87 or later
    results = [
        attnforge.compressed_attention(
            q, x, v, **names((8, 4, 16)), return_lse=True, return_importance=True,
            backend=target.backend,
        )
        for x in (k, dirty)
    ]  # fmt: skip
    for clean, other in zip(*results, strict=True):
        rows = 1 if clean.dim() == 4 and clean.shape[1] == 200 else 2
        assert same_bits(clean.narrow(rows, 0, 87), other.narrow(rows, 0, 87))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_neighbours_do_not_matter(threads: int) -> None:
    q, k, v = make(300, 300, (8, 4, 16), (4, 2), 16)
    options: dict[str, Any] = {**names((8, 4, 16)), "backend": "cpu"}
    _, _, want = attnforge.compressed_attention(
        q, k, v, return_lse=True, return_importance=True, **options
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = attnforge.compressed_attention(q[1:], k[1:], v[1:], return_importance=True, **options)
    finally:
        torch.set_num_threads(before)
    assert same_bits(got[1], want[1:])


def test_gradients() -> None:
    q, k, v = (x.double().requires_grad_() for x in make(20, 20, (8, 4, 16), (4, 2), 8))

    def call(*x: Tensor) -> Any:
        out, lse = attnforge.compressed_attention(*x, **names((8, 4, 16)), return_lse=True)
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_gradients_of_kernels(level: Target) -> None:
    inputs = [x.requires_grad_() for x in make(150, 150, (8, 4, 16), (4, 2), 16)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    grads = []
    for x, backend in ((inputs, level.backend), (wide, "reference")):
        out = attnforge.compressed_attention(*x, **names((8, 4, 16)), backend=backend)
        out.square().sum().backward()
        grads.append([t.grad for t in x])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cmp_stride": 12}, "cmp_block is 32; want a multiple of cmp_stride = 12"),
        ({"slc_block": 0}, "slc_block is 0"),
        ({"seqlen_k": 5000}, "want at least 311 compressed keys"),
        ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int32)}, "cu_seqlens_k comes with"),
    ],
)
def test_errors(changes: dict[str, Any], text: str) -> None:
    q, k, v = make(200, 200, (32, 16, 64), (4, 2), 16)
    with pytest.raises(ValueError, match=text):
        attnforge.compressed_attention(q, k, v, **changes)
    with pytest.raises(ValueError, match=r"top_n is 2; want at least .* = 3"):
        attnforge.nsa_select(q, k, torch.zeros(2, 4, 200), top_n=2)
    with pytest.raises(ValueError, match="lse has shape"):
        attnforge.nsa_select(q, k, torch.zeros(2, 4, 20))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_tokens(target: Target, rows: int) -> None:
    """A context without tokens gives nothing to attend to: zeros, of no rows if there are none."""
    q, gates = torch.randn(2, rows, 4, 16), torch.rand(2, rows, 4, 3)
    k, v = torch.randn(2, 0, 2, 16), torch.randn(2, 0, 2, 8)
    out = attnforge.nsa_attention(q, None, None, k, v, None, None, gates, backend=target.backend)
    assert torch.equal(out, torch.zeros(2, rows, 4, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixing(dtype: torch.dtype) -> None:
    """Branches that are not contiguous, gates of another dtype; the same bits with a gradient."""
    outs = [torch.randn(2, 2500, 3, 24).to(dtype) for _ in range(2)]
    outs.append(torch.randn(2, 2500, 24, 3).to(dtype).transpose(2, 3))
    gates = torch.rand(2, 2500, 3, 3)
    got = attnforge.gated_combine(outs, gates)
    assert got.dtype is dtype
    want = sum(x.double() * gates[..., n, None].double() for n, x in enumerate(outs))
    tol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    torch.testing.assert_close(got.double(), want, rtol=tol[dtype], atol=tol[dtype])
    tracked = attnforge.gated_combine(outs, gates.requires_grad_())
    assert tracked.requires_grad
    assert same_bits(got, tracked.detach())


def test_gradients_of_mixing() -> None:
    outs = [torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gates = torch.rand(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(gates: Tensor, *outs: Tensor) -> Tensor:
        return attnforge.gated_combine(outs, gates)

    assert torch.autograd.gradcheck(call, (gates, *outs))
    assert torch.autograd.gradgradcheck(call, (gates, *outs))


def chosen_together(
    q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int, int], tokens: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and lists of ``nsa_attend``."""
    c = compressed.compressed_problem("test", q, k, v, sizes, tokens, None, None, None)
    found: tuple[Tensor, Tensor, Tensor] = _nsa_ops.nsa_attend(
        c.q, c.k, c.v, *nsa._rest(c, (n, 1, 2), "cpu")
    )
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "heads", "dim"),
    [(300, 300, (4, 2), 16), (70, 70, (100, 1), 8), (1300, 64, (16, 1), 64), (9, 9, (3, 1), 24)],
)
def test_branch_and_choice_together(
    level: Target,
    sizes: tuple[int, int, int],
    tokens: int,
    rows: int,
    heads: tuple[int, int],
    dim: int,
) -> None:
    q, k, v = make(tokens, rows, sizes, heads, dim)
    want = truth(q, k, v, sizes, tokens)
    out, lse, ids = chosen_together(q, k, v, sizes, tokens, 4)
    torch.testing.assert_close(out.double(), want[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)
    check_lists(ids, want[2], torch.arange(rows) + tokens - rows, sizes[2], 4, 1e-4)


def test_together_hidden_windows_do_not_leak(level: Target) -> None:
    """NaN and infinities in windows that a query does not see; several blocks of windows."""
    sizes = (8, 4, 16)
    q, k, v = make(1500, 1500, sizes, (4, 2), 16)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, 300:] = math.nan  # windows 300.. end at token 1207 or later
    bad_v[:, 300:310], bad_v[:, 310:] = math.inf, math.nan
    clean = chosen_together(q, k, v, sizes, 1500, 6)
    other = chosen_together(q, bad_k, bad_v, sizes, 1500, 6)
    assert same_bits(clean[0][:, :1207], other[0][:, :1207])
    assert same_bits(clean[1][:, :, :1207], other[1][:, :, :1207])
    assert torch.equal(clean[2][:, :, :1207], other[2][:, :, :1207])
    assert other[0][:, 1210:].isnan().any()


@pytest.mark.parametrize("threads", [1, 3])
def test_together_threads_and_neighbours_do_not_matter(threads: int) -> None:
    sizes = (8, 4, 16)
    q, k, v = make(1500, 1500, sizes, (4, 2), 16)
    want = chosen_together(q, k, v, sizes, 1500, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = chosen_together(q[1:], k[1:], v[1:], sizes, 1500, 6)
    finally:
        torch.set_num_threads(before)
    for x, y in zip(got, want, strict=True):
        assert same_bits(x, y[1:])


def test_whole_method_is_the_same_with_and_without_gradients() -> None:
    """Packed sequences too: without a gradient one kernel attends and chooses."""
    lengths = (150, 0, 70, 1)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    q, gates = (torch.randn(221, 4, n, generator=g) for n in (16, 3))
    k, v = torch.randn(2, 221, 2, 16, generator=g)
    options: dict[str, Any] = {**names((8, 4, 16)), "top_n": 4, "window": 9}
    for packed in (True, False):
        own: Any = (q, k, v, gates) if packed else tuple(x[None] for x in (q, k, v, gates))
        more = {"cu_seqlens": cu} if packed else {}
        results = []
        for tracked in (False, True):
            q1 = own[0].clone().requires_grad_(tracked)
            results.append(attnforge.nsa_attention(
                q1, None, None, own[1], own[2], None, None, own[3], return_selection=True,
                **options, **more,
            ))  # fmt: skip
        torch.testing.assert_close(results[0][0], results[1][0].detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(results[0][1].indices, results[1][1].indices)
