"""Strides, offsets, aliases: what lies differently in memory gives the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.cases import LAYOUTS, FlashCase, FlashInputs, Layout, Target, place
from attnforge.testing.compare import assert_same, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"seqlen_q": 40, "seqlen_k": 77, "causal": True},
    "one_row": {"seqlen_q": 1, "seqlen_k": 77},
    "all_ones": {"batch": 1, "seqlen_q": 1, "seqlen_k": 1, "heads_q": 1, "heads_k": 1},
    "one_head": {"batch": 1, "seqlen_q": 40, "seqlen_k": 50, "heads_q": 3, "heads_k": 1},
    "varlen": {"lengths": ((3, 9), (40, 33), (0, 2)), "causal": True},
    "decode": {"seqlen_q": 2, "seqlen_k": 77, "decode": True, "causal": True, "used": (77, 30)},
}


def compacted(inputs: FlashInputs) -> FlashInputs:
    return inputs.with_(**{n: getattr(inputs, n).contiguous() for n in ("q", "k", "v", "dout")})


@pytest.mark.thinned(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_equals_contiguous(target: Target, shape: str, layout: Layout) -> None:
    # checks 67, 68, 69: bitwise, since a kernel's order of work depends on shapes alone
    for dtype in DTYPES:
        inputs = FlashCase(heads_q=6, heads_k=3, dtype=dtype, layout=layout, grad_layout=layout)
        if "heads_q" in SHAPES[shape]:
            inputs = FlashCase(dtype=dtype, layout=layout, grad_layout=layout, **SHAPES[shape])
        else:
            inputs = FlashCase(heads_q=6, heads_k=3, dtype=dtype, layout=layout,
                               grad_layout=layout, **SHAPES[shape])  # fmt: skip
        made = inputs.make()
        assert_same(
            made.run(target.backend),
            compacted(made).run(target.backend),
            repr(inputs),
            exact=target.exact,
        )


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_misaligned_storage(target: Target, offset: int, dtype: torch.dtype) -> None:
    # check 69: 16-bit data at addresses that are a multiple of 2 alone
    inputs = FlashCase(seqlen_q=33, seqlen_k=65, dtype=dtype).make()

    def move(x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 8,), float("nan"), dtype=dtype)
        view = buffer[offset : offset + x.numel()].view(x.shape)
        view.copy_(x)
        return view

    moved = inputs.with_(**{n: move(getattr(inputs, n)) for n in ("q", "k", "v", "dout")})
    assert_same(moved.run(target.backend), inputs.run(target.backend), exact=target.exact)


def test_mixed_layouts(target: Target) -> None:
    # dense_paged 5.2, 10: K and V with different strides, and q and dout with others again
    plain = FlashCase(seqlen_q=30, seqlen_k=60, heads_q=4, heads_k=2, causal=True).make()
    want = plain.run(target.backend)
    layouts: tuple[Layout, ...] = ("sliced", "heads_first", "offset", "last_stride_2")
    for n in range(4):
        q, k, v, dout = (
            place(getattr(plain, name), layouts[(n + i) % 4])
            for i, name in enumerate(("q", "k", "v", "dout"))
        )
        assert_same(
            plain.with_(q=q, k=k, v=v, dout=dout).run(target.backend),
            want,
            str(n),
            exact=target.exact,
        )


def test_fused_projection(target: Target) -> None:
    # check 67: q, k, v as slices of one tensor, gradients through the slices
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 40, 8, 32, generator=g, requires_grad=True)  # 4 q, 2 k, 2 v heads
    q, k, v = fused.split([4, 2, 2], dim=2)
    out = attnforge.flash_attention(q, k, v, causal=True, backend=target.backend)
    (got,) = torch.autograd.grad(out, fused, torch.ones_like(out))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    again = attnforge.flash_attention(*leaves, causal=True, backend=target.backend)
    want = torch.cat(torch.autograd.grad(again, leaves, torch.ones_like(again)), dim=2)
    assert_same({"out": out, "grad": got}, {"out": again, "grad": want}, exact=target.exact)


def test_expanded_output_gradient(target: Target) -> None:
    # check 68: sum().backward() brings a dO whose strides are all 0
    for dtype in DTYPES:
        inputs = FlashCase(seqlen_q=30, seqlen_k=60, dtype=dtype, lse_grad=False).make()
        ones = torch.ones((), dtype=dtype).expand_as(inputs.dout)
        assert set(ones.stride()) == {0}
        got = inputs.with_(dout=ones).run(target.backend)
        assert_same(
            got, inputs.with_(dout=ones.contiguous()).run(target.backend), exact=target.exact
        )
        leaf = inputs.q.clone().requires_grad_()
        inputs.call(leaf, inputs.k, inputs.v, **inputs.options,
                    backend=target.backend).sum().backward()  # fmt: skip
        assert leaf.grad is not None
        assert_same({"dq": leaf.grad}, {"dq": got["dq"]}, exact=target.exact)


def test_strided_lse_gradient(target: Target) -> None:
    inputs = FlashCase(seqlen_q=30, seqlen_k=60).make()
    assert inputs.dlse is not None
    moved = inputs.dlse.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(
        inputs.with_(dlse=moved).run(target.backend), inputs.run(target.backend), exact=target.exact
    )
    flat = torch.ones(()).expand_as(moved)
    assert_same(
        inputs.with_(dlse=flat).run(target.backend),
        inputs.with_(dlse=flat.contiguous()).run(target.backend),
        exact=target.exact,
    )


def test_shared_prefix_by_stride_0(target: Target) -> None:
    # K and V of one sequence for a whole batch; their gradient sums over it
    g = torch.Generator().manual_seed(0)
    q = torch.randn(5, 12, 4, 16, generator=g)
    k, v = (torch.randn(1, 40, 2, 16, generator=g).requires_grad_() for _ in range(2))
    out = attnforge.flash_attention(
        q, k.expand(5, -1, -1, -1), v.expand(5, -1, -1, -1), backend=target.backend
    )
    got = torch.autograd.grad(out.sum(), (k, v))
    wide = [x.detach().repeat(5, 1, 1, 1).requires_grad_() for x in (k, v)]
    again = attnforge.flash_attention(q, *wide, backend=target.backend)
    assert_same({"out": out}, {"out": again}, exact=target.exact)
    for a, b in zip(got, torch.autograd.grad(again.sum(), wide), strict=True):
        torch.testing.assert_close(a, b.sum(0, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("same", ["kv", "qk", "qkv", "overlapping"])
def test_aliased_inputs(target: Target, same: str) -> None:
    # check 70: k is v, q is k, all one tensor, overlapping views of one storage
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 33, 2, 16, generator=g) for _ in range(2))
    if same == "overlapping":
        rows = torch.randn(2, 40, 2, 16, generator=g)
        q, k, v = rows[:, :33], rows[:, 2:35], rows[:, 7:]
    else:
        q, k, v = {"kv": (y, x, x), "qk": (x, x, y), "qkv": (x, x, x)}[same]
    names = ("dq", "dk", "dv")
    dout = torch.randn(2, 33, 2, 16, generator=g)

    def run(tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        out, lse = attnforge.flash_attention(
            *tensors, causal=True, return_lse=True, backend=target.backend
        )
        grads = torch.autograd.grad(out, tensors, dout)
        return {"out": out, "lse": lse, **dict(zip(names, grads, strict=True))}

    want = run(tuple(t.clone().requires_grad_() for t in (q, k, v)))
    plain = attnforge.flash_attention(q, k, v, causal=True, backend=target.backend)
    assert_same({"out": plain}, {"out": want["out"]}, exact=target.exact)
    if same == "overlapping":
        assert_same(
            run(tuple(t.detach().requires_grad_() for t in (q, k, v))), want, exact=target.exact
        )
        return
    leaves = {id(t): t.clone().requires_grad_() for t in (q, k, v)}
    used = [leaves[id(t)] for t in (q, k, v)]
    out = attnforge.flash_attention(*used, causal=True, backend=target.backend)
    out.backward(dout)
    for leaf in leaves.values():
        total = sum(want[n] for n, t in zip(names, used, strict=True) if t is leaf)
        torch.testing.assert_close(leaf.grad, total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_are_not_written(target: Target, shape: str) -> None:
    # check 71: bytes and version counters
    case = FlashCase(**{"heads_q": 6, "heads_k": 3, "sinks": "normal", "alibi": "head",
                        **SHAPES[shape]})  # fmt: skip
    inputs = case.make()
    tensors = [inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse]
    tensors += [x for x in inputs.options.values() if isinstance(x, Tensor)]
    before = [(x.clone(), x._version) for x in tensors if x is not None]
    inputs.run(target.backend)
    inputs.forward(target.backend)
    for x, (copy, version) in zip([x for x in tensors if x is not None], before, strict=True):
        assert torch.equal(x, copy)
        assert x._version == version


def test_outputs_are_new_and_contiguous(target: Target) -> None:
    inputs = FlashCase(layout="heads_first", v_head_dim=24).make()
    got = inputs.run(target.backend)
    for name, x in got.items():
        assert x.is_contiguous(), name
    pointers = {x.untyped_storage().data_ptr() for x in got.values()}
    pointers |= {x.untyped_storage().data_ptr() for x in (inputs.q, inputs.k, inputs.v)}
    assert len(pointers) == len(got) + 3


def test_layout_that_is_copied_is_right(target: Target) -> None:
    # section 6: last stride 2 and a transposed last dimension
    inputs = FlashCase(seqlen_q=24, seqlen_k=24, head_dim=24).make()
    turned = inputs.with_(
        **{n: getattr(inputs, n).transpose(1, 3).contiguous().transpose(1, 3)
           for n in ("q", "k", "v", "dout")}
    )  # fmt: skip
    assert turned.q.stride(-1) != 1
    compare(turned.run(target.backend), inputs.truth()).check()
