"""One rank of the context-parallel tests: python context_process.py RANK WORLD STORE-FILE."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import attnforge
from attnforge.distributed import context

B, HQ, HK, D, DV = 2, 4, 2, 8, 6
STEPS = 24  # tokens of the whole sequence, a multiple of 2 W for every W up to 4
# Documents that begin and end inside pieces, an empty one, and 3 rows behind the end.
PACKED = [0, 2, 9, 9, 21]
FUNCTIONS = {
    "ring": context.ring_attention,
    "gather": context.gather_attention,
    "ulysses": context.ulysses_attention,
}
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True, "softcap": 3.0},
    {"causal": True, "window_size": (5, 0), "softmax_scale": 0.4},
    {"window_size": (7, 3)},
]


def inputs(batch: int, heads_kv: int, dtype: torch.dtype, heads: int = HQ) -> list[Tensor]:
    """The same tensors on every rank."""
    torch.manual_seed(heads_kv)
    shapes = ((heads, D), (heads_kv, D), (heads_kv, DV))
    return [torch.randn(batch, STEPS, h, d, dtype=dtype).requires_grad_() for h, d in shapes]


def one_process(leaves: list[Tensor], packed: bool, mask: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if not packed:
        return attnforge.flash_attention(*leaves, return_lse=True, **mask)  # type: ignore[no-any-return]
    cu = torch.tensor(PACKED, dtype=torch.int32)
    rows = (x.squeeze(0) for x in leaves)
    out, lse = attnforge.flash_attention_varlen(
        *rows, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True, **mask
    )
    return out.unsqueeze(0), lse.unsqueeze(0)


def close(got: Tensor, want: Tensor, part: float, what: str) -> None:
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert torch.equal(got.isinf(), want.isinf()), what
    gap = (got.double() - want.double()).nan_to_num(0.0).abs().max()
    size = want.double().nan_to_num(0.0, 0.0, 0.0).abs().max()
    assert gap <= part * (size + 1e-3), f"{what}: {float(gap):.3g} of {float(size):.3g}"


def compare(
    name: str, packed: bool, mask: dict[str, Any], layout: str, heads_kv: int, dtype: torch.dtype,
    part: float, group: Any,
) -> None:  # fmt: skip
    batch = 1 if packed else B
    heads = 12 if dist.get_world_size(group) == 3 else HQ
    leaves = inputs(batch, heads_kv, dtype, heads)
    out, lse = one_process(leaves, packed, mask)
    tops = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isinf(), 0.0)
    want = torch.autograd.grad((out, lse), leaves, tops)

    def mine(x: Tensor, dim: int = 1) -> Tensor:
        return context.shard(x.detach(), dim, layout, group)

    own = [mine(x).requires_grad_() for x in leaves]
    cu = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    o, s = FUNCTIONS[name](*own, cu_seqlens=cu, layout=layout, group=group, return_lse=True, **mask)
    form = f"{layout} {'packed ' if packed else ''}{dtype}"
    what = f"{name} {mask} {form} of {dist.get_world_size(group)}"
    close(o, mine(out), part, f"{what} out")
    close(s, mine(lse, 2), part, f"{what} lse")
    got = torch.autograd.grad((o, s), own, (mine(tops[0]), mine(tops[1], 2)))
    for n, a, b in zip("qkv", got, want, strict=True):
        close(a, mine(b), 10 * part, f"{what} d{n}")
    if not packed:
        whole = context.unshard(o, layout=layout, group=group)
        close(whole, out, part, f"{what} whole")


def mesh(rank: int) -> None:
    """2 x 2: heads inside, a ring outside."""
    heads = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rings = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    head_group, ring_group = heads[rank // 2], rings[rank % 2]
    leaves = inputs(B, HK, torch.float64)
    mask: dict[str, Any] = {"causal": True, "window_size": (9, 0)}
    out, _ = one_process(leaves, False, mask)
    top = torch.randn_like(out)
    want = torch.autograd.grad(out, leaves, top)

    def mine(x: Tensor) -> Tensor:
        outer = context.shard(x.detach(), group=ring_group)
        return context.shard(outer, layout="contiguous", group=head_group)

    own = [mine(x).requires_grad_() for x in leaves]
    groups = {"head_group": head_group, "ring_group": ring_group}
    o = context.mesh_attention(*own, **groups, **mask)
    close(o, mine(out), 1e-11, "mesh out")
    for a, b in zip(torch.autograd.grad(o, own, mine(top)), want, strict=True):
        close(a, mine(b), 1e-10, "mesh gradient")


def decode(rank: int, world: int) -> None:
    """New rows over a cache in unequal shares, one of them empty; then Star Attention's phases."""
    q, k, v = (x.detach() for x in inputs(B, HK, torch.float32))
    q = q[:, -2:]
    want, lse = attnforge.flash_decode(q, k, v, return_lse=True)
    bounds = [0, 5, 5, 16, STEPS][: world + 1]
    cache = torch.full((2, B, STEPS, HK, D), float("nan"))
    lengths = torch.full((B,), bounds[rank + 1] - bounds[rank], dtype=torch.int32)
    n = int(lengths[0])
    cache[0, :, :n] = k[:, bounds[rank] : bounds[rank + 1]]
    cache[1, :, :n, :, :DV] = v[:, bounds[rank] : bounds[rank + 1]]
    o, s = context.decode_attention(
        q, cache[0], cache[1, ..., :DV], cache_seqlens=lengths, causal=rank == world - 1,
        return_lse=True,
    )  # fmt: skip
    close(o, want, 1e-6, "decode")
    close(s, lse, 1e-6, "decode lse")


