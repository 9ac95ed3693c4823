"""Paged attention and writing pages in Triton, against float64 and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.testing.compare import assert_same, compare, same_bits
from attnforge.testing.paged import PagedCase, PagedInputs
from attnforge.testing.poison import Fenced, fenced

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(case: PagedCase, **more: Any) -> None:
    inputs = case.make()
    compare(inputs.forward("triton", **more), inputs.truth(rounded=True), str(case)).check()


@pytest.mark.parametrize("page_size", [1, 3, 16, 19, 64])
def test_page_sizes(page_size: int) -> None:
    check(PagedCase(lengths=(70, 1, 64, 0, 33), rows=(1,) * 5, page_size=page_size, head_dim=16,
                    heads_q=2))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_mixed_rows(dtype: torch.dtype, layout: str) -> None:
    """Decode, drafts and a prefill in one call: three launches."""
    check(PagedCase(lengths=(100, 47, 33, 7, 0), rows=(70, 1, 11, 0, 2), page_size=8, head_dim=24,
                    dtype=dtype, layout=layout, strided=True))  # fmt: skip


@pytest.mark.parametrize("group", [1, 3, 24])
@pytest.mark.parametrize("rows", [1, 7])
def test_groups(group: int, rows: int) -> None:
    check(PagedCase(lengths=(50, 20), rows=(rows, rows), heads_q=2 * group, head_dim=16))


@pytest.mark.parametrize(("code", "scales"), [
    ("fp8", "head"), ("fp8", "token"), ("int8", "head"), ("int8", "page"), ("int8", "token"),
    ("int4", "head"), ("int4", "page"), ("int4", "token"),
])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 9])
def test_codes(code: str, scales: str, rows: int) -> None:
    check(PagedCase(lengths=(45, 21), rows=(rows, rows), page_size=5, head_dim=40, v_head_dim=72,
                    code=code, scales=scales, zeros=code != "fp8" and scales != "head",
                    dtype=DTYPES[(rows + len(scales)) % 3], layout="HND", strided=True))  # fmt: skip


@pytest.mark.parametrize("options", [
    {"window": (20, 0)}, {"window": (5, 3), "causal": False}, {"causal": False}, {"softcap": 5.0},
    {"alibi": True}, {"sinks": True}, {"tree": True, "rows": (6, 6)},
    {"lengths": ((70, 3), (0, 41))},
    {"lengths": ((70, 3), (9, 41)), "code": "int8", "window": (9, 0), "sinks": True},
    {"rows": (5, 5), "lengths": (2, 0), "tree": True},
], ids=lambda o: "_".join(o))  # fmt: skip
def test_features(options: dict[str, Any]) -> None:
    check(PagedCase(**{"rows": (2, 2), "page_size": 4, **options}), num_splits=3)


@pytest.mark.parametrize("code", ["", "int8", "int4"])
def test_latent_pages(code: str) -> None:
    """576 channels, of which the first 512 are values: one read of a page serves both."""
    check(PagedCase(lengths=(40, 9), rows=(2, 2), heads_k=1, head_dim=576, v_head_dim=512,
                    latent=True, code=code, dtype=torch.bfloat16))  # fmt: skip


@pytest.mark.parametrize("num_splits", [0, 1, 3, 500])
def test_splits(num_splits: int) -> None:
    check(PagedCase(lengths=(150, 71, 2), rows=(1, 7, 1), head_dim=16), num_splits=num_splits)


def test_lengths_around_the_fixed_split() -> None:
    check(PagedCase(lengths=(2048, 2049, 4100), rows=(1,) * 3, head_dim=16, heads_q=1, heads_k=1,
                    page_size=64))  # fmt: skip


def alone(inputs: PagedInputs, b: int) -> PagedInputs:
    """One sequence of a packed call, in a table of just its pages."""
    o, ends = inputs.options, inputs.options["cu_seqlens_q"].tolist()
    length = int(o["cache_seqlens"][b])
    return inputs.with_(
        q=inputs.q[ends[b] : ends[b + 1]], cache_seqlens=o["cache_seqlens"][b : b + 1],
        block_table=o["block_table"][b : b + 1, : -(-length // inputs.case.page_size)],
        cu_seqlens_q=torch.tensor([0, ends[b + 1] - ends[b]], dtype=torch.int32),
    )  # fmt: skip


@pytest.mark.parametrize("num_splits", [0, 3])
def test_neighbours_change_nothing(num_splits: int) -> None:
    inputs = PagedCase(lengths=(90, 47, 2100, 7), rows=(70, 1, 1, 5), head_dim=16, heads_q=2,
                       heads_k=1, page_size=8, sinks=True).make()  # fmt: skip
    whole = inputs.forward("triton", num_splits=num_splits)
    ends = inputs.options["cu_seqlens_q"].tolist()
    for b in range(4):
        span = slice(ends[b], ends[b + 1])
        mine = {"out": whole["out"][span], "lse": whole["lse"][:, span]}
        assert_same(alone(inputs, b).forward("triton", num_splits=num_splits), mine, str(b))
    assert not whole["out"][ends[-1] :].any()
    assert (whole["lse"][:, ends[-1] :] == -torch.inf).all()


@pytest.mark.parametrize("bad", [-1, -(1 << 31), 2147480000, 99999])
def test_keys_of_missing_pages_are_hidden(bad: int) -> None:
    """The launcher alone, as on a GPU, where nobody looks at page ids before."""
    from attnforge._params import PagedCache, PagedParams
    from attnforge.backends.triton import paged
    from attnforge.reference import paged as reference

    for rows, size in ((1, 4), (20, 16)):
        inputs = PagedCase(lengths=(40, 40), rows=(rows, rows), page_size=size).make()
        o, table = inputs.options, inputs.options["block_table"].clone()
        table[0, 1] = bad
        found = []
        for launch in (paged.fwd, reference.forward):
            for ids in (table, o["block_table"]):
                cache = PagedCache(inputs.k_pages, inputs.v_pages, ids, o["cache_seqlens"])
                p = PagedParams(None, None, None, None, rows, 0.2, -1, -1, 0.0)
                out, lse = torch.empty_like(inputs.q), torch.empty(2, 4, rows)
                launch(inputs.q, cache, p, out, lse)
                found.append((out, lse))
        torch.testing.assert_close(found[0], found[2])
        assert all(same_bits(a[1], b[1]) for a, b in zip(found[0], found[1], strict=True))


def test_a_nan_stays_in_its_request() -> None:
    inputs = PagedCase(lengths=(40, 60, 20), rows=(1, 9, 1), head_dim=16, page_size=8).make()
    want = inputs.forward("triton")
    v = inputs.v_pages.clone()
    v[inputs.options["block_table"][1, 6].long(), 3, 1, 5] = float("nan")  # key 51: its own row
    got = inputs.with_(v_pages=v).forward("triton")
    assert same_bits(got["lse"], want["lse"])
    wrong = (got["out"] != want["out"]).nonzero()
    assert set(map(tuple, wrong.tolist())) == {(r, h, 5) for r in range(1, 10) for h in (2, 3)}


def moved(inputs: PagedInputs, fences: list[Fenced]) -> PagedInputs:
    """Every tensor of a call between fences of NaN (or -1)."""

    def move(x: Any) -> Any:
        if isinstance(x, tuple) and isinstance(x[0], Tensor):
            return tuple(map(move, x))
        if not isinstance(x, Tensor):
            return x
        fences.append(fenced(x))
        return fences[-1].tensor

    own = {n: move(getattr(inputs, n)) for n in ("q", "k_pages", "v_pages")}
    return inputs.with_(**own, **{n: move(x) for n, x in inputs.options.items()})


@pytest.mark.parametrize("case", [
    PagedCase(lengths=(33, 17), rows=(3, 20), head_dim=24, page_size=16, sinks=True, alibi=True),
    PagedCase(lengths=(32, 9), rows=(1, 1), head_dim=40, page_size=3, code="int4", scales="token",
              zeros=True, tree=True),
], ids=["plain", "codes"])  # fmt: skip
def test_reads_stay_inside_tensors(case: PagedCase) -> None:
    inputs = case.make()
    fences: list[Fenced] = []
    fencedin = moved(inputs, fences)
    assert_same(fencedin.forward("triton"), inputs.forward("triton"))
    assert all(f.intact() for f in fences)
