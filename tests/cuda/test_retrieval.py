"""CUDA attention to listed keys under the emulator: values and gradients within the bounds of
float64, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attnforge._params import IndexedParams
from attnforge.backends import _gpu
from attnforge.backends.cuda import block_sparse, retrieval
from attnforge.reference import retrieval as reference
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.retrieval import IndexedCase, IndexedInputs

pytestmark = pytest.mark.usefixtures("twin")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = IndexedCase(batch=1, keys=60, entries=40, head_dim=24, v_head_dim=40)


def bounded(inputs: IndexedInputs, gradients: bool = False) -> dict[str, torch.Tensor]:
    got = inputs.run("emulated") if gradients else inputs.forward("emulated")
    compare(got, inputs.truth(gradients, rounded=True), str(inputs.case)).check()
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("d", "dv"), block_sparse.HEAD_DIMS)
def test_every_kernel(d: int, dv: int, dtype: torch.dtype) -> None:
    """Both ways: rows and entries fill a tile of the backward, and begin another one."""
    case = replace(SMALL, heads_q=2, heads_k=1, head_dim=d, v_head_dim=dv, dtype=dtype)
    bounded(replace(case, lists="kv", rows=35, entries=70, order="any").make(), gradients=True)


@pytest.mark.parametrize("lists", ["one", "kv", "query"])
@pytest.mark.parametrize("order", ["rising", "any"])
def test_lists(lists: str, order: str) -> None:
    """20 rows of a KV head or 10 of a query head, in tiles of 16."""
    case = replace(SMALL, lists=lists, order=order, rows=10, bias=order == "any")
    bounded(case.make(), gradients=True)


@pytest.mark.parametrize(("page_size", "layout"), [(1, "NHD"), (16, "HND"), (3, "HND")])
def test_pages(page_size: int, layout: str) -> None:
    case = replace(SMALL, batch=2, page_size=page_size, layout=layout, used=(60, 23))
    bounded(case.make())


def test_pages_that_are_not_there_hide_their_keys() -> None:
    inputs = replace(SMALL, page_size=4, used=(60,), lists="kv", rows=2).make()
    k, v, o = inputs.paged()
    k, v = k.nan_to_num(0.2), v.nan_to_num(0.2)
    o["block_table"][0, :5] = torch.tensor([99, -1, 1 << 20, 3, 15])
    p = IndexedParams(o["ids"], o["lens"], None, o["block_table"], o["cache_seqlens"], 0.2)
    results = []
    for forward in (retrieval.indexed_fwd, reference.forward):
        out, lse = torch.empty_like(inputs.dout), torch.empty_like(inputs.dlse)
        forward(inputs.q, k, v, p, out, lse, out.new_empty(0))
        results.append((out, lse))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entries", [16, 17, 48, 90])
def test_splits(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """Short splits and few of them; room behind a list and neighbours change no bit."""
    monkeypatch.setattr(_gpu, "ENTRIES", 16)
    monkeypatch.setattr(_gpu, "PARTS", 3)
    inputs = replace(SMALL, batch=2, keys=99, entries=entries, rows=2, order="any").make()
    got = bounded(inputs)
    ids, bias = inputs.options["ids"], inputs.options["log_bias"]
    room = (*ids.shape[:2], 40)
    wide = inputs.with_(ids=torch.cat([ids, ids.new_full(room, 3)], -1),
                        log_bias=torch.cat([bias, bias.new_full(room, math.nan)], -1))  # fmt: skip
    assert_same(wide.forward("emulated"), got)
    one = {name: x[1:].contiguous() for name, x in inputs.options.items()}
    single = inputs.with_(q=inputs.q[1:], k=inputs.k[1:], v=inputs.v[1:], **one)
    assert_same(single.forward("emulated"), {name: x[1:] for name, x in got.items()})


def test_keys_in_use_and_neighbours() -> None:
    """Gradients of a sequence are the same bits in any batch and with any room behind its lists."""
    case = replace(SMALL, batch=2, heads_q=3, heads_k=3, keys=30, used=(30, 17), order="any")
    inputs = case.make()
    got = bounded(inputs, gradients=True)
    ids, bias = inputs.options["ids"], inputs.options["log_bias"]
    room = (*ids.shape[:2], 40)
    wide = inputs.with_(ids=torch.cat([ids, ids.new_full(room, 3)], -1),
                        log_bias=torch.cat([bias, bias.new_full(room, math.nan)], -1))  # fmt: skip
    found = wide.run("emulated")
    found["dlog_bias"] = found["dlog_bias"][..., : ids.shape[2]]
    assert_same(found, got)
    one = {name: x[1:].contiguous() for name, x in inputs.options.items()}
    single = inputs.with_(q=inputs.q[1:], k=inputs.k[1:], v=inputs.v[1:], dout=inputs.dout[1:],
                          dlse=inputs.dlse[1:], **one)  # fmt: skip
    assert_same(single.run("emulated"), {name: x[1:] for name, x in got.items()})


@pytest.mark.parametrize("what", ["rows", "entries"])
def test_gradients_of_nothing(what: str) -> None:
    inputs = replace(SMALL, rows=0 if what == "rows" else 2).make()
    if what == "entries":
        none = {name: inputs.options[name][..., :0] for name in ("ids", "log_bias")}
        inputs = inputs.with_(**none, lens=None)
    for name, x in inputs.run("emulated").items():
        assert name == "lse" or not x.any(), name


def test_the_forward_of_a_backward() -> None:
    """A 16-bit forward leaves the second part of its output to the backward."""
    inputs = replace(SMALL, dtype=torch.bfloat16, rows=3).make()
    o = inputs.options
    lists = (o["ids"], o["lens"], o["log_bias"], None, None, SMALL.head_dim**-0.5)
    out, _, low = torch.ops.attnforge.indexed_fwd(
        inputs.q, inputs.k, inputs.v, *lists, True, "emulated"
    )
    truth = inputs.truth(gradients=False, rounded=True)
    exact = out.double() + low.double()
    assert float((exact - truth.values["out"]).abs().max()) < 2e-2
    assert bool(low.any())


def test_nothing_listed_and_large_biases() -> None:
    inputs = SMALL.make()
    got = inputs.with_(ids=torch.full_like(inputs.options["ids"], -1)).run("emulated")
    assert (got.pop("lse") == -math.inf).all()
    for name, x in got.items():
        assert not x.any(), name
    bounded(inputs.with_(log_bias=40 * inputs.options["log_bias"]), gradients=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_listed_nan_reaches_its_lists_alone(value: float) -> None:
    inputs = replace(SMALL, bias=False, heads_q=4, heads_k=1, keys=24).make()
    k, v = inputs.k.nan_to_num(0.1), inputs.v.nan_to_num(0.1)
    ids = torch.arange(24, dtype=torch.int32).view(6, 4).T.contiguous().unsqueeze(0)
    clean = inputs.with_(k=k, v=v, ids=ids, lens=None).forward("emulated")
    v = v.clone()
    v[:, 21, 0, 3] = value  # of head 1, in the last tile
    dirty = inputs.with_(k=k, v=v, ids=ids, lens=None).forward("emulated")
    hit = dirty["out"][0, :, 1]
    assert not bool(hit[:, 3].isfinite().any())
    assert bool(hit[:, 4:].isfinite().all())
    others = [0, 2, 3]
    assert torch.equal(dirty["out"][:, :, others], clean["out"][:, :, others])


def test_keys_of_other_heads_do_not_leak_into_gradients() -> None:
    inputs = replace(SMALL, bias=False, heads_q=4, heads_k=1, keys=24).make()
    k, v = inputs.k.nan_to_num(0.1), inputs.v.nan_to_num(0.1)
    ids = torch.arange(24, dtype=torch.int32).view(6, 4).T.contiguous().unsqueeze(0)
    inputs = inputs.with_(k=k, v=v, ids=ids, lens=None)
    clean = inputs.run("emulated")
    k, v = k.clone(), v.clone()
    k[:, 1::4], v[:, 1::4] = math.nan, math.inf  # keys of head 1
    dirty = inputs.with_(k=k, v=v).run("emulated")
    others = [0, 2, 3]
    assert torch.equal(dirty["dq"][:, :, others], clean["dq"][:, :, others])
    for name in ("dk", "dv"):
        for key in others:
            assert torch.equal(dirty[name][:, key::4], clean[name][:, key::4])
