"""Refusals of the reductions: one sentence with the function, the argument, got and wanted."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import attnforge
from attnforge import reductions

T = torch.randn
CUT = torch.tensor([0, 3, 7], dtype=torch.int32)
CALLS: dict[str, tuple[Any, ...]] = {
    "column_sums": (),
    "span_mass": (CUT,),
    "block_max": (4, 4),
    "row_entropy": (),
    "topk_keys": (3,),
    "edges": (0.1, 100),
}


def operands() -> dict[str, Any]:
    return {"q": T(2, 5, 4, 16), "k": T(2, 7, 2, 16), "lse": T(2, 4, 5)}


COMMON: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": T(5, 4, 16)}, ValueError, "q has 3 dims"),
    "batch": ({"k": T(1, 7, 2, 16)}, ValueError, "batch sizes differ"),
    "group": ({"k": T(2, 7, 3, 16)}, ValueError, "no multiple of KV heads; got 4 and 3"),
    "head_dim": ({"k": T(2, 7, 2, 8)}, ValueError, "differ in head_dim; got 16 and 8"),
    "dtype": ({"k": T(2, 7, 2, 16).half()}, ValueError, "dtypes differ.*k float16"),
    "lse_shape": ({"lse": T(2, 5, 4)}, ValueError, r"lse has shape \(2, 5, 4\); want .*4, 5\)"),
    "lse_kind": ({"lse": 3.0}, TypeError, "lse must be a tensor; got float"),
    "lse_dtype": ({"lse": T(2, 4, 5).int()}, ValueError, "lse has dtype int32"),
    "window": ({"window_size": 7}, ValueError, "window_size is 7"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    "alibi": ({"alibi_slopes": T(3)}, ValueError, r"alibi_slopes has shape \(3,\)"),
    "used": ({"seqused_k": torch.tensor([7])}, TypeError, "seqused_k has dtype int64"),
    "used_value": ({"seqused_k": torch.tensor([7, 8], dtype=torch.int32)}, ValueError,
                   r"seqused_k\[1\] is 8"),
    "backend": ({"backend": 3}, TypeError, "backend must be a string"),
}  # fmt: skip


def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("name", COMMON)
def test_operands(function: str, name: str) -> None:
    changes, kind, text = COMMON[name]
    arguments = {**operands(), **changes}
    q, k, lse = (arguments.pop(n) for n in ("q", "k", "lse"))
    with pytest.raises(kind, match=rf"^attnforge\.reductions\.{function}: .*{text}") as caught:
        getattr(reductions, function)(q, k, lse, *CALLS[function], **arguments)
    assert "want" in str(caught.value)
    assert "\n" not in str(caught.value)


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


OWN: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "weights": ("column_sums", (), {"row_weights": T(2, 5, 4)}, ValueError, "row_weights has"),
    "spans_dtype": ("span_mass", (torch.tensor([0, 3]),), {}, TypeError, "boundaries has dtype"),
    "spans_shape": ("span_mass", (ends(3),), {}, ValueError, r"boundaries has shape \(1,\)"),
    "spans_list": ("span_mass", ([0, 3],), {}, TypeError, "boundaries must be a tensor; got list"),
    "spans_order": ("span_mass", (ends(0, 5, 3),), {}, ValueError, "decreases at entry 2; got 5"),
    "spans_end": ("span_mass", (ends(0, 8),), {}, ValueError, r"boundaries\[1\] is 8; got 7 keys"),
    "spans_start": ("span_mass", (ends(-1, 8),), {}, ValueError, r"boundaries\[0\] is -1"),
    "q_block": ("block_max", (0, 4), {}, ValueError, "q_block is 0; want an int >= 1"),
    "k_block": ("block_max", (4, 2.5), {}, TypeError, "k_block is 2.5; want an int >= 1"),
    "n": ("topk_keys", (0,), {}, ValueError, "n is 0; want an int >= 1"),
    "max_edges": ("edges", (0.1, -3), {}, ValueError, "max_edges is -3"),
    "threshold": ("edges", (-0.1, 10), {}, ValueError, "threshold is -0.1"),
    "threshold_nan": ("edges", (float("nan"), 10), {}, ValueError, "threshold is nan"),
    "threshold_kind": ("edges", ("0.1", 10), {}, TypeError, "threshold must be a number; got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_own_arguments(name: str) -> None:
    function, arguments, options, kind, text = OWN[name]
    with pytest.raises(kind, match=rf"^attnforge\.reductions\.{function}: .*{text}") as caught:
        getattr(reductions, function)(*operands().values(), *arguments, **options)
    assert "want" in str(caught.value)


def test_head_gradient() -> None:
    match = r"^attnforge\.reductions\.head_gradient: dout is \(2, 5, 4, 8\) .*want \(2, 5, 4, 16\)"
    with pytest.raises(ValueError, match=match):
        reductions.head_gradient(T(2, 5, 4, 8), T(2, 5, 4, 16))
    with pytest.raises(ValueError, match="out has shape"):
        reductions.head_gradient(T(5, 4, 8), T(5, 4, 8))


@pytest.mark.parametrize("function", CALLS)
def test_head_dims_that_the_cpu_kernels_refuse(cpu: str, function: str) -> None:
    q, k, lse = T(1, 3, 1, 12), T(1, 7, 1, 12), T(1, 1, 3)
    call = getattr(reductions, function)
    with pytest.raises(ValueError, match=rf"cpu\.reductions\.{function}: head_dim 12"):
        call(q, k, lse, *CALLS[function], backend=cpu)
    got, want = (call(q, k, lse, *CALLS[function], backend=b) for b in (None, "reference"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("function", CALLS)
def test_explain(function: str) -> None:
    # shapes instead of tensors, also for a device that is not there
    shapes = ((2, 5, 4, 16), (2, 7, 2, 16), (2, 4, 5))
    call = getattr(reductions, function)
    for device in ("cpu", "cuda:sm_90"):
        report = attnforge.explain(call, *shapes, *CALLS[function], dtype="bf16", device=device)
        ops = [d.request.op for d in report.decisions]
        assert ops[0] == f"reductions_{function}"
        assert len(ops) == (2 if function == "span_mass" else 1)
        assert report.chosen is not None
        on_gpu = "triton" if _triton_is_there() else "reference"
        assert report.chosen.backend == ("cpu" if device == "cpu" else on_gpu)
