"""torch's attention functions on attnforge against torch's own math in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnforge.integrations.torch as af
from attnforge.integrations import _torch_provider as provider


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(*tensors: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """torch's math kernel in float64."""
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        attn_mask = attn_mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            *(x.double() for x in tensors), attn_mask=attn_mask, **options
        )


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=3e-6)


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 4, 7, 16), (2, 4, 9, 16), {}),
    ((2, 4, 7, 16), (2, 4, 9, 16), {"is_causal": True}),
    ((2, 4, 9, 16), (2, 4, 7, 16), {"is_causal": True, "scale": 0.3}),
    ((2, 4, 7, 16), (2, 2, 9, 16), {"enable_gqa": True}),
    ((2, 3, 4, 7, 16), (2, 3, 2, 9, 16), {"enable_gqa": True, "is_causal": True}),
    ((2, 4, 7, 16), (1, 1, 9, 16), {}),
    ((4, 7, 16), (4, 9, 16), {}),
    ((7, 16), (9, 16), {"is_causal": True}),
]


MASKS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((2, 4, 7, 16), (2, 4, 9, 16), (7, 9)),
    ((2, 4, 7, 16), (2, 4, 9, 16), (2, 1, 1, 9)),
    ((2, 4, 7, 16), (2, 4, 9, 16), (1, 4, 7, 9)),
    ((2, 3, 4, 7, 16), (2, 3, 4, 9, 16), (3, 1, 7, 9)),
    ((7, 16), (9, 16), (7, 9)),
]


def masks() -> Iterator[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    """Added masks, and bool ones that leave each row its first key."""
    for shape_q, shape_k, shape in MASKS:
        bias = drawn(*shape, seed=3)
        seen = (bias > -0.5).index_fill(-1, torch.tensor([0]), True)
        yield from ((shape_q, shape_k, {"attn_mask": mask}) for mask in (bias, seen))


@pytest.mark.parametrize(("shape_q", "shape_k", "options"), [*SHAPES, *masks()])
def test_sdpa(shape_q: tuple[int, ...], shape_k: tuple[int, ...], options: dict[str, Any]) -> None:
    leaves = [drawn(*shape_q).requires_grad_(), drawn(*shape_k, seed=1).requires_grad_()]
    leaves.append(drawn(*shape_k, seed=2).requires_grad_())
    with af.sdpa(strict=True):
        out = F.scaled_dot_product_attention(*leaves, **options)
    want = exact(*leaves, **options)
    close(out, want)
    weight = drawn(*out.shape, seed=5)
    got = torch.autograd.grad(out, leaves, weight)
    for mine, theirs in zip(got, torch.autograd.grad(want, leaves, weight.double()), strict=True):
        close(mine, theirs)


def test_sdpa_runs_on_attnforge_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = af.flash_attention

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(af, "flash_attention", counted)
    q = drawn(1, 2, 5, 16)
    F.scaled_dot_product_attention(q, q, q)
    assert not calls
    with af.sdpa():
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(query=q, key=q, value=q, is_causal=True)
    assert len(calls) == 2
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 2


def test_layers_of_torch_run_on_it() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = drawn(2, 6, 32)
    want = layer(x)
    with af.sdpa():
        close(layer(x), want)


def test_dropout_follows_the_seed() -> None:
    q = drawn(1, 2, 32, 16)
    with af.sdpa():
        results = []
        for _ in range(2):
            torch.manual_seed(3)
            results.append(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
        assert torch.equal(*results)
        assert not torch.equal(results[0], F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))


def jagged(lengths: tuple[int, ...], heads: int, seed: int, holes: bool = False) -> Tensor:
    """[B, S, H, 16] over a leaf of rows, its ``base``; with holes, of NaN between the sequences."""
    sizes = torch.tensor(lengths)
    offsets = 9 * torch.arange(len(lengths) + 1) if holes else F.pad(sizes.cumsum(0), (1, 0))
    rows = torch.full((int(offsets[-1]), heads, 16), torch.nan)
    for first, n in zip(offsets, lengths, strict=False):
        rows[first : first + n] = drawn(n, heads, 16, seed=seed + n)
    rows.requires_grad_()
    x = torch.nested.nested_tensor_from_jagged(rows, offsets, sizes if holes else None)
    x.base = rows
    return x


@pytest.mark.parametrize("holes", [False, True])
def test_jagged_tensors(holes: bool) -> None:
    """Outputs and gradients of each sequence alone, in float64."""
    lengths = ((3, 1, 6), (5, 1, 8), (5, 1, 8))
    nested = [
        jagged(n, heads, 10 * i, holes)
        for i, (n, heads) in enumerate(zip(lengths, (4, 2, 2), strict=True))
    ]
    out, lse = af.nested_attention(*nested, causal=True, window_size=(3, 0), return_lse=True)
    dout = torch.nested.nested_tensor_from_jagged(drawn(10, 4, 16, seed=9), out.offsets())
    grads = torch.autograd.grad((out * dout).values().sum(), [x.base for x in nested])
    for b, (got, stats, d) in enumerate(zip(*(x.unbind() for x in (out, lse, dout)), strict=True)):
        parts = [x.unbind()[b][: n[b]].detach().double().requires_grad_() for x, n in
                 zip(nested, lengths, strict=True)]  # fmt: skip
        q, k, v = (x.transpose(0, 1) for x in parts)
        k, v = (x.repeat_interleave(2, 0) for x in (k, v))
        at = torch.arange(q.shape[1]).view(-1, 1) + k.shape[1] - q.shape[1]
        key = torch.arange(k.shape[1])
        scores = q @ k.mT / 4
        scores = scores.masked_fill((key > at) | (key < at - 3), -torch.inf)
        want = (torch.softmax(scores, -1) @ v).transpose(0, 1)
        close(got, want)
        close(stats.transpose(0, 1), torch.logsumexp(scores, -1))
        want.backward(d.double())
        for x, n, grad, part in zip(nested, lengths, grads, parts, strict=True):
            first = int(x.offsets()[b])
            close(grad[first : first + n[b]], part.grad)
            if holes:
                assert not grad[first + n[b] : first + 9].any()


def test_jagged_tensors_by_sdpa() -> None:
    nested = [jagged((3, 1, 6), 4, 10 * i, holes=True) for i in range(3)]
    with af.sdpa(strict=True):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in nested), is_causal=True)
    for got, *qkv in zip(out.transpose(1, 2).unbind(), *(x.unbind() for x in nested), strict=True):
        parts = (x[: got.shape[0]].transpose(0, 1) for x in qkv)
        close(got.transpose(0, 1), exact(*parts, is_causal=True))


