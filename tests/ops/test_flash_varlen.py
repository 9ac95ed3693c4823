"""Packed sequences: neighbours, empty members, padding rows, malformed boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.cases import FlashCase, FlashInputs, Target
from attnforge.testing.compare import assert_same, compare

LENGTHS = {
    "plain": ((5, 9), (70, 70), (1, 33), (40, 12)),
    "zero_q": ((0, 5), (5, 7), (0, 3), (7, 0), (0, 0)),  # check 24
    "zero_first_last": ((0, 0), (9, 4), (0, 0)),
    "fa443": ((76, 1), (34, 1), (146, 1)),  # far more rows than keys under a causal mask
    "ones": tuple((1, n) for n in range(1, 20)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", LENGTHS)
def test_bounds(target: Target, name: str, causal: bool, dtype: torch.dtype) -> None:
    # checks 1, 2, 3, 24
    inputs = FlashCase(lengths=LENGTHS[name], heads_q=4, heads_k=2, causal=causal, dtype=dtype,
                       alibi="batch" if causal else "").make()  # fmt: skip
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


def one(inputs: FlashInputs, b: int) -> FlashInputs:
    """Sequence ``b`` alone, as a dense batch of one."""
    cu_q, cu_k = (inputs.options[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k"))
    rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
    options = {n: x for n, x in inputs.options.items() if not n.startswith("cu_seqlens")}
    return FlashInputs(
        attnforge.flash_attention, inputs.q[rows].unsqueeze(0), inputs.k[keys].unsqueeze(0),
        inputs.v[keys].unsqueeze(0), options, inputs.dout[rows].unsqueeze(0),
        None if inputs.dlse is None else inputs.dlse[:, rows].unsqueeze(0),
    )  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_each_sequence_equals_itself_alone(target: Target, name: str) -> None:
    # check 74: bitwise, whatever the neighbours
    inputs = FlashCase(lengths=LENGTHS[name], heads_q=4, heads_k=2, causal=True).make()
    got = inputs.run(target.backend)
    cu_q, cu_k = (inputs.options[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k"))
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        part = {
            "out": got["out"][rows], "lse": got["lse"][:, rows], "dq": got["dq"][rows],
            "dk": got["dk"][keys], "dv": got["dv"][keys],
        }  # fmt: skip
        alone = one(inputs, b).run(target.backend)
        assert_same(
            part, {n: x.squeeze(0) for n, x in alone.items()}, f"sequence {b}", exact=target.exact
        )


@pytest.mark.parametrize("bound", [40, 64, 1000])
def test_larger_max_seqlen_changes_nothing(target: Target, bound: int) -> None:
    # dense_paged 5.2, 6
    inputs = FlashCase(lengths=((3, 9), (40, 33), (0, 2)), causal=True).make()
    assert_same(
        inputs.with_(max_seqlen_q=bound, max_seqlen_k=bound).run(target.backend),
        inputs.run(target.backend),
        exact=target.exact,
    )


def test_used_keys(target: Target) -> None:
    inputs = FlashCase(lengths=((4, 9), (20, 33), (3, 2)), used=(9, 0, 1), causal=True).make()
    compare(inputs.run(target.backend), inputs.truth(), inputs.context).check()


def test_rows_of_no_sequence(target: Target) -> None:
    # dense_paged 5.2, 34: the total is larger than the last boundary, the rest is NaN
    inputs = FlashCase(lengths=((4, 9), (20, 33)), causal=True).make()
    want = inputs.run(target.backend)

    def padded(x: Tensor, dim: int = 0) -> Tensor:
        tail = x.narrow(dim, 0, 1).expand(*x.shape[:dim], 3, *x.shape[dim + 1 :])
        return torch.cat([x, torch.full_like(tail, float("nan"))], dim)

    assert inputs.dlse is not None
    wide = inputs.with_(q=padded(inputs.q), k=padded(inputs.k), v=padded(inputs.v),
                        dout=padded(inputs.dout), dlse=padded(inputs.dlse, 1))  # fmt: skip
    got = wide.run(target.backend)
    assert (got["lse"][:, -3:] == -torch.inf).all()
    for name in ("out", "dq", "dk", "dv"):
        assert not got[name][-3:].any(), name
    got = {n: x[:, :-3] if n == "lse" else x[:-3] for n, x in got.items()}
    assert_same(got, want, exact=target.exact)


MALFORMED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "decreasing": ({"cu_seqlens_q": [0, 7, 3, 9]}, ValueError, "cu_seqlens_q decreases"),  # 42
    "decreasing_k": ({"cu_seqlens_k": [0, 7, 3, 9]}, ValueError, "cu_seqlens_k decreases"),
    "past_the_end": ({"cu_seqlens_q": [0, 3, 7, 10]}, ValueError, "cu_seqlens_q ends at 10"),  # 43
    "past_the_end_k": ({"cu_seqlens_k": [0, 3, 7, 2**31 - 1]}, ValueError, "cu_seqlens_k ends"),
    "not_from_0": ({"cu_seqlens_k": [1, 3, 7, 9]}, ValueError, "cu_seqlens_k starts at 1"),
    "negative": ({"cu_seqlens_q": [-1, 3, 7, 9]}, ValueError, "cu_seqlens_q starts at -1"),
    "negative_later": ({"cu_seqlens_k": [0, -5, 7, 9]}, ValueError, "cu_seqlens_k decreases"),
    "lengths_differ": ({"cu_seqlens_k": [0, 9]}, ValueError, "differ in length"),
    "empty": ({"cu_seqlens_q": []}, ValueError, "cu_seqlens_q is empty"),
    "max_q": ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q is 3; got a sequence of 4"),  # 44
    "max_k": ({"max_seqlen_k": 0}, ValueError, "max_seqlen_k is 0; got a sequence of 4"),
    "max_negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1"),
    "max_tensor": ({"max_seqlen_q": torch.tensor([4])}, TypeError, "max_seqlen_q is a tensor"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_boundaries(target: Target, name: str, grad: bool) -> None:
    # checks 42, 43, 44: refused, by an error that names the function and the argument
    changes, kind, text = MALFORMED[name]
    good = {"cu_seqlens_q": [0, 3, 7, 9], "cu_seqlens_k": [0, 3, 7, 9]}
    options = {
        n: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x
        for n, x in {**good, **changes}.items()
    }
    x = torch.randn(9, 2, 8, requires_grad=grad)
    with pytest.raises(kind, match=rf"attnforge\.flash_attention_varlen: .*{text}"):
        attnforge.flash_attention_varlen(x, x, x, backend=target.backend, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32])
def test_wrong_index_dtype(dtype: torch.dtype) -> None:
    # dense_paged 5.2, 12: rejected, never misread
    x, cu = torch.randn(9, 2, 8), torch.tensor([0, 9], dtype=torch.int32)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, name: cu.to(dtype)}
        with pytest.raises(TypeError, match=rf"flash_attention_varlen: {name} has dtype"):
            attnforge.flash_attention_varlen(x, x, x, **options)


def test_wrong_index_device_and_shape() -> None:
    # check 43
    x, cu = torch.randn(9, 2, 8), torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q is on meta; want cpu"):
        attnforge.flash_attention_varlen(x, x, x, cu_seqlens_q=cu.to("meta"), cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="cu_seqlens_k has shape"):
        attnforge.flash_attention_varlen(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu.view(1, 2))


def test_boundaries_that_are_not_contiguous(target: Target) -> None:
    inputs = FlashCase(lengths=((4, 9), (20, 33), (3, 2)), used=(9, 10, 1), causal=True).make()
    spread = {
        n: torch.stack([x, torch.full_like(x, 10**6)], 1)[:, 0]
        for n, x in inputs.options.items()
        if isinstance(x, Tensor)
    }
    assert not any(x.is_contiguous() for x in spread.values())
    assert_same(
        inputs.with_(**spread).run(target.backend), inputs.run(target.backend), exact=target.exact
    )


def test_operators_check_index_values_too() -> None:
    # checks 42, 44: the operator itself, without the public function above it
    x = torch.randn(9, 2, 8)
    good, bad = (torch.tensor(c, dtype=torch.int32) for c in ([0, 4, 9], [0, 7, 3]))
    tail = (None, None, None, 9, 9, 0.3, -1, -1, 0.0, [], "softmax", 0.0, False, None)
    with pytest.raises(ValueError, match="cu_seqlens_k decreases"):
        torch.ops.attnforge.flash_fwd(x, x, x, good, bad, *tail, False, None)
    out, lse, lo = torch.ops.attnforge.flash_fwd(x, x, x, good, good, *tail, False, None)
    with pytest.raises(ValueError, match="cu_seqlens_q decreases"):
        torch.ops.attnforge.flash_bwd(x, None, x, x, x, out, lse, lo, bad, good, *tail, 0, None)
