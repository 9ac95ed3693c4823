"""Benchmark cases of block-sparse attention and its methods, against dense attention of our own.

The peer ``dense`` is our ``flash_attention(causal=True)`` with the same tensors. Of torch's flex
attention, compiled, there are two: ``flex compiled`` is given the lists themselves, blocks of 64
and a causal ``mask_mod``; ``flex by mask_mod`` the same mask in the way of its documentation,
``create_block_mask`` of a ``mask_mod`` with its own block size. In the cases of selectors the peer
``method`` is the whole method that the selector is a part of: a ratio of 3 says that choosing takes
a third.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnforge
from attnforge import BlockSelection
from attnforge.ops.flash import cost
from attnforge.testing.bench import QUICK_REPEATS, Case, Goal, Workload

__all__ = ["Shape", "build", "sweep", "table"]

Run = Callable[[], object]
_FLEX = ("flex compiled", "flex by mask_mod")


@dataclass(frozen=True, slots=True)
class Shape:
    """One causal problem of batch 1. method: "blocks", "moba", "nsa" or a selector."""

    method: str
    seqlen: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    density: float = 0.1  # of "blocks": listed share of the causal pairs
    backward: bool = False
    flex: bool = False  # compiled flex_attention of the same mask among the peers of "blocks"
    dtype: torch.dtype = torch.float32

    @property
    def kind(self) -> str:
        """The dtype as names and titles have it."""
        return "bf16" if self.dtype is torch.bfloat16 else "fp32"

    @property
    def name(self) -> str:
        kind = f"{self.method}-{self.density:g}" if self.method == "blocks" else self.method
        dtype = "" if self.dtype is torch.float32 else f"-{self.kind}"
        return f"{kind}{'-bwd' if self.backward else ''}{dtype}-s{self.seqlen}"

    @property
    def title(self) -> str:
        kind = f"64x64 blocks, {self.density:.0%}" if self.method == "blocks" else self.method
        both = " fwd+bwd" if self.backward else ""
        sizes = f"S{self.seqlen} H{self.heads}/{self.kv_heads} D{self.head_dim}"
        return f"{self.kind} {kind}{both} {sizes}"


def random_blocks(shape: Shape) -> BlockSelection:
    """Causal lists of 64x64 blocks of the shape's density, the diagonal among them."""
    g = torch.Generator().manual_seed(0)
    blocks = shape.seqlen // 64
    row = torch.arange(blocks)
    seen = row <= row[:, None]
    # Blocks count as pairs that are seen, those of the diagonal half; the others are drawn.
    share = (shape.density * blocks - 1) / (blocks - 1)
    mask = (torch.rand(1, shape.heads, blocks, blocks, generator=g) < share) & seen
    return BlockSelection.from_mask(mask | (row == row[:, None]), q_block=64, kv_block=64)