def test_what_nested_attention_refuses() -> None:
    x = jagged((3, 1), 2, 0)
    with pytest.raises(ValueError, match=r"k is torch\.strided of 4 dims"):
        af.nested_attention(x, drawn(2, 3, 2, 16), x)
    with pytest.raises(ValueError, match=r"q is nested torch\.jagged"):
        af.nested_attention(x.transpose(1, 2), x, x)
    with pytest.raises(ValueError, match="k and v differ"):
        af.nested_attention(x, x, jagged((1, 3), 2, 0))
    with pytest.raises(TypeError, match="v is None"):
        af.nested_attention(x, x, None)


def test_what_is_not_served_runs_as_before() -> None:
    strided = torch.nested.nested_tensor([drawn(2, 3, 8), drawn(2, 5, 8)])
    want = F.scaled_dot_product_attention(strided, strided, strided)
    with af.sdpa():
        out = F.scaled_dot_product_attention(strided, strided, strided)
    for got, theirs in zip(out.unbind(), want.unbind(), strict=True):
        assert torch.equal(got, theirs)
    with af.sdpa(strict=True), pytest.raises(ValueError, match="nested"):
        F.scaled_dot_product_attention(strided, strided, strided)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True}, "attn_mask"),
        ({}, "enable_gqa"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], words: str) -> None:
    q, k = drawn(1, 4, 5, 16), drawn(1, 4 if options else 2, 5, 16)
    with pytest.raises(ValueError, match=words):
        af.scaled_dot_product_attention(q, k, k, **options)


