"""Problems of the flash family for tuning: inputs of a request, calls of a launcher, the proof.

Named by ``ops/_flash_ops.py`` and imported by a tuning run. Launchers are called directly, into
outputs that are allocated once: what is timed is the kernel, without the operator above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FlashGrads, FlashParams, FlashTape
from attnforge.ops import _flash_ops
from attnforge.registry.select import device_arch
from attnforge.registry.spec import Request
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare
from attnforge.testing.oracle import Truth

__all__ = ["FlashWorkload", "problems", "workload"]

# The proof is checked against float64 matrices. These lengths are no multiple of any tile and hold
# several tiles of the largest: 768 rows, and 8192 keys of a decode.
_PROOF_ROWS = 1003
_PROOF_KEYS = 9001
_FEW_ROWS = 8  # up to this many rows are a decode: a few rows need no keys dropped
_FEATURES = {"varlen", "seqused_k", "alibi", "sinks", "softcap", "window_left", "window_right"}
_SOFTCAP = 30.0  # the cap that models use; its size does not change the time


class FlashWorkload:
    """Inputs and outputs of one flash operator, and its launcher's way of being called."""

    def __init__(self, op: str, case: FlashCase, device: str) -> None:
        self.op, self.case, self.device = op, case, device
        self._inputs = case.make()
        q, k, v, dout = (
            x.to(device)
            for x in (self._inputs.q, self._inputs.k, self._inputs.v, self._inputs.dout)
        )
        self.p = self._params()
        self._call: Callable[[Callable[..., Any]], None]
        if op == "flash_bwd":
            self._backward(q, k, v, dout)
            return
        out, lse, low = _flash_ops.alloc_fwd(q, v)
        self.outputs = {"out": out, "lse": lse}
        if op == "flash_fwd":
            self._call = lambda launch: launch(q, k, v, self.p, out, lse, low)
        else:
            self._call = lambda launch: launch(q, k, v, self.p, out, lse, 0)

    def _params(self) -> FlashParams:
        o, case = self._inputs.options, self.case

        def tensor(name: str) -> Tensor | None:
            x = o.get(name)
            return None if x is None else x.to(self.device)

        rows = [case.seqlen_q] if case.lengths is None else [r for r, _ in case.lengths]
        keys = [case.seqlen_k] if case.lengths is None else [n for _, n in case.lengths]
        return FlashParams(
            tensor("cu_seqlens_q"),
            tensor("cu_seqlens_k"),
            tensor("cache_seqlens" if case.decode else "seqused_k"),
            tensor("alibi_slopes"),
            tensor("sinks"),
            max(rows),
            max(keys),
            case.head_dim**-0.5,
            case.window[0],
            0 if case.causal else case.window[1],
            case.softcap,
        )

    def _backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        out, lse, low = _flash_ops.flash_fwd(q, k, v, *self.p, True, None)
        tape = FlashTape(q, k, v, out, lse, low)
        grads: FlashGrads = _flash_ops.alloc_bwd(q, k, v, self.p, 0)
        self.outputs = {n: x for n, x in grads._asdict().items() if x.numel()}
        self._call = lambda launch: launch(dout, None, tape, self.p, grads)

    def run(self, launch: Callable[..., Any]) -> None:
        """One call of the launcher."""
        self._call(launch)

    @cached_property
    def _truth(self) -> Truth:
        return self._inputs.truth(grad=self.op == "flash_bwd")

    def wrong(self) -> str | None:
        """The results past their per-element error bound, or None."""
        report = compare({n: x.cpu() for n, x in self.outputs.items()}, self._truth)
        past = [f"{s.name} has {s.used:.3g} of its error bound" for s in report.stats
                if not s.used <= 1.0]  # fmt: skip
        return ", ".join(past) or None

    @cached_property
    def proof(self) -> FlashWorkload:
        """The same dims and features at lengths that float64 can check in full."""
        case = self.case
        few = case.seqlen_q <= _FEW_ROWS
        rows = min(case.seqlen_q, _PROOF_ROWS)
        keys = min(case.seqlen_k, _PROOF_KEYS if few else _PROOF_ROWS)
        group = case.heads_q // case.heads_k
        kv_heads = min(case.heads_k, 2 if group == 1 else 1)
        small = replace(
            case, batch=1, seqlen_q=rows, seqlen_k=keys, heads_q=group * kv_heads, heads_k=kv_heads
        )
        if case.lengths is not None:
            small = replace(small, lengths=((rows, keys), (rows // 3, keys // 3)))
        if case.used is not None:
            ends = (keys - keys // 7, keys // 5)
            small = replace(small, used=ends if case.lengths is not None else ends[:1])
        return FlashWorkload(self.op, small, self.device)


def workload(request: Request) -> FlashWorkload:
    """Inputs of the sizes, dims and features of ``request``.

    ValueError for features that no inputs are made for here: results of plain calls of such
    sizes do not hold for them.
    """
    if unknown := sorted(request.features - _FEATURES):
        raise ValueError(f"no inputs with {', '.join(unknown)}")
    size, used = dict(request.sizes), request.features
    group = request.dim("group") or 1
    head_dim, v_head_dim = request.dim("head_dim"), request.dim("v_head_dim")
    assert head_dim is not None
    batch, rows, keys = size["batch"], size["seqlen_q"], size["seqlen_k"]
    case = FlashCase(
        batch=batch,
        seqlen_q=rows,
        seqlen_k=keys,
        heads_q=size["heads"],
        heads_k=max(1, size["heads"] // group),
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=request.dtype,
        causal="window_right" in used,
        window=(size["window"] - 1 if "window_left" in used else -1, -1),
        softcap=_SOFTCAP if "softcap" in used else 0.0,
        alibi="head" if "alibi" in used else "",
        sinks="normal" if "sinks" in used else "",
        lengths=((rows, keys),) * batch if "varlen" in used else None,
        used=(keys,) * batch if "seqused_k" in used else None,
        decode=request.op == "flash_decode",
        lse_grad=False,
    )
    return FlashWorkload(request.op, case, request.device)


def problems(op: str) -> list[Request]:
    """What is tuned if nobody names problems: prefill and training, or decodes of a long cache."""
    kind, arch = device_arch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fp32, bf16 = torch.float32, torch.bfloat16

    def request(dtype: torch.dtype, dim: int, group: int, **sizes: int) -> Request:
        dims = (("head_dim", dim), ("v_head_dim", dim), ("group", group))
        full = {"batch": 1, "seqlen_q": 1, "seqlen_k": 1, "heads": 8, "window": 0, **sizes}
        causal = frozenset({"window_right"})
        return Request(op, kind, arch, dtype, dims, causal, sizes=tuple(full.items()))

    if op == "flash_decode":
        return [
            request(dtype, 128, 4, seqlen_k=keys, heads=32)
            for dtype in (bf16, fp32)
            for keys in (4096, 32768)
        ]
    lengths = (512, 2048) if op == "flash_bwd" else (512, 2048, 4096)
    return [
        request(dtype, 64, 1, seqlen_q=s, seqlen_k=s) for dtype in (fp32, bf16) for s in lengths
    ]
