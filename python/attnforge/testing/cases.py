"""Problems of the flash family: shapes, features and memory layouts, with inputs from a seed.

    case = FlashCase(seqlen_q=65, seqlen_k=130, causal=True, dtype=torch.bfloat16)
    compare(case.make().run("cpu"), case.make().truth()).check()

The ``repr`` of a case is its one-line reproduction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import attnforge
from attnforge.registry import tuned
from attnforge.testing import cases_mods, oracle
from attnforge.testing.oracle_mods import GRADS

__all__ = ["LAYOUTS", "FlashCase", "FlashInputs", "Layout", "Target", "place", "use_isa"]

Layout = Literal[
    "contiguous", "heads_first", "sliced", "offset", "last_stride_2", "wide_unit", "expanded"
]
LAYOUTS: tuple[Layout, ...] = (
    "contiguous",
    "heads_first",  # [B, H, S, D] in memory, as transposed projections leave it
    "sliced",  # every other row of a fused buffer, cut in heads and head_dim
    "offset",  # storage offset 1: a 16-bit tensor at an odd multiple of 2 bytes
    "last_stride_2",  # the layout that is copied
    "wide_unit",  # absurd strides of dimensions of size 1
    "expanded",  # stride 0 over the batch (varlen: over the heads)
)


class Target(NamedTuple):
    """What runs a case: a backend and, for ``cpu``, an ISA level ("" leaves it)."""

    backend: str
    isa: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend

    @property
    def rounded(self) -> bool | None:
        """Whether P is in 16 bits, as ``oracle.truth`` takes it: tensor cores multiply."""
        return None if self.backend in ("reference", "cpu") else True

    @property
    def exact(self) -> bool:
        """Whether results are the same bits in any layout and batch: all but the reference."""
        return self.backend != "reference"


@contextmanager
def use_isa(level: str) -> Iterator[str]:
    """Run a block on one ISA level of the CPU kernels, then go back; "" changes nothing.

    Choices of kernels and configs are made anew: results of tuning hold for one level.
    """
    if not level:
        yield ""
        return
    select = torch.ops.attnforge_native.cpu_isa
    before = select("")
    try:
        chosen = select(level)
        tuned.refresh()
        yield chosen
    finally:
        select(before)
        tuned.refresh()


def place(x: Tensor, layout: Layout) -> Tensor:
    """The values of ``x`` [.., S, H, D] in another memory layout, NaN wherever no element lies.

    ``"expanded"`` keeps the first batch entry (varlen: the first head) for all of them.
    """
    nan = float("nan")
    if layout == "contiguous":
        return x.contiguous()
    if layout == "heads_first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "expanded":
        return x[:1].expand_as(x) if x.dim() == 4 else x[:, :1].expand_as(x)
    if layout == "wide_unit":
        x = x.contiguous()
        strides = list(x.stride())
        for dim in range(x.dim() - 1):
            if x.shape[dim] == 1:
                strides[dim] = 1 << 41
        return x.as_strided(x.shape, strides)
    *batch, s, h, d = x.shape
    if layout == "sliced":
        buffer = x.new_full((*batch, 2 * s + 1, h + 2, d + 5), nan)
        view = buffer[..., 1::2, 1 : 1 + h, 3 : 3 + d][..., :s, :, :]
    elif layout == "offset":
        buffer = x.new_full((x.numel() + 1 + 64,), nan)
        view = buffer[1 : 1 + x.numel()].view(x.shape)
    else:
        buffer = x.new_full((*batch, s, h, 2 * d), nan)
        view = buffer[..., ::2]
    view.copy_(x)
    return view


def _to_device(x: Tensor, device: str) -> Tensor:
    """``x`` on a device with its strides, NaN where no element of it lies."""
    if device == "cpu":
        return x
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True) if n)
    if x.numel() == 0 or size > 64 * x.numel() + 4096:  # absurd strides of sizes of one
        return x.to(device)
    if not x.is_floating_point() or 0 in x.stride():  # an expanded copy overlaps itself
        return x.to(device)
    flat = torch.full((size,), float("nan"), dtype=x.dtype)
    flat.as_strided(x.shape, x.stride()).copy_(x)
    return flat.to(device).as_strided(x.shape, x.stride())


@dataclass(frozen=True)
class FlashInputs:
    """Tensors and keywords of one call, and the cotangents of its results."""

    call: Callable[..., Any]
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor | None
    context: str = ""
    device: str = "cpu"  # where the call runs; inputs and results are kept on the CPU

    def _moved(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v and the keywords on the device; the layouts of q, k, v are kept."""
        if self.device == "cpu":
            return self.q, self.k, self.v, dict(self.options)
        move = functools.partial(_to_device, device=self.device)
        options = {n: move(x) if isinstance(x, Tensor) else x for n, x in self.options.items()}
        if "rope" in options:
            options["rope"] = tuple(map(move, options["rope"]))
        return move(self.q), move(self.k), move(self.v), options

    def forward(self, backend: str | None = None, **more: Any) -> dict[str, Tensor]:
        """``{"out", "lse"}`` without gradients."""
        q, k, v, options = self._moved()
        with torch.no_grad():
            out, lse = self.call(q, k, v, **{**options, **more}, return_lse=True, backend=backend)
        return {"out": out.cpu(), "lse": lse.cpu()}

    def run(self, backend: str | None = None) -> dict[str, Tensor]:
        """``out lse dq dk dv``, and ``dsinks`` and the like of options that have a gradient.

        Layouts of the inputs are kept.
        """
        *tensors, options = self._moved()
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        wanted = [q, k, v]
        learned = [name for name in ("sinks", *GRADS) if options.get(name) is not None]
        for name in learned:
            options[name] = options[name].detach().requires_grad_()
            wanted.append(options[name])
        out, lse = self.call(q, k, v, **options, return_lse=True, backend=backend)
        outputs, cotangents = [out], [_to_device(self.dout, self.device)]
        if self.dlse is not None:
            outputs.append(lse)
            cotangents.append(self.dlse.to(self.device))
        grads = torch.autograd.grad(outputs, wanted, cotangents)
        results = [x.detach().cpu() for x in (out, lse, *grads)]
        names = ("out", "lse", "dq", "dk", "dv", *("d" + name for name in learned))
        return dict(zip(names, results, strict=True))

    def truth(self, grad: bool = True, rounded: bool | None = None) -> oracle.Truth:
        """The float64 truth of ``run`` (or of ``forward``); rounded: see ``oracle.truth``."""
        dout, dlse = (self.dout, self.dlse) if grad else (None, None)
        return oracle.truth(self.q, self.k, self.v, self.options, dout, dlse, rounded)

    def with_(self, **changes: Any) -> FlashInputs:
        """The same with other tensors (``q=``, ``k=`` ...) or keywords."""
        own = {n: changes.pop(n) for n in ("q", "k", "v", "dout", "dlse") if n in changes}
        return replace(self, **own, options={**self.options, **changes})


