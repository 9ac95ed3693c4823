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

pytestmark = pytest.mark.thinned(3)

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
    check(PagedCase(lengths=(80, 47, 33, 7, 0), rows=(66, 1, 11, 0, 2), page_size=8, head_dim=24,
                    heads_q=2, heads_k=1, dtype=dtype, layout=layout, strided=True))  # fmt: skip


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
    dtype = DTYPES[(rows + len(scales)) % 3]
    check(PagedCase(lengths=(45, 21), rows=(rows, rows), page_size=5, head_dim=40, v_head_dim=72,
                    code=code, scales=scales, zeros=code != "fp8" and scales != "head",
                    dtype=dtype, layout="HND", strided=True))  # fmt: skip


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


HEADS, DIM, DV = 3, 24, 40


def pools(count: int, size: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """K and V pages of 77 or NaN, in larger buffers of them."""
    found = []
    for n, dim in enumerate((DIM, DV)):
        width = dim // 2 if dtype is torch.uint8 else dim
        shape = (count, size + n, HEADS, width + 8)
        room = torch.full(shape, 77 if dtype.itemsize == 1 else torch.nan).to(dtype)
        x = room[:, :size, :, 4 : 4 + width]
        found.append(x.transpose(1, 2) if layout == "HND" else x)
    return found[0], found[1]


def assert_written_alike(
    size: int,
    dtype: torch.dtype,
    lengths: Any,
    k: Tensor,
    v: Tensor,
    layout: str = "NHD",
    **options: Any,
) -> None:
    """Every slot and bound as the reference leaves it, those that nobody writes among them."""
    batch = len(lengths)
    width = -(-40 // size)
    table = torch.randperm(batch * width).view(batch, width).to(torch.int32)
    found = []
    for backend in ("triton", "reference"):
        held = pools(batch * width, size, dtype, layout)
        low = torch.full((batch * width, HEADS, DIM), torch.nan)
        attnforge.paged_append(
            k, v, *held, block_table=table, cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
            kv_layout=layout, backend=backend, page_min=low, page_max=(high := low.clone()),
            **options,
        )  # fmt: skip
        found.append((*(x.contiguous() for x in held), low, high))
    for got, want in zip(*(f[:2] for f in found), strict=True):
        assert same_bits(*(x.view(torch.uint8) if x.dtype.itemsize == 1 else x
                           for x in (got, want)))  # fmt: skip
    torch.testing.assert_close(found[0][2:], found[1][2:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(("size", "layout"), [(1, "NHD"), (5, "HND"), (16, "NHD")])
def test_append(dtype: torch.dtype, size: int, layout: str) -> None:
    rows, options = (7, 9, 0, 1), {}
    k, v = (torch.randn(sum(rows) + 2, HEADS, d).to(DTYPES[size % 3]) for d in (DIM, DV))
    if dtype.itemsize == 1:
        per = {1: (HEADS,), 5: (4 * 8, 5, HEADS), 16: (4 * 3, HEADS)}[size]
        k *= 4
        v[2, 1, 3], v[3, 0, 2], v[4, 0, 3], v[5, 1, :4] = torch.nan, 3e4, -torch.inf, 0.001
        options["kv_scales"] = (torch.rand(per) * 0.1 + 0.01, torch.rand(per) * 0.1 + 0.01)
        if dtype is not torch.float8_e4m3fn and size > 1:
            options["kv_zeros"] = (torch.rand(per) * 4, torch.rand(per) * 4)
    else:
        k, v = k.to(dtype), v.to(dtype)
        v[2, 1, 3] = k[9, 1, 3] = torch.nan  # of a page's last key and of a later one
    ends = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    assert_written_alike(size, dtype, (5, 0, 14, 3), k, v, layout, cu_seqlens=ends, **options)


@pytest.mark.parametrize("per_head", [False, True])
def test_append_of_batches(per_head: bool) -> None:
    lengths = ((0, 5, 2), (7, 3, 1)) if per_head else (3, 30)
    new = torch.randn(2, 6, 2, HEADS, DV)
    k, v = new[:, :, 0, :, :DIM], new[:, :, 1]
    assert_written_alike(4, torch.float32, lengths, k, v)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_append_turns_keys(interleaved: bool, own_positions: bool, heads: int) -> None:
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    k = torch.randn(2, 5, HEADS, DIM)
    cos, sin = (torch.rand(heads, 9, 8) * 2 - 1 for _ in range(2))
    found = []
    for backend in ("triton", "reference"):
        pages = torch.zeros(6, 4, HEADS, DIM)
        attnforge.paged_append(
            k, None, pages, None, block_table=table, rope=(cos, sin), rope_interleaved=interleaved,
            cache_seqlens=torch.tensor([0, 6], dtype=torch.int32), backend=backend,
            positions=torch.arange(-2, 8, dtype=torch.int32).view(2, 5) if own_positions else None,
        )  # fmt: skip
        found.append(pages)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_token_by_token_leaves_the_same_bounds() -> None:
    k = torch.randn(1, 11, HEADS, DIM)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    found = []
    for step in (1, 3, 11):
        pages, low = torch.zeros(3, 4, HEADS, DIM), torch.full((3, HEADS, DIM), torch.nan)
        high = low.clone()
        for first in range(0, 11, step):
            attnforge.paged_append(
                k[:, first : first + step], None, pages, None, block_table=table, page_min=low,
                cache_seqlens=torch.tensor([first], dtype=torch.int32), page_max=high,
                backend="triton",
            )  # fmt: skip
        found.append((low, high))
    assert torch.equal(found[0][0][2], k[0, :4].amin(0))
    assert all(same_bits(*x) for f in found[1:] for x in zip(found[0], f, strict=True))


@pytest.mark.parametrize("options", [
    {}, {"dtype": torch.bfloat16, "rows": (3, 1, 9, 0, 2, 5)}, {"sinks": True, "softcap": 6.0},
    {"code": "int8", "layout": "HND", "strided": True},
    {"heads_q": 20, "heads_k": 1, "rows": (12,) * 6},
], ids=lambda o: "_".join(o) or "plain")  # fmt: skip
def test_cascade(options: dict[str, Any]) -> None:
    groups, lens = [0, 3, 3, 4, 6], [48, 32, 0, 16]
    base: dict[str, Any] = {"lengths": (60, 90, 65, 30, 28, 110), "rows": (1,) * 6, "head_dim": 16}
    inputs = PagedCase(**{**base, **options}).make()
    table = inputs.options["block_table"].clone()
    for g, length in enumerate(lens):
        if groups[g] < groups[g + 1]:
            table[groups[g] : groups[g + 1], : length // 16] = table[groups[g], : length // 16]
    inputs = inputs.with_(block_table=table)
    rest = {n: x for n, x in inputs.options.items() if n not in ("causal", "window_size")}
    out, lse = attnforge.cascade_attention(
        inputs.q, inputs.k_pages, inputs.v_pages, return_lse=True, backend="triton",
        cu_groups=torch.tensor(groups, dtype=torch.int32),
        prefix_lens=torch.tensor(lens, dtype=torch.int32), **rest,
    )  # fmt: skip
    compare({"out": out, "lse": lse}, inputs.truth(rounded=True)).check()