def _flex(q: Tensor, k: Tensor, v: Tensor, lists: BlockSelection) -> dict[str, Run]:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    tokens = q.shape[1]
    mask = lists.to_mask(tokens // 64)

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def listed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[0, h, i // 64, j // 64] & (j <= i)

    counts = mask.sum(-1, dtype=torch.int32)
    order = (~mask).to(torch.int32).argsort(dim=-1, stable=True).to(torch.int32)
    masks = (
        BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=64, mask_mod=causal),
        create_block_mask(listed, 1, q.shape[2], tokens, tokens, q.device),
    )
    qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def of(block_mask: BlockMask) -> Run:
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(qt, kt, vt, block_mask=block_mask)

    return dict(zip(_FLEX, map(of, masks), strict=True))


def _trained(call: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
    """Forward and backward of a call."""
    inputs = [x.detach().clone().requires_grad_() for x in tensors]

    def run() -> object:
        out = call(*inputs)
        return torch.autograd.grad(out, inputs, out.detach(), allow_unused=True)

    return run


def build(shape: Shape, backend: str | None = None) -> Workload:
    """Inputs and both sides of one case."""
    g = torch.Generator().manual_seed(0)
    s, d = shape.seqlen, shape.head_dim
    q, k, v = (
        torch.randn(1, s, h, d, generator=g).to(shape.dtype)
        for h in (shape.heads, shape.kv_heads, shape.kv_heads)
    )  # fmt: skip
    peers: dict[str, Callable[[], object] | str] = {}
    call: Callable[..., Tensor]
    if shape.method == "blocks":
        lists = random_blocks(shape)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = attnforge.block_sparse_attention(q, k, v, lists, backend=backend)
            return out

        if shape.flex:
            peers.update(_flex(q, k, v, lists))
    elif shape.method.startswith("moba"):

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = attnforge.moba_attention(
                q, k, v, block_size=512, top_k=3, backend=backend
            )
            return out

    else:
        gates = torch.rand(1, s, shape.heads, 3, generator=g).to(shape.dtype)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = attnforge.nsa_attention(
                q, None, None, k, v, None, None, gates, backend=backend
            )
            return out

    if shape.method == "moba select":
        whole = call
        return Workload(
            lambda: attnforge.moba_select(q, k, block_size=512, top_k=3),
            {"method": lambda: whole(q, k, v)},
        )
    if shape.method == "nsa select":
        whole = call
        k_cmp = attnforge.pool_blocks(k, block=32, stride=16)
        lse = attnforge.compressed_attention(q, k_cmp, k_cmp, return_lse=True, backend=backend)[1]
        return Workload(
            lambda: attnforge.nsa_select(q, k_cmp, lse, backend=backend),
            {"method": lambda: whole(q, k, v)},
        )

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnforge.flash_attention(q, k, v, causal=True, backend=backend)
        return out

    if shape.backward:
        both = [q, k, v]
        return Workload(_trained(call, both), {"dense": _trained(dense, both)})
    own = call
    return Workload(lambda: own(q, k, v), {"dense": lambda: dense(q, k, v), **peers})


def _share(shape: Shape) -> float:
    """Pairs of a query and a key, or a block mean, whose product the method takes, of dense."""
    s = shape.seqlen
    dense = s * (s + 1) / 2
    if shape.method == "blocks":
        return random_blocks(shape).density(s, s)
    if shape.method.startswith("moba"):
        seen = sum(min(t // 512, 2) * 512 + t % 512 + 1 for t in range(s))
        means = s * (s // 512) / 2  # of scores: half of a pair's flops
        return (means if "select" in shape.method else seen * 2 + means) / (2 * dense)
    windows = sum(max(0, (t + 1 - 32) // 16 + 1) for t in range(s))
    if "select" in shape.method:
        return windows / (2 * dense)
    blocks = sum(min(t // 64, 15) * 64 + t % 64 + 1 for t in range(s))
    near = sum(min(t + 1, 512) for t in range(s))
    return (windows * 3 + 2 * blocks + 2 * near) / (2 * dense)


def _case(shape: Shape, goals: dict[str, Goal], repeats: int, series: str = "") -> Case:
    s, d = shape.seqlen, shape.head_dim
    whole = cost(
        batch=1, seqlen_q=s, seqlen_k=s, heads_q=shape.heads, heads_kv=shape.kv_heads, head_dim=d,
        causal=True,
    )  # fmt: skip
    return Case(
        name=shape.name.replace(" ", "_"),
        title=shape.title,
        family="block_sparse",
        resource="compute",
        work=whole.flops * _share(shape) * (3.5 if shape.backward else 1.0),
        build=lambda backend: build(shape, backend),
        peers=tuple(goals),
        goals=goals,
        series=series,
        x=s,
        repeats=repeats,
    )


def table(quick: bool = False) -> list[Case]:
    """Lists of blocks, MoBA and NSA with the papers' sizes, and what their selectors take."""
    n = 3 if quick else 5
    nsa: dict[str, Any] = {"heads": 16, "kv_heads": 1}
    third = {"method": Goal(1 / 0.35, 5)}
    blocks = {"dense": Goal(7, 9), **dict.fromkeys(_FLEX, Goal(8, 10))}
    return [
        _case(Shape("blocks", 8192, flex=True), blocks, n),
        _case(Shape("blocks", 8192, flex=True, dtype=torch.bfloat16), blocks, n),
        _case(Shape("blocks", 4096, backward=True), {"dense": Goal(5, 9)}, n),
        _case(Shape("moba", 16384), {"dense": Goal(3, 5)}, n),
        _case(Shape("nsa", 16384, **nsa), {"dense": Goal(2.5, 4)}, n),
        _case(Shape("nsa", 16384, backward=True, **nsa), {"dense": Goal(2, 4)}, n),
        _case(Shape("moba select", 16384), third, n),
        _case(Shape("nsa select", 16384, **nsa), third, n),
    ]


def sweep(quick: bool = False) -> list[Case]:
    """64x64 blocks at 10 % over sequence length."""
    lengths = (1024, 4096) if quick else (1024, 2048, 4096, 8192)
    series = "64x64 blocks at 10%, fp32, 8 heads, D64"
    return [_case(Shape("blocks", s), {"dense": Goal(7, 9)}, QUICK_REPEATS, series)
            for s in lengths]  # fmt: skip
