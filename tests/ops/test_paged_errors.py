"""Arguments that do not fit: one sentence with operator, argument, value and what is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge
from attnforge.testing.paged import PagedCase

INT = torch.int32


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=INT)


@pytest.mark.parametrize(("change", "kind", "text"), [
    ({"kv_layout": "BHSD"}, ValueError, "kv_layout is 'BHSD'; want 'NHD'"),
    ({"k_pages": torch.zeros(3, 16, 2)}, ValueError, r"k_pages has shape \(3, 16, 2\)"),
    ({"k_pages": torch.zeros(9, 16, 32, 2).transpose(2, 3)}, ValueError, "k_pages has last stride"),
    ({"v_pages": torch.zeros(9, 8, 2, 32)}, ValueError, "k_pages and v_pages differ"),
    ({"v_pages": torch.zeros(9, 16, 2, 32).half()}, ValueError, "want one dtype and device"),
    ({"q": torch.zeros(2, 4, 32)}, ValueError, "q has 3 dims"),
    ({"q": torch.zeros(2, 1, 4, 32).half()}, TypeError, "the pages have dtype float32; want float"),
    ({"q": torch.zeros(2, 1, 4, 40)}, ValueError, "q and k_pages differ in head_dim; got 40 and"),
    ({"q": torch.zeros(2, 1, 5, 32)}, ValueError, "no multiple of KV heads; got 5 and 2"),
    ({"block_table": torch.zeros(2, 6)}, TypeError, "block_table has dtype float32; want int32"),
    ({"block_table": ints(1, 2)}, ValueError, r"block_table has shape \(2,\)"),
    ({"block_table": torch.zeros(3, 6, dtype=INT)}, ValueError, r"want \[2, max_pages\]"),
    ({"cache_seqlens": ints(1, 2, 3)}, ValueError, r"cache_seqlens has shape \(3,\)"),
    ({"cache_seqlens": ints(5, -1)}, ValueError, r"cache_seqlens\[1\] is -1; got a block_table"),
    ({"cache_seqlens": ints(200, 1)}, ValueError, r"cache_seqlens\[0\] is 200; got a block_table"),
    ({"kv_scales": (torch.ones(2),) * 2}, ValueError, "kv_scales is given with pages of float32"),
    ({"num_splits": -1}, ValueError, "num_splits is -1"),
    ({"split_plan": ints(0)}, TypeError, "split_plan is Tensor; want a pair"),
    ({"split_plan": (ints(0), ints(0, 1, 2))}, ValueError, r"has shapes \(1,\) and \(3,\); want"),
    ({"split_plan": (ints(0, 1, 0, 0, 70, 33).view(3, 2), ints(0, 1))}, ValueError, "3 or more"),
    *(({"split_plan": (ints(*pieces).view(3, -1), ints(*first))}, ValueError, text)
      for pieces, first, text in (
        ((0, 1, 0, 0, 70, 30), (0, 1, 2), r"cuts sequence 1 into pieces 1 .. 1: \[\(0, 30\)\]"),
        ((0, 1, 0, 0, 70, 34), (0, 1, 2), "want keys 0 .. 32 in ascending pieces"),
        ((0, 0, 1, 0, 40, 0, 39, 70, 33), (0, 2, 3), "cuts sequence 0"),
        ((0, 0, 1, 0, 40, 0, 41, 70, 33), (0, 2, 3), "cuts sequence 0"),
        ((0, 0, 1, 40, 0, 0, 70, 40, 33), (0, 2, 3), "cuts sequence 0"),
        ((1, 0, 0, 0, 33, 70), (0, 1, 2), "cuts sequence 0"),
        ((0, 1, 0, 0, 70, 33), (0, 1, 9), "cuts sequence 1 into pieces 1 .. 8"),
        ((0, 1, 0, 0, 70, 33), (-(1 << 31), 1, 2), "cuts sequence 0"),
        ((0, 1, 0, 0, 70, 33), (0, 0, 2), "cuts sequence 0 into pieces 0 .. -1"),
        ((0, 1, 0, 0, 70, 33), (1, 1, 2), "cuts sequence 0"),
      )),
    ({"window_size": (1, -2)}, ValueError, "window_size is"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"tree_mask": torch.ones(2, 3, 3).bool()}, ValueError, r"tree_mask is bool \(2, 3, 3\)"),
    ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \(3,\)"),
    ({"q": torch.zeros(2, 1, 4, 32, requires_grad=True)}, ValueError, "q requires grad"),
    ({"cu_seqlens_q": ints(0, 1, 2)}, ValueError, "q has 4 dims"),
    ({"q": torch.zeros(4, 4, 32), "cu_seqlens_q": ints(0, 3, 2)}, ValueError,
     "cu_seqlens_q decreases at entry 2"),
    ({"q": torch.zeros(4, 4, 32), "cu_seqlens_q": ints(0, 3, 9)}, ValueError,
     "cu_seqlens_q ends at 9; got 4 rows"),
    ({"q": torch.zeros(4, 4, 32), "cu_seqlens_q": ints(0, 4)}, ValueError,
     r"cu_seqlens_q has shape \(2,\); want \[batch \+ 1\] = \(3,\)"),
    ({"q": torch.zeros(4, 4, 32), "cu_seqlens_q": ints(0, 3, 4), "max_seqlen_q": 2}, ValueError,
     "max_seqlen_q is 2; got a sequence of 3"),
])  # fmt: skip
def test_attention(change: dict[str, Any], kind: type[Exception], text: str) -> None:
    inputs = PagedCase(lengths=(70, 33)).make()
    with pytest.raises(kind, match=r"attnforge\.paged_attention: .*" + text):
        inputs.with_(**change).forward("reference")


@pytest.mark.parametrize(("code", "change", "text"), [
    ("int8", {"kv_scales": None}, "kv_scales is missing; got int8 pages"),
    ("fp8", {"kv_zeros": (torch.zeros(2),) * 2}, "kv_zeros is given with fp8 pages"),
    ("int4", {"kv_scales": torch.ones(2)}, "kv_scales is Tensor; want a pair"),
    ("int4", {"kv_scales": (torch.ones(3),) * 2}, r"kv_scales\[0\] has shape \(3,\)"),
    ("int8", {"kv_scales": (torch.ones(2).double(),) * 2}, r"kv_scales\[0\] is float64"),
    ("int8", {"kv_zeros": (torch.zeros(11, 2),) * 2}, "scales and zeros differ in shape"),
])  # fmt: skip
def test_codes(code: str, change: dict[str, Any], text: str) -> None:
    inputs = PagedCase(lengths=(70, 33), code=code).make()
    assert inputs.k_pages.shape[0] == 11
    with pytest.raises((ValueError, TypeError), match=r"attnforge\.paged_attention: .*" + text):
        inputs.with_(**change).forward("reference")


@pytest.mark.parametrize(("change", "text"), [
    ({"cache_seqlens": ints(30, 0)}, "sequence 0 has 30 keys and gets 3; got a block_table"),
    ({"cache_seqlens": ints(0, -1)}, r"cache_seqlens\[1\] is -1"),
    ({"block_table": torch.tensor([[0, 1], [9, 3]], dtype=INT)}, r"block_table\[1, 0\] is 9"),
    ({"v": None}, "v and v_pages come apart"),
    ({"k": torch.zeros(2, 3, 1, 16)}, r"k has shape \(2, 3, 1, 16\)"),
    ({"k": torch.zeros(2, 3, 2, 16).half()}, "the pages have dtype float32; want float16 like k"),
    ({"rope": torch.zeros(1, 4, 8)}, "rope is Tensor; want a pair"),
    ({"rope": (torch.zeros(1, 4, 9),) * 2}, r"rope cos has shape \(1, 4, 9\)"),
    ({"positions": ints(1, 2)}, "positions or rope_interleaved is given without rope"),
    ({"page_min": torch.zeros(4, 2, 16)}, "page_max must be a tensor"),
    ({"page_min": torch.zeros(4, 2, 8), "page_max": torch.zeros(4, 2, 8)}, "page_min is float32"),
    ({"k": torch.zeros(2, 3, 2, 16, requires_grad=True)}, "k requires grad"),
])  # fmt: skip
def test_append(change: dict[str, Any], text: str) -> None:
    call: dict[str, Any] = {
        "k": torch.zeros(2, 3, 2, 16), "v": torch.zeros(2, 3, 2, 16),
        "k_pages": torch.zeros(4, 16, 2, 16), "v_pages": torch.zeros(4, 16, 2, 16),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=INT), "cache_seqlens": ints(0, 5),
        **change,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=r"attnforge\.paged_append: .*" + text):
        attnforge.paged_append(**call)


def test_bits_are_a_tree_mask(backend: str) -> None:
    inputs = PagedCase(lengths=(70, 33), rows=(5, 5), tree=True).make()
    mask = inputs.options["tree_mask"]
    bits = (mask.long() << torch.arange(5)).sum(-1)
    want = inputs.forward(backend)
    assert torch.equal(inputs.with_(tree_mask=bits).forward(backend)["out"], want["out"])
