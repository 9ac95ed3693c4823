"""The edges of the contract: nothing to attend to, empty sizes, NaN, ties, memory, threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge import reductions
from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.poison import fenced
from attnforge.testing.reductions import ReductionInputs, reduction_inputs

BAD = [math.nan, math.inf, -math.inf]


def everything(inputs: ReductionInputs, backend: str) -> dict[str, Tensor]:
    """``run``, and the lists."""
    o = {**inputs.options, "backend": backend}
    keys = reductions.topk_keys(inputs.q, inputs.k, inputs.lse, inputs.topk, **o)[1]
    found = reductions.edges(inputs.q, inputs.k, inputs.lse, inputs.threshold, 500, **o)
    return {**inputs.run(backend), "keys": keys, **found._asdict()}


def agree(target: Target, a: Tensor, b: Tensor, name: str = "") -> None:
    assert_same({"x": a}, {"x": b}, name, exact=target.exact)


def changed(inputs: ReductionInputs, name: str, place: Any, value: float) -> ReductionInputs:
    x = getattr(inputs, name).clone()
    x[place] = value
    return inputs.with_(**{name: x})


def test_rows_without_keys(target: Target) -> None:
    # more queries than keys under a causal mask: rows 0..39 see nothing
    inputs = reduction_inputs(FlashCase(seqlen_q=60, seqlen_k=20, causal=True))
    assert bool((inputs.lse[..., :40] == -math.inf).all())
    got = everything(inputs, target.backend)
    compare({n: x for n, x in got.items() if n in inputs.truth().values}, inputs.truth()).check()
    assert not got["entropy"][..., :40].any()
    assert not got["mass"][..., :40, :].any()
    assert not got["dq"][:, :40].any()
    assert not got["dlse"][..., :40].any()
    assert bool((got["keys"][..., :40, :] == -1).all())
    assert bool((got["top_logit"][..., :2, :] == -math.inf).all())
    assert not got["top_prob"][..., :2, :].any()


@pytest.mark.parametrize("value", [0.0, *BAD], ids=str)
def test_a_row_with_an_lse_of_minus_infinity_has_no_probabilities(
    target: Target, value: float
) -> None:
    # whatever its q holds; other rows as if it were not there
    inputs = reduction_inputs(FlashCase(seqlen_q=50, seqlen_k=70))
    inputs = changed(inputs, "lse", (0, 1, 7), -math.inf)
    inputs = changed(inputs, "q", (0, 7, 1), value)
    got, want = inputs.run(target.backend), changed(inputs, "q", (0, 7, 1), 1.0).truth()
    for name in ("top_logit", "largest_logit"):  # these do not look at the LSE
        got.pop(name)
    compare(got, want).check()
    assert not got["mass"][0, 1, 7].any()
    assert not got["dq"][0, 7, 1].any()


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads_q": 0}, {"used": (0, 0)}],
    ids=["batch", "rows", "keys", "heads", "used"],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_empty(target: Target, sizes: dict[str, Any], causal: bool) -> None:
    inputs = reduction_inputs(FlashCase(**{"seqlen_q": 9, "seqlen_k": 20, **sizes}, causal=causal))
    got = everything(inputs, target.backend)
    for name in ("sums", "weighted", "mass", "top_prob", "entropy", "dq", "dk", "dlse"):
        assert not got[name].any(), name
    assert bool((got["top_logit"] == -math.inf).all())
    assert bool((got["keys"] == -1).all())
    assert int(got["total"]) == 0
    assert bool((got["where"] == -1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("key", [89, 60, 1])
def test_hidden_keys_stay_hidden(
    target: Target, value: float, dtype: torch.dtype, key: int
) -> None:
    # causal: rows before the bad key, and keys before it in sums of those rows, are untouched
    inputs = reduction_inputs(
        FlashCase(batch=1, seqlen_q=90, seqlen_k=90, causal=True, dtype=dtype)
    )
    rows = torch.zeros_like(inputs.lse)
    rows[..., :key] = 1.0  # later rows have weight 0: they hold NaN and do not count
    inputs = inputs.with_(weights=rows)
    want, got = (everything(x, target.backend)
                 for x in (inputs, changed(inputs, "k", (0, key), value)))  # fmt: skip
    for name in ("mass", "entropy", "largest_prob", "largest_logit", "keys", "dlse"):
        agree(target, got[name][:, :, :key], want[name][:, :, :key], name)
    agree(target, got["dq"][:, :key], want["dq"][:, :key])
    agree(target, got["weighted"], want["weighted"])
    for name in ("top_prob", "top_logit"):
        agree(target, got[name][:, :, : key // 16], want[name][:, :, : key // 16], name)


@pytest.mark.parametrize("value", BAD, ids=str)
def test_keys_past_the_used_ones_are_never_read(target: Target, value: float) -> None:
    case = FlashCase(seqlen_q=20, seqlen_k=65, heads_q=4, heads_k=2, used=(37, 64), causal=True)
    inputs = reduction_inputs(case)
    k = inputs.k.clone()
    k[0, 37:], k[1, 64:] = value, value
    want, got = (everything(x, target.backend) for x in (inputs, inputs.with_(k=k)))
    assert_same(got, want, exact=target.exact)
    assert not got["dk"][0, 37:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_in_one_query_row(target: Target, dtype: torch.dtype) -> None:
    inputs = reduction_inputs(
        FlashCase(seqlen_q=70, seqlen_k=90, heads_q=4, heads_k=2, dtype=dtype)
    )
    want, got = (everything(x, target.backend)
                 for x in (inputs, changed(inputs, "q", (1, 33, 1, 2), math.nan)))  # fmt: skip
    hit = torch.zeros(inputs.lse.shape, dtype=torch.bool)
    hit[1, 1, 33] = True
    for name in ("entropy", "largest_prob", "largest_logit", "dlse"):
        assert bool(got[name][hit].isnan().all()), name
        agree(target, got[name][~hit], want[name][~hit], name)
    inside = inputs.boundaries.diff() > 0
    assert bool(got["mass"][hit][:, inside].isnan().all())
    agree(target, got["mass"][~hit], want["mass"][~hit])
    assert bool(got["sums"][1, 1].isnan().all())
    assert bool(got["top_prob"][1, 1, 2].isnan().all())
    agree(target, got["top_prob"][1, 1, [0, 1, 3, 4]], want["top_prob"][1, 1, [0, 1, 3, 4]])
    agree(target, got["sums"][1, [0, 2, 3]], want["sums"][1, [0, 2, 3]])
    agree(target, got["dk"][0], want["dk"][0])
    agree(target, got["dq"][hit.transpose(1, 2) == 0], want["dq"][hit.transpose(1, 2) == 0])
    assert not bool((got["where"][:, :3] == torch.tensor([1, 1, 33])).all(1).any())  # NaN: no edge


def test_keys_in_no_span_have_no_part_in_the_gradient(target: Target) -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=20, seqlen_k=60))
    ends = torch.tensor([10, 30], dtype=torch.int32)
    inputs = inputs.with_(boundaries=ends, dmass=torch.randn(1, 2, 20, 1))
    want = inputs.gradients(target.backend)
    got = changed(inputs, "k", (0, 40), math.nan).gradients(target.backend)
    assert_same(got, want, exact=target.exact)
    assert not got["dk"][:, 30:].any()


@pytest.mark.parametrize("with_lse", [False, True], ids=["logits", "prob"])
def test_ties_go_to_the_smaller_key(target: Target, with_lse: bool) -> None:
    # one product per logit, few values: equal keys give equal bits, different ones lie apart
    q, k = torch.zeros(1, 40, 2, 8), torch.zeros(1, 600, 1, 8)
    q[..., 0] = torch.tensor([-2.0, -1.0, 1.0, 3.0])[torch.randint(4, (1, 40, 2))]
    k[..., 0] = torch.randint(-20, 21, (1, 600, 1)).float()
    o = {"causal": True, "softmax_scale": 0.05, "backend": target.backend}
    s = torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) * 0.05
    s = s.masked_fill(torch.arange(600) > torch.arange(40).unsqueeze(1) + 560, -math.inf)
    lse = s.logsumexp(-1) if with_lse else None
    _, keys = reductions.topk_keys(q, k, lse, 50, **o)
    want = s.sort(dim=-1, descending=True, stable=True).indices[..., :50]
    assert torch.equal(keys.long(), want)


def test_nan_ranks_first(target: Target) -> None:
    inputs = reduction_inputs(FlashCase(batch=1, seqlen_q=3, seqlen_k=400, heads_q=1, heads_k=1))
    inputs = changed(inputs, "k", (0, [17, 300]), math.nan)
    for lse in (inputs.lse, None):
        values, keys = reductions.topk_keys(inputs.q, inputs.k, lse, 4, backend=target.backend)
        assert keys[..., :2].tolist() == [[[[17, 300]] * 3]]
        assert bool(values[..., :2].isnan().all())
        assert bool(values[..., 2:].isfinite().all())


def test_an_lse_of_fewer_keys_gives_more_than_one(target: Target) -> None:
    # up to infinity, and never a wrapped exponent
    q = torch.full((1, 1, 1, 8), 1.0)
    k = torch.tensor([0.0, 10.0, 40.0]).view(1, 3, 1, 1).expand(1, 3, 1, 8).contiguous()
    lse = torch.tensor([[[0.0]]])
    o = {"softmax_scale": 1.0, "backend": target.backend}
    values, _ = reductions.topk_keys(q, k, lse, 3, **o)
    want = [math.inf, math.exp(80.0), 1.0]
    torch.testing.assert_close(values.flatten(), torch.tensor(want), rtol=1e-5, atol=0)
    sums = reductions.column_sums(q, k, lse, **o).flatten()
    torch.testing.assert_close(sums, torch.tensor(want[::-1]), rtol=1e-5, atol=0)


def test_blocks_of_any_size(target: Target) -> None:
    # a block far past the end is the whole matrix
    inputs = reduction_inputs(FlashCase(seqlen_q=50, seqlen_k=70, causal=True))
    q, k, o = inputs.q, inputs.k, {"causal": True, "backend": target.backend}
    for size in (1000, 1 << 40, (1 << 63) - 1):
        top = reductions.block_max(q, k, inputs.lse, size, size, **o)
        agree(target, top, reductions.block_max(q, k, inputs.lse, 50, 70, **o))


@pytest.mark.parametrize("rows", [1, 9])
def test_layouts_of_statistics(target: Target, rows: int) -> None:
    # an LSE, weights and cotangent with any strides, also of sizes that are 1
    inputs = reduction_inputs(FlashCase(seqlen_q=rows, seqlen_k=33, heads_q=4, heads_k=2))
    want = inputs.run(target.backend)
    turned = inputs.lse.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(*inputs.dmass.shape[:3], 2 * inputs.dmass.shape[3])[..., ::2]
    wide.copy_(inputs.dmass)
    same = torch.full((1, 1, 1), 0.5).expand(inputs.lse.shape)
    got = inputs.with_(lse=turned, dmass=wide, weights=same).run(target.backend)
    half = inputs.with_(weights=same.contiguous()).run(target.backend)
    want["weighted"] = half["weighted"]
    assert_same(got, want, exact=target.exact)


SHAPES: dict[str, dict[str, Any]] = {
    "square": {"seqlen_q": 150, "seqlen_k": 150, "causal": True},
    "one_head": {"batch": 1, "seqlen_q": 833, "seqlen_k": 500, "heads_q": 1, "heads_k": 1},
    "few_rows": {"batch": 1, "seqlen_q": 2, "seqlen_k": 5000, "heads_q": 4, "heads_k": 1},
    "window": {"batch": 1, "seqlen_q": 300, "seqlen_k": 300, "window": (31, 0)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_thread_count(level: Target, name: str, dtype: torch.dtype) -> None:
    case = {"heads_q": 4, "heads_k": 2, "alibi": "head", "softcap": 20.0, **SHAPES[name]}
    inputs = reduction_inputs(FlashCase(dtype=dtype, **case))
    torch.set_num_threads(1)
    want = everything(inputs, level.backend)
    for threads in (2, 3, 7, 16):
        torch.set_num_threads(threads)
        assert_same(everything(inputs, level.backend), want, f"{threads} threads")


@pytest.mark.parametrize("rows", [3, 130])
def test_batch_composition(target: Target, rows: int) -> None:
    inputs = reduction_inputs(FlashCase(batch=5, seqlen_q=rows, seqlen_k=140, heads_q=4, heads_k=2,
                                        causal=True))  # fmt: skip
    whole = inputs.run(target.backend)
    for b in (0, 3, 4):
        names = ("q", "k", "lse", "weights", "dmass")
        one = inputs.with_(**{n: getattr(inputs, n)[b : b + 1] for n in names})
        assert_same(one.run(target.backend), {n: x[b : b + 1] for n, x in whole.items()}, str(b),
                    exact=target.exact)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("side", ["q", "k", "lse", "weights", "boundaries", "dmass"])
def test_fenced_inputs(target: Target, side: str, dtype: torch.dtype) -> None:
    # NaN (or -1) on either side of each operand; margins unchanged, results the same
    inputs = reduction_inputs(FlashCase(seqlen_q=37, seqlen_k=61, heads_q=4, heads_k=2, head_dim=24,
                                        causal=True, alibi="batch", dtype=dtype))  # fmt: skip
    held = fenced(getattr(inputs, side))
    moved = inputs.with_(**{side: held.tensor})
    assert_same(everything(moved, target.backend), everything(inputs, target.backend), side,
                exact=target.exact)  # fmt: skip
    assert held.intact()


def outputs(inputs: ReductionInputs) -> list[tuple[str, Callable[..., Any], list[Tensor]]]:
    """(native operator, call with outputs in place, outputs of the right shape)."""
    q, k, lse = inputs.q, inputs.k, inputs.lse
    b, sq, hq, d = q.shape
    sk, n = k.shape[1], inputs.boundaries.numel() - 1
    tail = (None, None)
    scores = (d**-0.5, -1, 0, 0.0)
    op = torch.ops.attnforge_native
    f, i32, i64 = torch.float32, torch.int32, torch.int64
    empty = torch.empty
    weights, ends, dmass = inputs.weights, inputs.boundaries, inputs.dmass
    return [
        ("column_sums", lambda o: op.column_sums(q, k, lse, weights, *tail, o, *scores),
         [empty(b, hq, sk, dtype=f)]),
        ("span_mass", lambda o: op.span_mass(q, k, lse, ends, *tail, o, *scores),
         [empty(b, hq, sq, n, dtype=f)]),
        ("span_grad", lambda *o: op.span_grad(dmass, q, k, lse, ends, *tail, *o, *scores),
         [torch.empty_like(q), torch.empty_like(k), torch.empty_like(lse)]),
        ("block_max", lambda o: op.block_max(q, k, lse, 16, 24, *tail, o, *scores),
         [empty(b, hq, -(-sq // 16), -(-sk // 24), dtype=f)]),
        ("row_entropy", lambda o: op.row_entropy(q, k, lse, *tail, o, *scores),
         [empty(b, hq, sq, dtype=f)]),
        ("topk_keys", lambda *o: op.topk_keys(q, k, lse, 7, *tail, *o, *scores),
         [empty(b, hq, sq, 7, dtype=f), empty(b, hq, sq, 7, dtype=i32)]),
        ("edges", lambda *o: op.edges(q, k, lse, 0.001, *tail, *o, *scores),
         [empty(30, 4, dtype=i32), empty(30, dtype=f), empty((), dtype=i64)]),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fenced_outputs(level: Target, dtype: torch.dtype) -> None:
    # nothing is written beside an output, and edges stop at the room there is
    inputs = reduction_inputs(FlashCase(seqlen_q=37, seqlen_k=61, heads_q=4, heads_k=2, head_dim=24,
                                        causal=True, dtype=dtype))  # fmt: skip
    for name, call, made in outputs(inputs):
        held = [fenced(x) for x in made]
        call(*(f.tensor for f in held))
        for f in held:
            size = f.tensor.numel()
            room = (f.buffer.numel() - size) // 2
            assert torch.equal(
                f.buffer[:room].view(torch.uint8), f.snapshot[:room].view(torch.uint8)
            )
            assert torch.equal(f.buffer[room + size :].view(torch.uint8),
                               f.snapshot[room + size :].view(torch.uint8)), name  # fmt: skip
            if f.tensor.is_floating_point():
                assert not bool(f.tensor.isnan().any()), name


def test_memory_does_not_hold_the_matrix(cpu: str) -> None:
    # 2^17 keys and rows of one head: P would be 64 GiB; a window keeps the work small
    q = torch.randn(1, 1 << 17, 1, 8)
    o = {"window_size": (63, 0), "backend": cpu}
    lse = torch.full((1, 1, 1 << 17), 4.0)
    sums = reductions.column_sums(q, q, lse, **o)
    assert sums.shape == (1, 1, 1 << 17)
    top = reductions.block_max(q, q, lse, 1024, 1024, **o)
    assert int((top > 0).sum()) == 2 * 128 - 1
