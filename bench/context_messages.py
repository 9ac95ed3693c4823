"""What context-parallel attention sends, counted on processes of this machine, beside its model.

    python bench/context_messages.py               # 2, 3 and 4 ranks over gloo, bf16

Each rank counts the bytes that it hands to other ranks, forward and backward, holds them to the
model, and counts the ring's messages that have products between their start and the wait for them,
which is what hides them on a link that works by itself. Sizes are exact; no time is taken.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnforge.distributed import _ring, context

BATCH, HEADS, HEADS_K, DIM, SHARE = 1, 12, 4, 64, 96  # SHARE: tokens of a rank


class Counter:
    """Bytes that this rank sends, and how many of a ring's messages lie under products."""

    def __init__(self) -> None:
        self.sent = self.products = self.messages = self.hidden = 0
        point, gather, scatter = (
            dist.batch_isend_irecv,
            dist.all_gather_into_tensor,
            dist.all_to_all_single,
        )
        send, wait = _ring._send, _ring._Hop.wait

        def counted_points(ops: list[Any]) -> Any:
            self.sent += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
            return point(ops)

        def counted_gather(out: Tensor, x: Tensor, group: Any = None) -> Any:
            self.sent += x.nbytes * (dist.get_world_size(group) - 1)
            return gather(out, x, group=group)

        def counted_scatter(out: Tensor, x: Tensor, group: Any = None) -> Any:
            world = dist.get_world_size(group)
            self.sent += x.nbytes // world * (world - 1)
            return scatter(out, x, group=group)

        begun: dict[int, int] = {}

        def watched_send(*args: Any) -> Any:
            hop = send(*args)
            begun[id(hop)] = self.products
            return hop

        def watched_wait(hop: Any) -> Any:
            self.messages += 1
            self.hidden += self.products > begun.pop(id(hop))
            return wait(hop)

        def counting(products: Any) -> Any:
            def run(*args: Any) -> Any:
                self.products += 1
                return products(*args)

            return run

        for name, counted in (
            ("batch_isend_irecv", counted_points),
            ("all_gather_into_tensor", counted_gather),
            ("all_to_all_single", counted_scatter),
        ):
            setattr(dist, name, counted)
        _ring._send, _ring._Hop.wait = watched_send, watched_wait  # type: ignore[assignment]
        _ring._attend, _ring._differentiate = map(counting, (_ring._attend, _ring._differentiate))

    def taken(self) -> tuple[int, str]:
        """Bytes, and the ring's messages in words; then begins anew."""
        words = f" ({self.hidden} of {self.messages} messages under products)"
        found = self.sent, words if self.messages else ""
        self.sent = self.messages = self.hidden = 0
        return found


def model(name: str, world: int) -> tuple[int, int]:
    """Bytes that a rank sends, forward and backward, by docs/distributed.md."""
    kv = 2 * BATCH * SHARE * HEADS_K * DIM * 2  # K and V of a rank in bf16
    q_and_out = 2 * BATCH * SHARE * HEADS * DIM * 2
    moved = (q_and_out + kv) * (world - 1) // world
    if name == "ring":
        return (world - 1) * kv, (world - 1) * kv + world * 2 * kv
    if name == "gather":
        return (world - 1) * kv, (world - 1) * 2 * kv
    if name == "ulysses":
        return moved, moved
    assert name == "decode"
    return (world - 1) * BATCH * HEADS * (DIM + 1) * 4, 0


def rank_main(rank: int, world: int, store: str) -> None:
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    counter = Counter()
    functions = {
        "ring": context.ring_attention,
        "gather": context.gather_attention,
        "ulysses": context.ulysses_attention,
    }
    for name in (*functions, "decode"):
        if name == "ulysses" and HEADS_K % world:
            continue  # heads are dealt to the ranks
        heads = (HEADS, HEADS_K, HEADS_K)
        q, k, v = (
            torch.randn(BATCH, SHARE, h, DIM, dtype=torch.bfloat16).requires_grad_() for h in heads
        )
        if name == "decode":
            context.decode_attention(q[:, :1].detach(), k.detach(), v.detach())
            forward, backward = counter.taken(), (0, "")
        else:
            out = functions[name](q, k, v, causal=True)
            forward = counter.taken()
            out.sum().backward()
            backward = counter.taken()
        assert (forward[0], backward[0]) == model(name, world), (name, forward, backward)
        if rank == 0:
            both = (f"{way} {n:,} bytes{words}" for way, (n, words) in
                    (("forward", forward), ("backward", backward)))  # fmt: skip
            print(f"{name:8} {world} ranks: {', '.join(both)}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    for world in (2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            command = [sys.executable, __file__]
            ranks = [subprocess.Popen([*command, str(r), str(world), store]) for r in range(world)]
            if sum(rank.wait() != 0 for rank in ranks):
                raise SystemExit("context_messages: a rank failed")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        main()
