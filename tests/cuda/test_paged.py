"""CUDA kernels of the paged family under the emulator: the cases of every other kernel of the
family (``tests/ops/test_paged_*.py``), and what only these kernels have."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge._params import PagedCache, PagedParams
from attnforge.backends.cuda import paged
from attnforge.testing.cases import Target
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.paged import CODES, PagedCase, PagedInputs, planned

pytestmark = pytest.mark.usefixtures("twin")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32, BF16, FP16 = DTYPES
NAMES = ["fp32", "bf16", "fp16"]


@pytest.fixture
def target() -> Target:
    """What the shared cases run on."""
    return Target("emulated")


def _cases(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"shared_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_bounds, _isolation = _cases("test_paged_bounds"), _cases("test_paged_isolation")
_append, _cascade = _cases("test_paged_append"), _cases("test_paged_cascade")
_plans = _cases("test_paged_plans")

test_page_sizes = _bounds.test_page_sizes
test_dtypes_and_layouts = _bounds.test_dtypes_and_layouts
test_groups = _bounds.test_groups
test_codes = _bounds.test_codes
test_codes_of_odd_dims = _bounds.test_codes_of_odd_dims
test_features = _bounds.test_features
test_splits = _bounds.test_splits
test_more_rows_than_keys = _bounds.test_more_rows_than_keys
test_unused_slots_and_pages = _isolation.test_unused_slots_and_pages
test_neighbours_change_nothing = _isolation.test_neighbours_change_nothing
test_a_nan_stays_in_its_request = _isolation.test_a_nan_stays_in_its_request
test_shared_pages = _isolation.test_shared_pages
test_values_of_append = _append.test_values
test_rotation_of_append = _append.test_rotation
test_page_bounds_of_append = _append.test_page_bounds
test_lengths_per_head_and_latent_append = _append.test_lengths_per_head_and_latent
test_cascade = _cascade.test_bounds
test_prefix_lengths = _cascade.test_prefix_lengths
test_any_plan = _plans.test_any_plan
test_one_piece_is_no_split = _plans.test_one_piece_is_no_split
test_new_numbers_in_the_same_tensors = _plans.test_new_numbers_in_the_same_tensors
test_plans_of_neighbours_change_nothing = _plans.test_neighbours_change_nothing
test_a_stale_plan_is_named = _plans.test_a_stale_plan_is_named
test_room_for_no_piece = _plans.test_room_for_no_piece
test_as_on_the_cpu = _plans.as_on_the_cpu
test_many_steps = _plans.many_steps
test_unchecked_numbers_of_a_plan = _plans.unchecked_numbers
test_unchecked_ranges_of_a_plan = _plans.unchecked_ranges
test_no_pieces = _plans.no_pieces
test_any_numbers_of_a_plan = _plans.any_numbers


def check(case: PagedCase, **more: Any) -> None:
    inputs = case.make()
    compare(inputs.forward("emulated", **more), inputs.truth(True), str(case)).check()


@pytest.mark.parametrize("code", ["", "int8"], ids=["plain", "codes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("d", "dv"), paged.HEAD_DIMS)
def test_every_kernel(d: int, dv: int, dtype: torch.dtype, code: str) -> None:
    # whole tiles, edges and tails; 2 rows of a group of 3 by warps, 23 by tiles
    check(PagedCase(lengths=(90, 71), rows=(2, 23), heads_q=3, heads_k=1, head_dim=d, v_head_dim=dv,
                    dtype=dtype, code=code, zeros=bool(code)))  # fmt: skip


@pytest.mark.parametrize("code", ["", *CODES])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=NAMES[1:])
def test_latent(dtype: torch.dtype, code: str) -> None:
    d, dv = paged.LATENT
    check(PagedCase(lengths=(70, 33), rows=(2, 1), heads_q=12, heads_k=1, head_dim=d, v_head_dim=dv,
                    latent=True, dtype=dtype, code=code, zeros=code.startswith("int")),
          num_splits=2)  # fmt: skip


@pytest.mark.parametrize("heads", [12, 40])
def test_latent_plans(heads: int) -> None:
    # 12 and 40 rows of the one KV head, which go to different launches
    d, dv = paged.LATENT
    check(PagedCase(lengths=(70, 0, 33), rows=(1,) * 3, heads_q=heads, heads_k=1, head_dim=d,
                    v_head_dim=dv, latent=True, dtype=BF16, sinks=True),
          split_plan=planned(((16, 40, 70), (), (33,)), 6))  # fmt: skip


def test_latent_values_apart() -> None:
    # refused by requires, with the reason, and selection goes on to what serves it
    d, dv = paged.LATENT
    inputs = PagedCase(heads_k=1, head_dim=d, v_head_dim=dv, dtype=BF16).make()
    text = r"paged_fwd.*512 is served where v_pages are a view of k_pages .* a tensor of their own"
    with pytest.raises(ValueError, match=text):
        inputs.forward("emulated")
    found = attnforge.explain(attnforge.paged_attention, inputs.q, inputs.k_pages, inputs.v_pages,
                              **inputs.options)  # fmt: skip
    rejected = {spec.id: why for spec, why in found.decisions[0].rejected}
    assert any("a view of k_pages" in x for x in rejected["emulated.paged.fwd.sm80"])
    assert found.chosen is not None
    compare(inputs.forward(found.chosen.id), inputs.truth(True)).check()


def raw(inputs: PagedInputs, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batched call past the checks of values, as on a GPU."""
    o = {**inputs.options, **more}
    cache = PagedCache(inputs.k_pages, inputs.v_pages, o["block_table"], o["cache_seqlens"])
    q = inputs.q
    p = PagedParams(None, None, None, None, q.shape[1], 0.2, -1, 0, 0.0)
    out = q.new_empty((*q.shape[:-1], inputs.v_pages.shape[-1]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    paged.fwd(q, cache, p, out, lse)
    return out, lse


@pytest.mark.parametrize("bad", [-1, -(1 << 31), 2147480000, 99999])
@pytest.mark.parametrize("rows", [1, 20])
def test_bad_page_ids_are_masked(bad: int, rows: int) -> None:
    # the keys of such a page are not there; other requests have the same bits
    inputs = PagedCase(lengths=(60, 30), rows=(rows, rows), page_size=8, dtype=BF16).make()
    ids = inputs.options["block_table"].clone()
    ids[0, 3] = bad
    out, lse = raw(inputs, block_table=ids)
    whole, whole_lse = raw(inputs)
    assert same_bits(out[1], whole[1])
    assert same_bits(lse[1], whole_lse[1])
    want = torch.empty_like(out)
    cache = PagedCache(inputs.k_pages, inputs.v_pages, ids, inputs.options["cache_seqlens"])
    p = PagedParams(None, None, None, None, rows, 0.2, -1, 0, 0.0)
    attnforge.reference.paged.forward(inputs.q, cache, p, want, torch.empty_like(lse))
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
    assert not same_bits(out[0], whole[0])


@pytest.mark.parametrize("length", [-5, 10_000])
def test_lengths_beyond_the_table(length: int) -> None:
    inputs = PagedCase(lengths=(40, 30), rows=(1, 1), page_size=8, dtype=BF16).make()
    inputs.options["block_table"][:, 5:] = 0  # all that there is room for
    lengths = inputs.options["cache_seqlens"].clone()
    lengths[0] = length
    got = raw(inputs, cache_seqlens=lengths)
    lengths[0] = max(0, min(length, 8 * inputs.options["block_table"].shape[1]))
    assert_same(dict(zip("ol", got, strict=True)),
                dict(zip("ol", raw(inputs, cache_seqlens=lengths), strict=True)))  # fmt: skip


@pytest.mark.parametrize("code", ["", "fp8"])
@pytest.mark.parametrize("rows", [3, 20], ids=["by warp", "by block"])
def test_hidden_values_that_are_not_finite(rows: int, code: str) -> None:
    # the last key is seen by the last row alone
    inputs = PagedCase(lengths=(40,), rows=(rows,), heads_q=2, heads_k=1, dtype=BF16,
                       code=code).make()  # fmt: skip
    want = inputs.forward("emulated")
    v = inputs.v_pages.clone()
    page = int(inputs.options["block_table"][0, 39 // 16])
    if code:
        v.view(torch.uint8)[page, 39 % 16, 0, 5] = 0x7F
    else:
        v[page, 39 % 16, 0, 5] = torch.inf
    got = inputs.with_(v_pages=v).forward("emulated")
    assert same_bits(got["out"][:, :-1].contiguous(), want["out"][:, :-1].contiguous())
    assert not got["out"][:, -1, :, 5].isfinite().any()
    assert got["out"][:, -1, :, :5].isfinite().all()
    assert_same({"lse": got["lse"]}, {"lse": want["lse"]})


def test_hidden_latent_values_that_are_not_finite() -> None:
    # one tile for K and V: a NaN takes part in scores as well
    d, dv = paged.LATENT
    inputs = PagedCase(lengths=(40,), rows=(3,), heads_q=2, heads_k=1, head_dim=d, v_head_dim=dv,
                       latent=True, dtype=BF16).make()  # fmt: skip
    want = inputs.forward("emulated")
    k = inputs.k_pages.clone()
    k[int(inputs.options["block_table"][0, 39 // 16]), 39 % 16, 0, 5] = torch.nan
    got = inputs.with_(k_pages=k, v_pages=k[..., :dv]).forward("emulated")
    assert same_bits(got["out"][:, :-1].contiguous(), want["out"][:, :-1].contiguous())
    assert got["out"][:, -1].isnan().all()
    assert got["lse"][..., -1].isnan().all()


@settings(max_examples=25)
@given(st.data())
def test_any_call(data: st.DataObject) -> None:
    def pick(*choices: Any) -> Any:
        return data.draw(st.sampled_from(choices))

    batch, heads_k = pick(1, 2, 3), pick(1, 2)
    rows = tuple(pick(0, 1, 2, 5, 17, 40) for _ in range(batch))
    check(PagedCase(
        lengths=tuple(pick(0, 1, 15, 16, 33, 64, 130) for _ in range(batch)), rows=rows,
        packed=True, page_size=pick(1, 4, 7, 16, 32), heads_k=heads_k,
        heads_q=heads_k * pick(1, 3, 8), head_dim=pick(8, 40, 64, 72), v_head_dim=pick(16, 64, 80),
        dtype=pick(*DTYPES), code=pick("", "", *CODES), scales=pick("head", "page", "token"),
        layout=pick("NHD", "HND"), strided=pick(False, True), causal=pick(False, True),
        window=pick((-1, -1), (9, 0), (20, 5)), softcap=pick(0.0, 4.0), alibi=pick(False, True),
        sinks=pick(False, True), seed=data.draw(st.integers(0, 9)),
    ), num_splits=pick(0, 1, 3))  # fmt: skip


def test_default_splits() -> None:
    check(PagedCase(lengths=(2100, 2048), rows=(1, 1), heads_q=2, heads_k=1, head_dim=16,
                    dtype=BF16, sinks=True))  # fmt: skip


def test_small_scales_in_fp16() -> None:
    # P times a scale below the least fp16 number
    inputs = PagedCase(lengths=(200,), rows=(1,), code="int8", dtype=FP16).make()
    k_scale, v_scale = inputs.options["kv_scales"]
    tiny = inputs.with_(kv_scales=(k_scale, v_scale * 2.0**-12))
    got, want = tiny.forward("emulated"), inputs.forward("emulated")
    assert torch.allclose(got["out"].double() * 2.0**12, want["out"].double(), rtol=1e-2, atol=1e-3)