# Where cases run that do not say it: tests of GPU kernels put it on a GPU.
DEVICE = "cpu"


@dataclass(frozen=True)
class FlashCase:
    """A problem. Lengths of a varlen case are pairs (rows, keys) in ``lengths``.

    alibi: "" or "head" ([Hq]) or "batch" ([B, Hq]). sinks: "" or "normal", or "mixed", which
    has a -inf and a large one among them. used: seqused_k, or cache_seqlens of a decode. spread
    multiplies q, v_mean is added to v. layout, grad_layout: of q, k, v and of dout.
    q_dtype: of q beside fp8 k and v; None is theirs.
    mods: names of features of single scores, as ``cases_mods`` makes them.
    """

    batch: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 16
    v_head_dim: int | None = None
    dtype: torch.dtype = torch.float32
    q_dtype: torch.dtype | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Literal["", "head", "batch"] = ""
    sinks: Literal["", "normal", "mixed"] = ""
    used: tuple[int, ...] | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    decode: bool = False
    softmax_scale: float | None = None
    layout: Layout = "contiguous"
    grad_layout: Layout = "contiguous"
    spread: float = 1.0
    v_mean: float = 0.0
    lse_grad: bool = True
    mods: tuple[str, ...] = ()
    seed: int = 0
    device: str = ""  # where the call runs; "" is ``DEVICE``

    def make(self) -> FlashInputs:
        """Inputs of this case: standard normal values, the same on every machine."""
        g = torch.Generator().manual_seed(self.seed)
        dv = self.head_dim if self.v_head_dim is None else self.v_head_dim
        if self.lengths is None:
            batch: tuple[int, ...] = (self.batch,)
            rows, keys, count = self.seqlen_q, self.seqlen_k, self.batch
        else:
            batch, count = (), len(self.lengths)
            rows, keys = (sum(pair[side] for pair in self.lengths) for side in (0, 1))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        q = normal(*batch, rows, self.heads_q, self.head_dim) * self.spread
        k = normal(*batch, keys, self.heads_k, self.head_dim)
        v = normal(*batch, keys, self.heads_k, dv) + self.v_mean
        dout = normal(*batch, rows, self.heads_q, dv)
        dlse = normal(*batch, self.heads_q, rows)
        dtypes = (self.q_dtype or self.dtype, self.dtype, self.dtype)
        q, k, v = (
            place(x.to(dtype), self.layout) for x, dtype in zip((q, k, v), dtypes, strict=True)
        )
        dout = place(dout.to(self.dtype), self.grad_layout)
        stat = torch.float64 if self.dtype is torch.float64 else torch.float32

        options: dict[str, Any] = {
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
            "softmax_scale": self.softmax_scale,
        }
        if self.alibi:
            shape = (count, self.heads_q) if self.alibi == "batch" else (self.heads_q,)
            options["alibi_slopes"] = torch.rand(shape, generator=g) * 0.5
        if self.sinks:
            sinks = normal(self.heads_q).to(stat)
            if self.sinks == "mixed":
                sinks[::3] = -math.inf
                sinks[1::3] = 20.0
            options["sinks"] = sinks
        options |= cases_mods.options(
            self.mods,
            cases_mods.Sizes(None if self.lengths is not None else count, count, rows, keys,
                             self.heads_q, self.heads_k, self.head_dim),
            self.dtype, g,
        )  # fmt: skip
        if self.used is not None:
            name = "cache_seqlens" if self.decode else "seqused_k"
            options[name] = torch.tensor(self.used, dtype=torch.int32)
        call: Callable[..., Any] = attnforge.flash_attention
        if self.decode:
            call = attnforge.flash_decode
        elif self.lengths is not None:
            call = attnforge.flash_attention_varlen
            for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
                ends = torch.tensor([0, *(pair[side] for pair in self.lengths)])
                options[name] = ends.cumsum(0).to(torch.int32)
        lse_defined = options.get("score_fn") not in ("sigmoid", "relu", "softplus")
        cotangent = dlse.to(stat) if self.lse_grad and lse_defined else None
        device = self.device or DEVICE
        return FlashInputs(call, q, k, v, options, dout, cotangent, repr(self), device)
