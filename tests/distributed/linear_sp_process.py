"""One rank of the sequence-parallel tests: python linear_sp_process.py RANK WORLD STORE-FILE."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import attnforge
from attnforge.distributed import linear_sp

B, H, HV, K, V = 2, 1, 2, 6, 5
STEPS = 9  # tokens per rank: no multiple of any chunk
# Over 4 ranks of 9: whole ranks without a boundary, a boundary on a rank's edge, empty sequences at
# edges and inside, a sequence of one token, and 2 rows behind the end.
PACKED = {
    1: [0, 3, 9],
    2: [0, 0, 4, 13, 18],
    3: [0, 5, 5, 25, 26],
    4: [0, 2, 3, 18, 18, 34],
}
GATES = {
    "linear_attention": None,
    "retention": None,
    "lightning_attention": None,
    "simple_gla": ("g", ()),
    "gla": ("gk", (K,)),
    "gla values": ("gv", (V,)),
    "delta_rule": None,
    "gated_delta_rule": ("g", ()),
    "kda": ("g", (K,)),
}


def inputs(name: str, time: int, packed: list[int] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors on every rank."""
    torch.manual_seed(len(name) + time)
    batch = 1 if packed else B
    count = len(packed) - 1 if packed else B
    x = {n: torch.randn(batch, time, h, d) for n, h, d in (("q", H, K), ("k", H, K), ("v", HV, V))}
    if "delta" in name or name == "kda":
        x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
        x["beta"] = 2 * torch.rand(batch, time, HV)
    if GATES[name]:
        key, width = GATES[name]
        x[key] = -torch.rand(batch, time, HV, *width)
        x[key][:, 3] = -torch.inf  # a reset
    x["initial_state"] = torch.randn(count, HV, K, V)
    return {n: t.to(dtype).requires_grad_() for n, t in x.items()}


def close(got: Tensor, want: Tensor, part: float, what: str) -> None:
    assert got.shape == want.shape, (what, got.shape, want.shape)
    gap = float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
    size = float(want.double().abs().max()) if got.numel() else 0.0
    assert gap <= part * (size + 1e-3), f"{what}: {gap:.3g} of {size:.3g}"


def compare(name: str, packed: bool, dtype: torch.dtype, part: float, group: Any) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    bounds = PACKED[world] if packed else None
    x = inputs(name, STEPS * world, bounds, dtype)
    cu = torch.tensor(bounds, dtype=torch.int32) if bounds else None
    function = name.split()[0]
    options = {"output_final_state": True, "cu_seqlens": cu}
    out, state = getattr(attnforge, function)(**x, **options)
    tops = torch.randn_like(out), torch.randn_like(state)
    want = torch.autograd.grad((out, state), list(x.values()), tops)

    here = slice(rank * STEPS, (rank + 1) * STEPS)
    own = {
        n: (t if n == "initial_state" else t[:, here]).detach().clone().requires_grad_()
        for n, t in x.items()
    }
    o, s = getattr(linear_sp, function)(**own, **options, group=group)
    what = f"{name} {'packed' if packed else 'batch'} {dtype} rank {rank} of {world}"
    close(o, out[:, here], part, f"{what} out")
    # The states that end here, and those that begin here.
    if bounds is None:
        ends = torch.full((B,), rank == world - 1)
        begins = torch.full((B,), rank == 0)
    else:
        lo, hi = here.start, here.stop
        last = torch.tensor(bounds[1:])
        first = torch.tensor(bounds[:-1])
        begins = (first >= lo) & ((first < hi) | (rank == world - 1))
        ends = torch.where(last == first, begins, (last > lo) & (last <= hi))
    close(s[ends], state[ends], part, f"{what} state")
    top = tops[1] * ends[:, None, None, None]
    got = torch.autograd.grad((o, s), list(own.values()), (tops[0][:, here], top))
    for n, a, b in zip(own, got, want, strict=True):
        if n == "initial_state":
            close(a[begins], b[begins], 10 * part, f"{what} d{n}")
            assert not a[~begins].any(), f"{what}: gradient of a state that is not used"
        else:
            close(a, b[:, here], 10 * part, f"{what} d{n}")


def collectives(group: Any) -> None:
    """One all-gather each way, of a size that does not depend on the tokens."""
    calls: list[int] = []
    real = dist.all_gather_into_tensor

    def counted(out: Tensor, own: Tensor, **options: Any) -> Any:
        calls.append(own.numel())
        return real(out, own, **options)

    dist.all_gather_into_tensor = counted
    try:
        for steps in (4, 50):
            calls.clear()
            q, k, v = (torch.randn(1, steps, 2, 8, requires_grad=True) for _ in "qkv")
            g = -torch.rand(1, steps, 2, 8)
            linear_sp.gla(q, k, v, g, group=group)[0].sum().backward()
            assert calls == [2 * (8 * 8 + 8), 2 * 8 * 8], calls
    finally:
        dist.all_gather_into_tensor = real


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, world)} | {world: None}
    for size, group in groups.items():
        if rank >= size:
            continue
        for name in GATES:
            for packed in (False, True):
                compare(name, packed, torch.float64, 1e-11, group)
                if size != 3:
                    compare(name, packed, torch.float32, 1e-5, group)
    collectives(None)
    q = torch.randn(1, 4, 2, 8).to(torch.bfloat16)
    o, state = linear_sp.linear_attention(q, q, q, output_final_state=True)
    assert o.dtype is torch.bfloat16
    assert state is not None
    assert state.dtype is torch.float32
    with pytest.raises(ValueError, match=f"up to the {4 * world} packed rows"):
        linear_sp.linear_attention(q, q, q, cu_seqlens=torch.tensor([0, 4 * world + 1]))
    dist.destroy_process_group()
    print("fine")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
