"""Benchmark cases of the `flash` family: the speed table, its peers, and sweeps over length.

Every implementation gets the layout that suits it: attnforge `[B, S, H, D]`, torch's
`scaled_dot_product_attention` contiguous `[B, H, S, D]`. Nobody is timed while it transposes.

Errors are against float64 from the same rounded inputs: some query rows of the first and the last
KV head for a forward, all rows of the first KV head for gradients (float64 for everything would
take longer than the benchmark).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import attnforge
from attnforge.ops import flash as flash_op
from attnforge.testing import oracle
from attnforge.testing.bench import QUICK_REPEATS, REPEATS, Case, ErrorStat, Goal, Workload
from attnforge.testing.oracle import Truth

__all__ = [
    "PEERS",
    "Shape",
    "Tensors",
    "build",
    "make_inputs",
    "measure_errors",
    "runner_bhsd",
    "runner_bshd",
    "sweep",
    "table",
    "work",
]

Mode = Literal["forward", "train", "decode"]

_DTYPE_NAME = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SWEEP_REPEATS = 7
_ERROR_ROWS = 16  # query rows per sampled slice
# Gradients in float64 hold about ten [S, S] matrices: 1.3 GB at 4096.
_ERROR_MAX_TRAIN_SEQ = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention problem. `window` counts visible keys including the query's own; 0 is none."""

    mode: Mode
    dtype: torch.dtype
    batch: int = 1
    q_len: int = 2048
    kv_len: int = 2048
    q_heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = False
    window: int = 0
    device: str = "cpu"

    @property
    def window_size(self) -> tuple[int, int]:
        return (self.window - 1, 0) if self.window else (-1, -1)

    @property
    def name(self) -> str:
        mask = "window" if self.window else "causal" if self.causal else "full"
        if self.mode == "decode":
            parts = ["decode", _DTYPE_NAME[self.dtype], f"h{self.q_heads}-{self.kv_heads}"]
        else:
            parts = [self.mode, mask, _DTYPE_NAME[self.dtype]]
        return "-".join([*parts, f"s{self.kv_len}", f"d{self.head_dim}"])

    @property
    def title(self) -> str:
        dtype = _DTYPE_NAME[self.dtype]
        if self.mode == "decode":
            return (
                f"{dtype} decode {self.q_heads}q/{self.kv_heads}kv "
                f"{self.kv_len} keys D{self.head_dim}"
            )
        what = "forward" if self.mode == "forward" else "fwd+bwd"
        mask = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        return f"{dtype} {what} {mask} S{self.q_len} D{self.head_dim}"


@dataclass(frozen=True, slots=True)
class Tensors:
    """Inputs in `[B, S, H, D]`; `dout` is empty unless the case trains."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


@dataclass(frozen=True, slots=True)
class Runner:
    """A timed callable and the way back from its result to `[B, S, H, D]` tensors."""

    run: Callable[[], object]
    outputs: Callable[[], tuple[torch.Tensor, ...]]


Peer = Callable[[Shape, Tensors], Runner]


def make_inputs(shape: Shape, seed: int = 0) -> Tensors:
    """Standard normal inputs, the same for the same shape and seed."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen).to(shape.dtype).to(shape.device)

    b, d = shape.batch, shape.head_dim
    q = randn(b, shape.q_len, shape.q_heads, d)
    k = randn(b, shape.kv_len, shape.kv_heads, d)
    v = randn(b, shape.kv_len, shape.kv_heads, d)
    dout = randn(*q.shape) if shape.mode == "train" else torch.empty(0)
    return Tensors(q, k, v, dout)


def _on_cpu(t: Tensors) -> Tensors:
    return Tensors(t.q.cpu(), t.k.cpu(), t.v.cpu(), t.dout.cpu())