def test_varlen_attn_over_tensors_and_pages() -> None:
    lengths, cu = (3, 0, 6), torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    q, k, v = drawn(9, 4, 16), drawn(9, 2, 16, seed=1), drawn(9, 2, 16, seed=2)

    class Aux:
        lse = True

    out, lse = af.varlen_attn(
        q, k, v, cu, cu, 6, 6, window_size=(-1, 0), enable_gqa=True, return_aux=Aux()
    )
    assert lse.shape == (4, 9)
    at = 0
    for n in lengths:
        rows = slice(at, at + n)
        parts = (x[rows].transpose(0, 1) for x in (q, k, v))
        close(out[rows].transpose(0, 1), exact(*parts, is_causal=True, enable_gqa=True))
        at += n
    pages = torch.full((2, 4, 4, 2, 16), float("nan"))
    table = torch.tensor([[2, 0], [1, 1], [3, 1]], dtype=torch.int32)
    for b, (a, e) in enumerate(((0, 3), (3, 3), (3, 9))):
        for j in range(e - a):
            pages[0, table[b, j // 4], j % 4], pages[1, table[b, j // 4], j % 4] = (
                k[a + j],
                v[a + j],
            )
    paged = af.varlen_attn(
        q, *pages, cu, cu, 6, 6, window_size=(-1, 0), enable_gqa=True, block_table=table
    )
    close(paged, out)
    with pytest.raises(ValueError, match="enable_gqa"):
        af.varlen_attn(q, k, v, cu, cu, 6, 6)
    with pytest.raises(ValueError, match="cu_seq_k"):
        af.varlen_attn(q, q, q, cu, None, 6, 6)


@pytest.mark.parametrize("kind", ["causal", "window", "document", "full"])
def test_flex_block_masks(kind: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size = 96
    document = torch.arange(size) // 40

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if kind == "window":
            return (j <= i) & (i - j < 20)
        if kind == "document":
            return document[i] == document[j]
        return j <= i if kind == "causal" else j >= 0

    block_mask = create_block_mask(mask_mod, None, None, size, size, device="cpu", BLOCK_SIZE=32)
    q, k, v = drawn(1, 4, size, 16), drawn(1, 2, size, 16, seed=1), drawn(1, 2, size, 16, seed=2)
    out, lse = af.flex_attention(q, k, v, block_mask, enable_gqa=True, return_lse=True)
    want = flex_attention(
        q.double(), k.double(), v.double(), block_mask=block_mask, enable_gqa=True
    )
    close(out, want)
    assert lse.shape == (1, 4, size)
    with pytest.raises(TypeError, match="BlockMask"):
        af.flex_attention(q, k, v, mask_mod, enable_gqa=True)


def test_causal_block_masks_keep_their_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask of chosen blocks goes to the block-sparse kernels, not to a token mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i // 32 == j // 32) | (j < 32))

    block_mask = create_block_mask(mask_mod, None, None, 160, 160, device="cpu", BLOCK_SIZE=32)
    monkeypatch.setattr(af, "flash_attention", None)
    q = drawn(1, 2, 160, 16)
    close(
        af.flex_attention(q, q, q, block_mask),
        flex_attention(*(q.double(),) * 3, block_mask=block_mask),
    )


@pytest.fixture
def active() -> Iterator[None]:
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        with pytest.raises(ImportError, match="torch 2"):
            af.register()
        pytest.skip("needs torch 2.13")
    af.register()
    assert provider.NAME in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None  # never by itself
    attention.activate_flash_attention_impl(provider.NAME)
    yield
    attention.restore_flash_attention_impl()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}, {"attn_mask": 1}])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 9), (9, 5)])
def test_provider(active: None, sizes: tuple[int, int], options: dict[str, Any]) -> None:
    if "attn_mask" in options:
        options = {"attn_mask": drawn(*sizes, seed=4)}
    leaves = [drawn(2, 3, n, 16, seed=i) for i, n in enumerate((sizes[0], sizes[1], sizes[1]))]
    leaves = [x.requires_grad_() for x in leaves]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*leaves, **options)
    want = exact(*leaves, **options)
    close(out, want)
    weight = drawn(*out.shape, seed=5)
    got = torch.autograd.grad(out, leaves, weight)
    for mine, theirs in zip(got, torch.autograd.grad(want, leaves, weight.double()), strict=True):
        close(mine, theirs)


def test_provider_is_called_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = provider._fwd
    monkeypatch.setattr(provider, "_fwd", lambda p: (calls.append(1), inner(p))[1])
    handle = provider._Handle()
    q = drawn(1, 2, 6, 16)
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="dropout_p"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.5)
    handle.remove()
    handle.remove()
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 1


def test_provider_of_cuda_computes_the_same() -> None:
    """The functions for CUDA tensors, called on CPU tensors: their arithmetic, not the dispatch."""
    q, k, v = (drawn(1, 2, n, 16, seed=i) for i, n in enumerate((6, 9, 9)))
    out, lse, *rest = provider.cuda_forward(q, k, v, 0.0, True)
    close(out, exact(q, k, v, is_causal=True))
    assert rest[2:4] == [6, 9]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    weight = drawn(*out.shape, seed=5)
    want = torch.autograd.grad(exact(*leaves, is_causal=True), leaves, weight.double())
    grads = provider.cuda_backward(
        weight, q, k, v, out, lse, None, None, 6, 9, 0.0, True, *rest[4:6]
    )
    for mine, theirs in zip(grads, want, strict=True):
        close(mine, theirs)
    with pytest.raises(ValueError, match="return_debug_mask"):
        provider.cuda_forward(q, k, v, 0.0, True, True)
