"""What context-parallel attention sends, counted on processes of this machine, beside its model.

    python bench/context_messages.py               # 2, 3 and 4 ranks over gloo, bf16
    python bench/context_messages.py --time        # how much of the ring's messages products hide

Each rank counts the bytes that it hands to other ranks, forward and backward, holds them to the
model, and counts the ring's messages that have products between their start and the wait for them,
which is what hides them on a link that works by itself. Sizes are exact.

With --time two ranks of one thread take turns at a ring whose messages travel under products, one
that waits for each message where it starts, and messages without products. What the first saves of
the second, over the third, is the share that is hidden. Through shared memory a message is work for
the same cores; a link that works by itself is a network namespace whose loopback is slow:

    ip netns add slow && ip netns exec slow ip link set lo mtu 1500 up
    ip netns exec slow tc qdisc add dev lo root tbf rate 400mbit burst 256kb latency 400ms
    ip netns exec slow python bench/context_messages.py --time

(With loopback's own mtu of 64 KiB packets pass the burst, and tbf drops them for ever.)
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from attnforge.distributed import _ring, context

BATCH, HEADS, HEADS_K, DIM, SHARE = 1, 12, 4, 64, 96  # SHARE: tokens of a rank
TIMED_SHARE, TURNS = 2048, 7


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


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Messages are waited for where they start, with no products meanwhile."""
    send = _ring._send

    def sent(*args: Any) -> Any:
        hop = send(*args)
        hop.wait()
        return _ring._Hop(hop.arriving, [])

    with mock.patch.object(_ring, "_send", sent):
        yield


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Messages without products."""
    nothing = mock.patch.multiple(_ring, _attend=mock.DEFAULT, _differentiate=mock.DEFAULT)
    with _waiting(), nothing:
        yield


def timed_main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    heads = (HEADS, HEADS_K, HEADS_K)
    q, k, v = (
        torch.randn(BATCH, TIMED_SHARE, h, DIM, dtype=torch.bfloat16).requires_grad_()
        for h in heads
    )
    ways: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "under products": contextlib.nullcontext, "waited for": _waiting, "alone": _alone
    }  # fmt: skip
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(TURNS + 1):
        for way, as_said in ways.items():
            with as_said():
                dist.barrier()
                start = time.perf_counter()
                out = context.ring_attention(q, k, v, causal=True)
                dist.barrier()
                middle = time.perf_counter()
                torch.autograd.grad(out, (q, k, v), out.detach())
                dist.barrier()
                end = time.perf_counter()
            if turn:  # the first one touches memory
                taken.setdefault(("forward", way), []).append(middle - start)
                taken.setdefault(("backward", way), []).append(end - middle)
    for pass_ in ("forward", "backward"):
        under, waited, alone = (taken[pass_, way] for way in ways)
        hidden = [(b - a) / c for a, b, c in zip(under, waited, alone, strict=True)]
        if rank == 0:
            words = ", ".join(
                f"{way} {1e3 * statistics.median(x):.0f} ms"
                for way, x in zip(ways, (under, waited, alone), strict=True)
            )
            print(f"{pass_:8} {words}: {statistics.median(hidden):.0%} hidden", flush=True)
    dist.destroy_process_group()


def launch(world: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, kind]
        rest = (str(world), str(Path(folder) / "store"))
        ranks = [subprocess.Popen([*command, str(r), *rest]) for r in range(world)]
        if sum(rank.wait() != 0 for rank in ranks):
            raise SystemExit("context_messages: a rank failed")


RANKS = {"count": rank_main, "time": timed_main}

if __name__ == "__main__":
    if len(sys.argv) == 5:
        RANKS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:] == ["--time"]:
        launch(2, "time")
    else:
        for world in (2, 3, 4):
            launch(world, "count")
