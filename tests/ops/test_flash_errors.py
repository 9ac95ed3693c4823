"""Refusals: one sentence with the function, the argument, what it got and what it wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnforge

T = torch.randn


def base() -> dict[str, Any]:
    return {"q": T(2, 5, 4, 16), "k": T(2, 7, 2, 16), "v": T(2, 7, 2, 8)}


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "group": ({"q": T(2, 5, 3, 16)}, ValueError, r"no multiple of KV heads; got 3 and 2"),
    "no_kv_heads": ({"k": T(2, 7, 0, 16), "v": T(2, 7, 0, 8)}, ValueError, "k has no heads"),
    "dtype_k": ({"k": T(2, 7, 2, 16).half()}, ValueError, "dtypes differ.*k float16"),
    "dtype_v": ({"v": T(2, 7, 2, 8).double()}, ValueError, "dtypes differ.*v float64"),
    "integers": ({n: torch.ones(2, 7, 2, 16, dtype=torch.int32) for n in "qkv"}, ValueError,
                 "q has dtype int32"),
    "fp8": ({n: T(2, 7, 2, 16).to(torch.float8_e5m2) for n in "qkv"}, ValueError,
            "q has dtype float8_e5m2"),
    "fp8_q": ({"q": T(2, 5, 4, 16).to(torch.float8_e4m3fn)}, ValueError, "dtypes differ"),
    "rank_q": ({"q": T(5, 4, 16)}, ValueError, "q has 3 dims.*flash_attention_varlen"),
    "rank_v": ({"v": T(2, 7, 2, 8, 1)}, ValueError, "v has 5 dims"),
    "head_dim": ({"k": T(2, 7, 2, 24)}, ValueError, "differ in head_dim; got 16 and 24"),
    "head_dim_0": ({"q": T(2, 5, 4, 0), "k": T(2, 7, 2, 0)}, ValueError, "head_dim is 0"),
    "v_head_dim_0": ({"v": T(2, 7, 2, 0)}, ValueError, "head_dim is 0"),
    "lengths": ({"v": T(2, 8, 2, 8)}, ValueError, "differ in length; got 7 and 8"),
    "v_heads": ({"v": T(2, 7, 4, 8)}, ValueError, "differ in heads; got 2 and 4"),
    "batch": ({"k": T(1, 7, 2, 16)}, ValueError, "batch sizes differ"),
    "device": ({"k": T(2, 7, 2, 16, device="meta")}, ValueError, "devices differ"),
    "no_tensor": ({"k": [1, 2]}, TypeError, "k must be a tensor; got list"),
    "none": ({"q": None}, TypeError, "q must be a tensor; got NoneType"),
    "window": ({"window_size": (-2, 0)}, ValueError, r"window_size is \(-2, 0\)"),
    "window_short": ({"window_size": (1,)}, ValueError, "window_size is"),
    "window_int": ({"window_size": 7}, ValueError, "window_size is 7"),
    "window_float": ({"window_size": (1.5, 0)}, ValueError, "window_size is"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    "softcap_nan": ({"softcap": float("nan")}, ValueError, "softcap is nan"),
    "softcap_inf": ({"softcap": float("inf")}, ValueError, "softcap is inf"),
    "softcap_kind": ({"softcap": "5"}, TypeError, "softcap must be a number"),
    "scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale is nan"),
    "scale_inf": ({"softmax_scale": float("inf")}, ValueError, "softmax_scale is inf"),
    "scale_tensor": ({"softmax_scale": [1.0]}, TypeError, "softmax_scale must be a number"),
    "alibi_shape": ({"alibi_slopes": T(3)}, ValueError, r"alibi_slopes has shape \(3,\)"),
    "alibi_batch": ({"alibi_slopes": T(3, 4)}, ValueError, "alibi_slopes has shape"),
    "alibi_grad": ({"alibi_slopes": T(4, requires_grad=True)}, ValueError, "requires grad"),
    "alibi_dtype": ({"alibi_slopes": torch.ones(4, dtype=torch.int64)}, ValueError, "int64"),
    "sinks_shape": ({"sinks": T(2)}, ValueError, r"sinks has shape \(2,\); want \[heads_q\]"),
    "sinks_dtype": ({"sinks": torch.ones(4, dtype=torch.int32)}, ValueError, "sinks has dtype"),
    "sinks_kind": ({"sinks": [0.0] * 4}, TypeError, "sinks must be a tensor"),
    "used_shape": ({"seqused_k": torch.ones(3, dtype=torch.int32)}, ValueError, "seqused_k has"),
    "used_dtype": ({"seqused_k": torch.ones(2, dtype=torch.int64)}, TypeError, "want int32"),
    "used_list": ({"seqused_k": [7, 7]}, TypeError, "seqused_k must be a tensor"),
    "used_value": ({"seqused_k": torch.tensor([7, 8], dtype=torch.int32)}, ValueError,
                   r"seqused_k\[1\] is 8"),
    "backend_kind": ({"backend": 3}, TypeError, "backend must be a string"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sentences(name: str) -> None:
    # section 7: error text contains op name, argument, got and wanted
    changes, kind, text = CASES[name]
    arguments = {**base(), **changes}
    q, k, v = (arguments.pop(n) for n in "qkv")
    with pytest.raises(kind, match=rf"^attnforge\.flash_attention: .*{text}") as caught:
        attnforge.flash_attention(q, k, v, **arguments)
    assert "want" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_keyword_and_positional_options() -> None:
    q, k, v = base().values()
    with pytest.raises(TypeError):
        attnforge.flash_attention(q, k, v, dropout=0.1)
    with pytest.raises(TypeError):
        attnforge.flash_attention(q, k, v, True)


def test_every_function_names_itself() -> None:
    q, k, v = base().values()
    with pytest.raises(ValueError, match=r"^attnforge\.flash_decode: q and k differ in head_dim"):
        attnforge.flash_decode(q, k[..., :8], v)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^attnforge\.flash_attention_varlen: q has 4 dims"):
        attnforge.flash_attention_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


@pytest.mark.parametrize("dims", [(12, 12), (264, 264), (16, 20), (576, 576), (512, 512)])
def test_head_dims_that_the_cpu_kernels_refuse(cpu: str, dims: tuple[int, int]) -> None:
    # check 26: the forced backend says why; without force the reference serves
    d, dv = dims
    q, k, v = T(1, 3, 1, d), T(1, 4, 1, d), T(1, 4, 1, dv)
    with pytest.raises(ValueError, match=r"cannot serve this call: cpu\.flash\.fwd: .*head_dim"):
        attnforge.flash_attention(q, k, v, backend=cpu)
    want = attnforge.flash_attention(q, k, v, backend="reference")
    assert torch.equal(attnforge.flash_attention(q, k, v), want)


def test_float64_is_for_the_reference(cpu: str) -> None:
    q = T(1, 3, 1, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype float64 is not served"):
        attnforge.flash_attention(q, q, q, backend=cpu)
    assert attnforge.flash_attention(q, q, q).dtype == torch.float64


def test_an_error_leaves_the_library_usable(backend: str) -> None:
    q, k, v = base().values()
    want = attnforge.flash_attention(q, k, v, backend=backend)
    with pytest.raises(ValueError, match="seqused_k"):
        attnforge.flash_attention(
            q, k, v, seqused_k=torch.tensor([99, 0], dtype=torch.int32), backend=backend
        )
    assert torch.equal(attnforge.flash_attention(q, k, v, backend=backend), want)