def star(rank: int, world: int) -> None:
    """Phase 1, blocks beside the anchor, equals one process on the pattern of that name."""
    from attnforge.ops import patterns

    q, k, v = (x.detach() for x in inputs(B, HK, torch.float32))
    block = STEPS // world
    selection = patterns.anchors(STEPS, piece=block, block=2)
    want = attnforge.block_sparse_attention(q, k, v, selection, causal=True)
    own = slice(rank * block, (rank + 1) * block)
    keys, values = (
        x[:, own] if rank == 0 else torch.cat((x[:, :block], x[:, own]), 1) for x in (k, v)
    )
    close(
        attnforge.flash_attention(q[:, own], keys, values, causal=True), want[:, own], 1e-6, "star"
    )


def messages(group: Any) -> None:
    """A ring's forward sends each share W - 1 times and nothing else."""
    sent: list[int] = []
    real = dist.batch_isend_irecv

    def counted(ops: list[Any]) -> Any:
        sent.append(sum(op.tensor.numel() for op in ops if op.op is dist.isend))
        return real(ops)

    dist.batch_isend_irecv = counted
    try:
        own = [
            context.shard(x.detach(), group=group).requires_grad_()
            for x in inputs(B, HK, torch.float32)
        ]
        out = context.ring_attention(*own, causal=True, group=group)
        world = dist.get_world_size(group)
        share = own[1].numel() + own[2].numel()
        assert sent == [share] * (world - 1), sent
        sent.clear()
        out.sum().backward()
        assert sum(sent) == share * (2 * world - 1), sent
    finally:
        dist.batch_isend_irecv = real


def errors() -> None:
    x = torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match="layout is 'striped'"):
        context.shard(x, layout="striped")
    with pytest.raises(ValueError, match="multiple of 8"):
        context.shard(torch.randn(1, 12, 2, 8))
    with pytest.raises(ValueError, match="same tokens"):
        context.ring_attention(x, x[:, :4], x[:, :4])
    with pytest.raises(ValueError, match="multiple of the 4 ranks"):
        context.ulysses_attention(x, x, x)
    with pytest.raises(ValueError, match="cu_seqlens ends at 99"):
        context.ring_attention(x, x, x, cu_seqlens=torch.tensor([0, 99], dtype=torch.int32))


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, world)} | {world: None}
    for size, group in groups.items():
        if rank >= size:
            continue
        for name in FUNCTIONS:
            for i, mask in enumerate(MASKS):
                layout = ("zigzag", "contiguous")[(i + size) % 2]
                compare(name, False, mask, layout, HK, torch.float64, 1e-11, group)
                if size in (2, 4):
                    compare(name, True, mask, layout, 1, torch.float64, 1e-11, group)
            compare(name, False, MASKS[1], "zigzag", HK, torch.float32, 1e-5, group)
    mesh(rank)
    decode(rank, world)
    star(rank, world)
    messages(None)
    q = torch.randn(1, 2, 4, 8).to(torch.bfloat16)
    assert context.ring_attention(q, q, q).dtype is torch.bfloat16
    errors()
    dist.destroy_process_group()
    print("fine")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
