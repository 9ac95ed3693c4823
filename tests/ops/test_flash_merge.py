"""merge_states: any number of parts, empty ones, both layouts, its gradients, its errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.oracle import merged_truth, unit_roundoff

pytestmark = pytest.mark.thinned(3)

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]


def parts(n: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 5, 3, 16),
          spread: float = 3.0) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    g = torch.Generator().manual_seed(n)
    stat = (*shape[:-3], shape[-2], shape[-3])
    outs = [torch.randn(shape, generator=g).to(dtype) for _ in range(n)]
    return outs, [spread * torch.randn(stat, generator=g) for _ in range(n)]


def check(outs: list[Tensor], lses: list[Tensor], target: Target) -> tuple[Tensor, Tensor]:
    out, lse = attnforge.merge_states(outs, lses, backend=target.backend)
    compare({"out": out, "lse": lse}, merged_truth(outs, lses)).check()
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 55, 97, 133])
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (7, 3, 24), (1, 1, 1, 3), (2, 9, 1, 1)], ids=str)
def test_bounds(target: Target, n: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # dense_paged 5.2, 19; head dims that are no multiple of a vector too
    check(*parts(n, dtype, shape), target)


@pytest.mark.parametrize("marker", [-INF, INF], ids=str)
@pytest.mark.parametrize("garbage", [0.0, math.nan, INF], ids=str)
def test_empty_parts(target: Target, marker: float, garbage: float) -> None:
    # dense_paged 5.2, 19: -inf and +inf both mean empty, whatever the output holds
    outs, lses = parts(4)
    for n in (0, 2):
        outs[n][0, 1], lses[n][0, :, 1] = garbage, marker
    for n in range(4):
        outs[n][1, 3], lses[n][1, :, 3] = garbage, marker
    out, lse = check(outs, lses, target)
    assert not out[1, 3].any()
    assert (lse[1, :, 3] == -INF).all()


def test_one_part_left(target: Target) -> None:
    outs, lses = parts(3)
    lses[0].fill_(-INF)
    lses[2].fill_(INF)
    out, lse = check(outs, lses, target)
    assert torch.equal(out, outs[1])
    torch.testing.assert_close(lse, lses[1], rtol=1e-6, atol=1e-6)


def test_nan_is_not_dropped(target: Target) -> None:
    outs, lses = parts(3)
    lses[1][0, 2, 4] = math.nan
    outs[2][1, 0, 0, 7] = math.nan
    out, lse = attnforge.merge_states(outs, lses, backend=target.backend)
    assert out[0, 4, 2].isnan().all()
    assert lse[0, 2, 4].isnan()
    assert out[1, 0, 0, 7].isnan()
    assert int(out.isnan().sum()) == 16 + 1
    assert int(lse.isnan().sum()) == 1


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("splits", range(1, 18))
@pytest.mark.parametrize("rows", [1, 20])
def test_split_keys_merge_to_the_whole(
    target: Target, splits: int, dtype: torch.dtype, rows: int
) -> None:
    # check 10: cuts at random places, some parts empty; the sink goes to exactly one part
    inputs = FlashCase(seqlen_q=rows, seqlen_k=66, heads_q=4, heads_k=2, dtype=dtype,
                       sinks="normal").make()  # fmt: skip
    g = torch.Generator().manual_seed(splits)
    cuts = [0, *sorted(torch.randint(0, 67, (splits - 1,), generator=g).tolist()), 66]
    states = []
    for n, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = inputs.with_(k=inputs.k[:, start:stop], v=inputs.v[:, start:stop])
        if n:
            part.options.pop("sinks")
        states.append(part.forward(target.backend))
    out, lse = attnforge.merge_states(
        [s["out"] for s in states], [s["lse"] for s in states], backend=target.backend
    )
    want = inputs.truth(grad=False)
    # Parts were rounded to the dtype before they were added up.
    u = unit_roundoff(dtype)
    largest = torch.stack([s["out"].double().abs() for s in states]).amax(0)
    want.bounds["out"] = 2 * want.bounds["out"] + 1.05 * u * largest
    want.bounds["lse"] = 2 * want.bounds["lse"]
    compare({"out": out, "lse": lse}, want, inputs.context).check()


def test_strides_are_respected(target: Target) -> None:
    # dense_paged 5.2, 19 and the cascade bug of section 7: an LSE that is not contiguous
    outs, lses = parts(3)
    want = attnforge.merge_states(outs, lses, backend=target.backend)
    moved_outs = [o.transpose(1, 2).contiguous().transpose(1, 2) for o in outs]
    moved_lses = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in lses]
    assert not moved_lses[0].is_contiguous()
    got = attnforge.merge_states(moved_outs, moved_lses, backend=target.backend)
    names = ("out", "lse")
    assert_same(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)),
                exact=target.exact)  # fmt: skip


def test_order_of_magnitude(target: Target) -> None:
    # LSEs of +-3e4: the largest part decides and nothing overflows
    outs, lses = parts(3, spread=1e4)
    out, lse = check(outs, lses, target)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 16), (2, 0, 3, 16), (2, 5, 0, 16), (0, 3, 8)], ids=str)
def test_empty_tensors(target: Target, shape: tuple[int, ...]) -> None:
    out, lse = check(*parts(2, shape=shape), target)
    assert out.shape == shape
    assert lse.numel() == 0


@pytest.mark.parametrize("empty", [False, True])
def test_gradients(target: Target, empty: bool) -> None:
    # against autograd through the formula in float64
    outs, lses = parts(3)
    if empty:
        lses[1][0] = -INF
        outs[1][0] = math.nan
    g = torch.Generator().manual_seed(5)
    dout, dlse = (torch.randn(x.shape, generator=g) for x in (outs[0], lses[0]))
    leaves = [x.clone().requires_grad_() for x in (*outs, *lses)]
    got = torch.autograd.grad(
        attnforge.merge_states(leaves[:3], leaves[3:], backend=target.backend), leaves, (dout, dlse)
    )
    wide = [x.double().clone().requires_grad_() for x in (*outs, *lses)]
    lse = torch.logsumexp(torch.stack(wide[3:]), 0)
    weights = [torch.exp(s - lse).transpose(-1, -2).unsqueeze(-1) for s in wide[3:]]
    out = sum(
        (w * o.masked_fill(o.isnan(), 0.0) for w, o in zip(weights, wide[:3], strict=True)),
        torch.zeros(()),
    )
    want = torch.autograd.grad((out, lse), wide, (dout.double(), dlse.double()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_gradient_of_a_split_call(target: Target) -> None:
    # the whole chain: two segments, merged, give the gradients of one call
    inputs = FlashCase(seqlen_q=20, seqlen_k=50).make()
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    states = [
        attnforge.flash_attention(q, k[:, s], v[:, s], return_lse=True, backend=target.backend)
        for s in (slice(0, 13), slice(13, 50))
    ]
    out, lse = attnforge.merge_states(*zip(*states, strict=True), backend=target.backend)
    assert inputs.dlse is not None
    grads = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
    got = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    compare(got, inputs.truth()).check(limit=2)


BAD = {
    "empty_list": (lambda o, s: ([], []), ValueError, "0 and 0 parts"),
    "counts": (lambda o, s: (o, s[:1]), ValueError, "2 and 1 parts"),
    "tensor": (lambda o, s: (torch.stack(o), s), TypeError, "outs must be a sequence"),
    "rank": (lambda o, s: ([x[0, 0] for x in o], s), ValueError, r"outs\[0\] has shape"),
    "shapes": (lambda o, s: ([o[0], o[1][:, :2]], s), ValueError, r"outs\[1\] is"),
    "dtypes": (lambda o, s: ([o[0], o[1].half()], s), ValueError, r"outs\[1\] is"),
    "lse_order": (lambda o, s: (o, [x.mT for x in s]), ValueError, r"lses\[0\] has shape"),
    "lse_dtype": (lambda o, s: (o, [s[0], s[1].half()]), ValueError, r"lses\[1\] is float16"),
    "no_tensor": (lambda o, s: ([o[0], None], s), TypeError, r"outs\[1\] must be a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=rf"attnforge\.merge_states: .*{text}"):
        attnforge.merge_states(*change(*parts(2)))
