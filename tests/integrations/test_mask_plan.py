"""Mask descriptions against the masks that they describe, in float64 on the reference backend."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge.integrations import _mask_run
from attnforge.integrations._mask_plan import Band, MaskSpec, plan_from_dense
from attnforge.integrations._mask_run import run_plan, run_spec

HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 8, 16
OPTIONS: dict[str, Any] = {"softmax_scale": None, "softcap": 0.0, "sinks": None}
# 40 keys, 20 roundings per sum and a softmax in float64: far below, and any wrong key far above.
TOLERANCE = 1e-13


def inputs(batch: int, q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64).transpose(1, 2)  # noqa: E731
    return (
        make(batch, HEADS, q_len, DIM),
        make(batch, KV_HEADS, kv_len, DIM),
        make(batch, KV_HEADS, kv_len, V_DIM),
    )


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """[B, Sq, Hq, Dv] by the definition; rows that see nothing are 0."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
    p = s.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def real_rows(spec: MaskSpec) -> Tensor:
    """[B, Sq] rows whose result matters: not the padding of a self-attention layer."""
    rows = torch.ones(spec.batch, spec.q_len, dtype=torch.bool)
    if spec.padding is not None and (spec.band.causal or spec.q_len == spec.kv_len):
        rows = spec.padding[:, int(spec.delta) : int(spec.delta) + spec.q_len]
    return rows


def check(spec: MaskSpec) -> None:
    q, k, v = inputs(spec.batch, spec.q_len, spec.kv_len)
    want = dense_attention(q, k, v, spec.dense())
    got = run_spec(q, k, v, spec, OPTIONS)
    rows = real_rows(spec)
    assert (got - want)[rows].abs().max() < TOLERANCE
    if spec.band.causal:
        assert not got[~rows].any()
    again = plan_from_dense(spec.dense(), spec.batch, spec.q_len, spec.kv_len)
    assert (run_plan(q, k, v, again, OPTIONS) - want).abs().max() < TOLERANCE


def padding(kv_len: int, *real: tuple[int, int]) -> Tensor:
    at = torch.arange(kv_len)
    return torch.stack([(at >= a) & (at < b) for a, b in real])


PADDED = {
    "none": None,
    "left": ((0, 20), (7, 20), (13, 20)),
    "right": ((0, 20), (0, 12), (0, 5)),
    "both": ((2, 18), (0, 20), (5, 6)),
    "same": ((4, 20), (4, 20), (4, 20)),
    "empty entry": ((0, 20), (20, 20), (3, 20)),
}
BANDS = (Band(True), Band(True, left=4), Band(True, left=0), Band(True, chunk=6))


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("pad", PADDED)
@pytest.mark.parametrize("q_len", [20, 6, 1], ids=["prefill", "chunk", "decode"])
@pytest.mark.parametrize("by_piece", [False, True], ids=["packed", "views"])
def test_causal_bands_with_padding(
    band: Band, pad: str, q_len: int, by_piece: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_mask_run, "_GATHER_BYTES", 0 if by_piece else 1 << 40)
    real = PADDED[pad]
    check(
        MaskSpec(
            batch=3,
            q_len=q_len,
            kv_len=20,
            band=band,
            delta=20 - q_len,
            padding=None if real is None else padding(20, *real),
            chunk_origin=torch.tensor([0, 7, 13]) if band.chunk and pad == "left" else None,
        )
    )


@pytest.mark.parametrize(("q_len", "delta"), list(product((1, 5), (0, 3, 15))))
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_static_cache_with_unused_slots(q_len: int, delta: int, band: Band) -> None:
    check(MaskSpec(2, q_len, 24, band, delta))
    check(MaskSpec(2, q_len, 24, band, delta, padding(24, (0, delta + q_len), (1, delta + q_len))))


@pytest.mark.parametrize("pad", PADDED)
@pytest.mark.parametrize("band", [Band(False), Band(False, 3, 3), Band(False, 5, 1)], ids=str)
def test_bidirectional_layers(pad: str, band: Band) -> None:
    real = PADDED[pad]
    check(MaskSpec(3, 20, 20, band, 0, None if real is None else padding(20, *real)))


def test_cross_attention() -> None:
    check(MaskSpec(3, 4, 20, Band(False), 0, padding(20, (0, 20), (0, 9), (3, 20))))