def _trained(
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One forward and backward: returns dq, dk, dv."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(*leaves), leaves, dout)

    return run


def candidate(shape: Shape, t: Tensors, backend: str | None) -> Runner:
    """attnforge's public function on `[B, S, H, D]` tensors."""
    if shape.mode == "decode":

        def decode() -> torch.Tensor:
            out: torch.Tensor = attnforge.flash_decode(t.q, t.k, t.v, backend=backend)
            return out

        return Runner(decode, lambda: (decode(),))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attnforge.flash_attention(
            q, k, v, causal=shape.causal, window_size=shape.window_size, backend=backend
        )
        return out

    return runner_bshd(shape, t, forward)


def _bhsd(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous()


def runner_bhsd(
    shape: Shape,
    t: Tensors,
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Runner:
    """A peer whose natural layout is contiguous `[B, H, S, D]`."""
    q, k, v = _bhsd(t.q), _bhsd(t.k), _bhsd(t.v)
    if shape.mode == "train":
        train = _trained(forward, q, k, v, _bhsd(t.dout))
        return Runner(train, lambda: tuple(g.transpose(1, 2) for g in train()))
    return Runner(lambda: forward(q, k, v), lambda: (forward(q, k, v).transpose(1, 2),))


def runner_bshd(
    shape: Shape,
    t: Tensors,
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Runner:
    """A peer whose layout is attnforge's, `[B, S, H, D]`."""
    if shape.mode == "train":
        train = _trained(forward, t.q, t.k, t.v, t.dout)
        return Runner(train, train)
    return Runner(lambda: forward(t.q, t.k, t.v), lambda: (forward(t.q, t.k, t.v),))


def sdpa(shape: Shape, t: Tensors) -> Runner:
    """torch SDPA; a decode query sees every key, so no mask is needed there."""
    gqa = shape.q_heads != shape.kv_heads

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=shape.causal and shape.mode != "decode", enable_gqa=gqa
        )

    return runner_bhsd(shape, t, forward)


def sdpa_folded(shape: Shape, t: Tensors) -> Runner:
    """torch SDPA with the query heads of a group as rows, so that K and V are read once.

    The honest baseline of a decode: three to ten times faster than the plain GQA call on a CPU.
    Valid for one query row, where every row of the fold sees the same keys.
    """
    if shape.q_len != 1:
        raise ValueError("attnforge.bench: the folded peer serves one query row")
    b, d = shape.batch, shape.head_dim
    group = shape.q_heads // shape.kv_heads
    q = t.q.reshape(b, shape.kv_heads, group, d).contiguous()
    k, v = _bhsd(t.k), _bhsd(t.v)

    def run() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    return Runner(run, lambda: (run().reshape(b, 1, shape.q_heads, d),))


def flex(shape: Shape, t: Tensors) -> Runner:
    """Compiled `flex_attention` with a block mask: torch's own way to skip masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        inside = j <= i
        return inside & (i - j < shape.window) if shape.window else inside

    # The defaults of create_block_mask leave the batch and head dimensions broadcast.
    mask = create_block_mask(visible, None, None, shape.q_len, shape.kv_len, device=shape.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compiled(q, k, v, block_mask=mask)
        return out

    return runner_bhsd(shape, t, forward)


PEERS: dict[str, Peer] = {"sdpa": sdpa, "sdpa folded": sdpa_folded, "flex compiled": flex}


def _kv_head(x: torch.Tensor, head: int, kv_heads: int) -> torch.Tensor:
    """The heads of `x [B, S, H, D]` that belong to one KV head."""
    group = x.shape[2] // kv_heads
    return x[:, :, head * group : (head + 1) * group]


def _row_slices(q_len: int) -> list[tuple[int, int]]:
    """The first, a middle and the last few query rows: short, half and full contexts."""
    if q_len <= 3 * _ERROR_ROWS:
        return [(0, q_len)]
    mid = q_len // 2 + 7  # not a multiple of any tile
    starts = (0, mid, q_len - _ERROR_ROWS)
    return [(s, s + _ERROR_ROWS) for s in starts]


Sample = tuple[int, slice, slice, Truth]  # (result, rows, heads, float64 truth and bounds)


def _forward_samples(shape: Shape, t: Tensors) -> list[Sample]:
    """Sampled query rows of the first and the last KV head."""
    group = shape.q_heads // shape.kv_heads
    offset = shape.kv_len - shape.q_len  # bottom-right alignment
    options = {"causal": shape.causal, "window_size": shape.window_size}
    samples: list[Sample] = []
    for head in sorted({0, shape.kv_heads - 1}):
        q, k, v = (_kv_head(x, head, shape.kv_heads) for x in (t.q, t.k, t.v))
        for begin, end in _row_slices(shape.q_len):
            # Cutting the keys at the last visible one keeps the alignment of the slice's own rows.
            masked = shape.causal or shape.window > 0
            keys = end + offset if masked else shape.kv_len
            truth = oracle.truth(q[:, begin:end], k[:, :keys], v[:, :keys], options)
            heads = slice(head * group, (head + 1) * group)
            samples.append((0, slice(begin, end), heads, truth))
    return samples


def _errors(outputs: tuple[torch.Tensor, ...], samples: Iterable[Sample], names: str) -> ErrorStat:
    """Largest absolute error, and largest fraction of the per-element bound, over the samples."""
    worst, used = 0.0, 0.0
    for result, rows, heads, truth in samples:
        name = names.split()[result]
        got = outputs[result][:, rows, heads].cpu().double()
        error = (got - truth.values[name]).abs()
        if not bool(error.isfinite().all()):
            return ErrorStat(math.inf, math.inf)
        worst = max(worst, float(error.max()))
        used = max(used, float((error / truth.bounds[name]).max()))
    return ErrorStat(worst, used)


def measure_errors(shape: Shape, t: Tensors, runners: dict[str, Runner]) -> dict[str, ErrorStat]:
    """Errors of every runner over the sampled outputs, or over dq, dk and dv of one head."""
    t = _on_cpu(t)
    if shape.mode != "train":
        samples = _forward_samples(shape, t)
        return {name: _errors(r.outputs(), samples, "out") for name, r in runners.items()}
    if shape.q_len > _ERROR_MAX_TRAIN_SEQ:
        return {}
    q, k, v, dout = (_kv_head(x, 0, shape.kv_heads) for x in (t.q, t.k, t.v, t.dout))
    options = {"causal": shape.causal, "window_size": shape.window_size}
    truth = oracle.truth(q, k, v, options, dout)
    every, group = slice(None), shape.q_heads // shape.kv_heads
    samples = [(i, every, slice(0, group if i == 0 else 1), truth) for i in range(3)]
    return {name: _errors(r.outputs(), samples, "dq dk dv") for name, r in runners.items()}


def build(shape: Shape, peers: Iterable[str], backend: str | None = None) -> Workload:
    """Inputs and runners of one case. A peer that cannot be built is kept as its reason."""
    t = make_inputs(shape)
    runners = {"attnforge": candidate(shape, t, backend)}
    calls: dict[str, Callable[[], object] | str] = {}
    for name in peers:
        try:
            runners[name] = PEERS[name](shape, t)
            calls[name] = runners[name].run
        except Exception as error:  # an optional peer must not end the run
            calls[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    return Workload(runners["attnforge"].run, calls, lambda: measure_errors(shape, t, runners))


def work(shape: Shape) -> float:
    """Flops of a forward or forward+backward, bytes of a decode: the operator's own formula."""
    kinds: dict[Mode, Literal["fwd", "fwd+bwd", "decode"]] = {
        "forward": "fwd",
        "train": "fwd+bwd",
        "decode": "decode",
    }
    cost = flash_op.cost(
        batch=shape.batch,
        seqlen_q=shape.q_len,
        seqlen_k=shape.kv_len,
        heads_q=shape.q_heads,
        heads_kv=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        causal=shape.causal,
        window_size=shape.window_size,
        kind=kinds[shape.mode],
    )
    return float(cost.bytes if shape.mode == "decode" else cost.flops)


def case(
    shape: Shape,
    peers: Iterable[str] = ("sdpa",),
    goals: dict[str, Goal] | None = None,
    peak_goal: float | None = None,
    series: str = "",
    repeats: int = REPEATS,
) -> Case:
    """A `Case` of this family: decode counts bytes against read bandwidth, the rest flops."""
    names = tuple(peers)
    return Case(
        name=shape.name,
        title=shape.title,
        family="flash",
        resource="read" if shape.mode == "decode" else "compute",
        work=work(shape),
        build=lambda backend: build(shape, names, backend),
        peers=names,
        goals=goals or {},
        peak_goal=peak_goal,
        series=series,
        x=shape.kv_len,
        repeats=repeats,
        device=shape.device,
    )


def table(quick: bool = False) -> list[Case]:
    """The speed table. Goals were set on an AVX2 machine (2 threads): see `--isa avx2`."""
    n = QUICK_REPEATS if quick else REPEATS
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16

    def versus(at_least: float, aim: float) -> dict[str, Goal]:
        return {"sdpa": Goal(at_least, aim)}

    def decode(dtype: torch.dtype) -> Shape:
        return Shape(
            "decode", dtype, q_len=1, kv_len=32768, q_heads=32, kv_heads=8, head_dim=128,
            causal=True,
        )  # fmt: skip

    both = ("sdpa", "sdpa folded")
    return [
        case(Shape("forward", fp32), goals=versus(1.15, 1.3), repeats=n),
        case(Shape("forward", fp32, causal=True), goals=versus(1.4, 1.6), repeats=n),
        case(Shape("train", fp32, causal=True), goals=versus(1.45, 1.6), repeats=n),
        case(Shape("forward", bf16, causal=True), goals=versus(1.3, 1.45), repeats=n),
        case(Shape("forward", bf16), repeats=n),
        case(Shape("forward", bf16, head_dim=128), repeats=n),
        case(Shape("forward", bf16, head_dim=128, causal=True), repeats=n),
        case(Shape("train", bf16, causal=True), goals=versus(8, 10), repeats=n),
        case(Shape("forward", fp16, causal=True), goals=versus(2.2, 2.6), repeats=n),
        case(Shape("train", fp16, causal=True), goals=versus(12, 20), repeats=n),
        case(Shape("forward", fp32, head_dim=128), peak_goal=0.70, repeats=n),
        case(
            decode(fp32), both, {"sdpa": Goal(5, 7), "sdpa folded": Goal(1.7, 2.5)}, 0.65,
            repeats=n,
        ),
        case(
            decode(bf16), both, {"sdpa": Goal(22, 33), "sdpa folded": Goal(1.9, 2.8)}, 0.65,
            repeats=n,
        ),
        case(
            Shape("forward", fp32, q_len=4096, kv_len=4096, causal=True, window=256),
            ("flex compiled",), {"flex compiled": Goal(4, 8)}, repeats=n,
        ),
    ]  # fmt: skip


def sweep(quick: bool = False) -> list[Case]:
    """Cases over sequence length, one series per plot panel."""
    lengths = (512, 2048, 4096) if quick else (256, 512, 1024, 2048, 4096, 8192)
    keys = (2048, 8192, 32768) if quick else (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    n = 3 if quick else _SWEEP_REPEATS
    cases: list[Case] = []
    modes: tuple[tuple[Mode, str], ...] = (("forward", "forward"), ("train", "forward+backward"))
    for mode, label in modes:
        for dtype in (torch.float32, torch.bfloat16):
            series = f"{label}, causal, {_DTYPE_NAME[dtype]}, 8 heads, D64"
            for s in lengths:
                shape = Shape(mode, dtype, q_len=s, kv_len=s, causal=True)
                cases.append(case(shape, series=series, repeats=n))
    for dtype in (torch.float32, torch.bfloat16):
        series = f"decode, {_DTYPE_NAME[dtype]}, 32q/8kv heads, D128"
        for s in keys:
            shape = Shape(
                "decode", dtype, q_len=1, kv_len=s, q_heads=32, kv_heads=8, head_dim=128,
                causal=True,
            )  # fmt: skip
            cases.append(case(shape, ("sdpa", "sdpa folded"), series=series, repeats=n))
    return cases
