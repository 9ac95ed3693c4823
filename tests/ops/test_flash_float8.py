"""fp8 e4m3 inputs: every code, descales, mixed queries, NaN, against the float64 truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import compare

F8 = torch.float8_e4m3fn
CODES = torch.arange(256, dtype=torch.uint8).view(F8)


def check(case: FlashCase, target: Target) -> None:
    inputs = case.make()
    compare(inputs.forward(target.backend), inputs.truth(grad=False), inputs.context).check()


@pytest.mark.parametrize("rows", [1, 40])
def test_every_code_of_v_exactly(target: Target, rows: int) -> None:
    """One key: the output is its value, in decode and in the forward, subnormals and NaN too."""
    q, k = torch.zeros(1, rows, 1, 8, dtype=F8), torch.zeros(1, 1, 1, 8, dtype=F8)
    v = CODES.view(1, 1, 1, 256)
    descale = torch.full((1, 1), 2.0)
    out = attnforge.flash_attention(
        q, k, v, v_descale=descale, out_dtype=torch.float32, backend=target.backend
    )
    assert torch.equal(out.nan_to_num(-1.0), (2 * v.float()).nan_to_num(-1.0).expand_as(out))
    assert out.isnan().sum() == 2 * rows


@pytest.mark.parametrize("rows", [1, 40])
def test_every_code_of_q_and_k(target: Target, rows: int) -> None:
    """One key: the LSE is the logit. A query and a key with one element each, code by code."""
    for which in "qk":
        q, k = (torch.zeros(256, n, 1, 16, dtype=F8) for n in (rows, 1))
        wide = torch.ones(()).to(F8)
        q[..., 3] = CODES.view(-1, 1, 1) if which == "q" else wide
        k[..., 3] = CODES.view(-1, 1, 1) if which == "k" else wide
        v = torch.ones(256, 1, 1, 8, dtype=F8)
        _, lse = attnforge.flash_attention(
            q, k, v, softmax_scale=1.0, return_lse=True, backend=target.backend
        )
        want = CODES.float().view(-1, 1, 1).expand_as(lse)
        assert torch.allclose(lse, want, rtol=1e-6, atol=0, equal_nan=True), which


CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "mods": ("descale",)},
    "plain": {"mods": ()},
    "float32_out": {"mods": ("descale:b", "out:float32"), "window": (20, 5)},
    "float32_q": {"q_dtype": torch.float32, "head_dim": 40, "mods": ("descale:kv",)},
    "bfloat16_q": {"q_dtype": torch.bfloat16, "head_dim": 72, "mods": ("descale:kvone",)},
    "float16_q": {"q_dtype": torch.float16, "mods": ("descale:kv", "out:float32"), "softcap": 5.0},
    "rope": {"mods": ("descale", "rope:part", "row_scale")},
    "biases": {"mods": ("descale:one", "key_bias", "bias:w", "segments"), "sinks": "mixed"},
    "softplus": {"mods": ("descale", "score_fn:softplus", "dropout")},
    "sliced": {"mods": ("descale",), "layout": "offset"},
}


@pytest.mark.parametrize("name", CASES)
def test_forward(target: Target, name: str) -> None:
    check(FlashCase(**{"seqlen_q": 70, "seqlen_k": 131, "heads_q": 4, "dtype": F8, **CASES[name]}),
          target)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CASES if n != "float32_out"])
def test_decode(target: Target, name: str) -> None:
    for rows, dim in ((1, 64), (3, 24)):
        fields = {"head_dim": dim, "heads_q": 6, "dtype": F8, "used": (150, 37), **CASES[name]}
        check(FlashCase(seqlen_q=rows, seqlen_k=150, decode=True, **fields), target)


@pytest.mark.parametrize("mods", [("descale",), ("descale:b", "rope")])
def test_packed(target: Target, mods: tuple[str, ...]) -> None:
    lengths = ((40, 60), (3, 9), (0, 5), (7, 0), (65, 40))
    check(FlashCase(lengths=lengths, heads_q=4, dtype=F8, mods=mods, causal=True), target)


@st.composite
def cases(draw: st.DrawFn) -> FlashCase:
    heads_k = draw(st.integers(1, 3))
    decode = draw(st.booleans())
    return FlashCase(
        batch=draw(st.integers(1, 3)), heads_k=heads_k, heads_q=heads_k * draw(st.integers(1, 5)),
        seqlen_q=draw(st.integers(1, 4 if decode else 60)), seqlen_k=draw(st.integers(0, 140)),
        head_dim=8 * draw(st.integers(1, 17)), v_head_dim=8 * draw(st.integers(1, 17)), dtype=F8,
        q_dtype=draw(st.sampled_from([None, torch.bfloat16, torch.float32])), decode=decode,
        causal=draw(st.booleans()), mods=(draw(st.sampled_from(["descale:kv", "descale:kvb"])),),
    )  # fmt: skip


@settings(max_examples=25, suppress_health_check=list(settings().suppress_health_check))
@given(case=cases())
def _any_shape(target: Target, case: FlashCase) -> None:
    check(case, target)


def test_any_shape(target: Target) -> None:
    _any_shape(target)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_reaches_who_sees_it(target: Target, rows: int, which: str) -> None:
    """A hidden one nobody, a visible one every row: of V in its own column alone."""
    inputs = FlashCase(batch=1, seqlen_q=rows, seqlen_k=90, heads_q=2, heads_k=1, head_dim=80,
                       dtype=F8, mods=("out:float32",)).make()  # fmt: skip
    clean = inputs.with_(mask=(torch.arange(90) != 33).expand(1, 1, rows, 90))
    bad = (clean.k if which == "k" else clean.v).clone()
    bad.view(torch.uint8)[0, 33, 0, 5] = 0xFF
    hidden = clean.with_(**{which: bad})
    compare(hidden.forward(target.backend), clean.truth(grad=False), "hidden").check()
    out = hidden.with_(mask=None).forward(target.backend)["out"]
    column = torch.arange(80) == 5
    assert out[..., column].isnan().all()
    assert out[..., ~column].isnan().all() == (which == "k")
    assert out[..., ~column].isnan().any() == (which == "k")


def tensors(dtype: torch.dtype = F8) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, n, 2, 8).to(dtype) for n in (5, 7, 7))


ERRORS: dict[str, tuple[torch.dtype, dict[str, Any], str]] = {
    "wide": (torch.bfloat16, {"k_descale": torch.ones(2)}, "k_descale is given for a tensor of bf"),
    "shape": (F8, {"k_descale": torch.ones(3, 2)}, r"k_descale has shape \(3, 2\); want \[2\|1, 2"),
    "heads": (F8, {"v_descale": torch.ones(5)}, r"v_descale has shape \(5,\); want \[2\|1\]"),
    "out": (torch.float32, {"out_dtype": torch.bfloat16}, "out_dtype is torch.bfloat16 with k of"),
    "fp64": (F8, {"out_dtype": torch.float64}, "want float32, bfloat16 or float16"),
    "bias": (F8, {"bias": torch.ones(1, 1, 5, 7).to(F8)}, "want float32"),
    "sink_kv": (F8, {"sink_kv": (torch.ones(1, 2, 8), torch.ones(1, 2, 8))}, "sink_kv is given"),
    "grad": (F8, {"sinks": torch.ones(2, requires_grad=True)}, "sinks requires grad.*forward only"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusals(name: str) -> None:
    dtype, options, text = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=text):
        attnforge.flash_attention(*tensors(dtype), **options)


def test_no_gradient_of_fp8() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="q requires grad beside float8_e4m3fn k and v"):
        attnforge.flash_attention(q.float().requires_grad_(), k, v)
    with torch.no_grad():
        assert attnforge.flash_attention(q.float().requires_grad_(), k, v).dtype is torch.float32
    found = attnforge.explain(attnforge.flash_attention, q, k, v)
    served = {d.request.op: d.chosen is not None for d in found.decisions}
    assert served == {"flash_fwd": True, "flash_bwd": False}


def test_dtypes_of_outputs() -> None:
    q, k, v = tensors()
    for kind, want in ((F8, torch.bfloat16), (torch.float16, torch.float16)):
        assert attnforge.flash_attention(q.to(kind), k, v).dtype is want
        out = attnforge.flash_decode(q.to(kind), k, v, out_dtype=torch.float32)
        assert out.dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # leaves fp8 alone
        assert torch.equal(attnforge.flash_attention(q, k, v), attnforge.flash_attention(q, k, v))


def test_compiled_whole() -> None:
    q, k, v = tensors()
    descale = torch.full((2, 2), math.sqrt(0.5))

    def call(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attnforge.flash_attention(
            x, k, v, causal=True, k_descale=descale, out_dtype=torch.float32
        )
        return out

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), call(q))