@pytest.mark.parametrize("q_len", [12, 4, 1])
def test_padding_between_tokens(q_len: int) -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1], [1] * 12]).bool()
    spec = MaskSpec(2, q_len, 12, Band(True), 12 - q_len, mask)
    q, k, v = inputs(2, q_len, 12)
    want = dense_attention(q, k, v, spec.dense())
    rows = real_rows(spec)
    assert (run_spec(q, k, v, spec, OPTIONS) - want)[rows].abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="padding between its tokens"):
        MaskSpec(2, q_len, 12, Band(True, left=3), 12 - q_len, mask).plan()


@pytest.mark.parametrize("band", [Band(True), Band(True, left=2), Band(False)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_sequences(band: Band, batch: int) -> None:
    ids = torch.tensor([[0] * 5 + [1] * 1 + [2] * 9 + [3] * 5, [0] * 20])[:batch]
    check(MaskSpec(batch, 20, 20, band, 0, segments=ids))


def test_position_ids_that_restart() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    spec = MaskSpec(1, 10, 10, Band(True))
    spec.split_at_restarts(positions)
    assert [(p.q0, p.q1) for p in spec.plan().pieces] == [(0, 3), (3, 5), (5, 10)]
    offset = MaskSpec(1, 10, 10, Band(True))
    offset.split_at_restarts(positions[:, :3].repeat(1, 1).new_tensor([[*range(5, 15)]]))
    assert offset.segments is None


def test_one_plan_serves_gradients_and_copies_nothing_when_uniform() -> None:
    spec = MaskSpec(2, 6, 20, Band(True), 14)
    assert spec.plan().uniform is not None
    assert spec.plan() is spec.plan()
    spec = MaskSpec(2, 20, 20, Band(True), 0, padding(20, (0, 20), (7, 20)))
    q, k, v = (x.detach().requires_grad_() for x in inputs(2, 20, 20))
    run_spec(q, k, v, spec, OPTIONS).sum().backward()
    got = q.grad, k.grad, v.grad
    q.grad = k.grad = v.grad = None
    (dense_attention(q, k, v, spec.dense()) * real_rows(spec)[..., None, None]).sum().backward()
    for a, b in zip(got, (q.grad, k.grad, v.grad), strict=True):
        assert (a - b).abs().max() < TOLERANCE  # type: ignore[operator]


def test_dense_interval_masks() -> None:
    q, k, v = inputs(2, 9, 9)
    at = torch.arange(9)
    causal = at <= at[:, None]
    prefix = causal | (at < 4)  # a bidirectional prefix
    ragged = torch.tensor([[3, 7], [0, 2], [5, 9], [5, 5], [1, 9], [1, 8], [0, 8], [4, 5], [2, 3]])
    jumps = (at >= ragged[:, :1]) & (at < ragged[:, 1:])
    for one in (causal, prefix, jumps, torch.zeros(9, 9, dtype=torch.bool)):
        for mask in (one.expand(1, 1, 9, 9), one.expand(2, 1, 9, 9)):
            want = dense_attention(q, k, v, mask)
            got = run_plan(q, k, v, plan_from_dense(mask, 2, 9, 9), OPTIONS)
            assert (got - want).abs().max() < TOLERANCE
            bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            assert plan_from_dense(bias, 2, 9, 9).pieces == plan_from_dense(mask, 2, 9, 9).pieces


def test_dense_masks_that_are_refused() -> None:
    holes = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    holes[..., 2, 3] = False
    with pytest.raises(ValueError, match=r"row 2 of batch entry 0 .* gaps"):
        plan_from_dense(holes, 1, 4, 6)
    with pytest.raises(ValueError, match="additive bias"):
        plan_from_dense(torch.full((1, 1, 4, 6), 0.5), 1, 4, 6)
    with pytest.raises(ValueError, match="2 heads"):
        plan_from_dense(torch.ones(1, 2, 4, 6, dtype=torch.bool), 1, 4, 6)
    with pytest.raises(ValueError, match="covers 5 keys"):
        plan_from_dense(torch.ones(1, 1, 4, 5, dtype=torch.bool), 1, 4, 6)
    with pytest.raises(ValueError, match="must be bool or floating"):
        plan_from_dense(torch.ones(1, 1, 4, 6, dtype=torch.long), 1, 4, 6)
    with pytest.raises(ValueError, match="does not fit"):
        plan_from_dense(torch.ones(3, 1, 4, 6, dtype=torch.bool), 2, 4, 6)


def test_descriptions_that_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 9 key slots"):
        MaskSpec(1, 4, 8, Band(True), 5).plan()
    with pytest.raises(ValueError, match="packed sequences"):
        MaskSpec(1, 4, 8, Band(True), 4, segments=torch.zeros(1, 4)).plan()
    with pytest.raises(ValueError, match="bidirectional window"):
        MaskSpec(1, 4, 9, Band(False, 2, 0), 0).plan()
