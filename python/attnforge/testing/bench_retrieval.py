"""Benchmark cases of the `retrieval` family: one decode step, what selects its keys included.

Peers: our own dense decode over the same keys, torch plain and with the heads of a group folded
into rows. Hashing is measured against torch's product of the same size. `work` is that of the dense
problem, so that all rows can be compared: what a policy leaves out shows as a rate above the peak.
Making an index is no part of a step; `kmeans` is a case of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

import attnforge
from attnforge import CentroidIndex, LSHIndex, policies
from attnforge.testing.bench import QUICK_REPEATS, REPEATS, Case, Goal, Workload

__all__ = ["Shape", "build", "sweep", "table"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem: a bf16 query per head over `keys` keys of random directions."""

    kind: str  # lsh, centroid, quest, indexed, encode, kmeans
    keys: int
    batch: int = 1
    budget: float = 0.1  # share of the keys
    heads_q: int = 32
    heads_k: int = 8
    head_dim: int = 128
    bits: int = 10
    tables: int = 150
    planes: bool = False  # K and V as transformers keeps them: a head behind the other

    @property
    def name(self) -> str:
        own = f"-k{self.bits}-l{self.tables}" if self.kind in ("lsh", "encode") else ""
        if self.kind in ("centroid", "quest", "indexed"):
            own = f"-{self.budget:g}"
        own += "-planes" if self.planes else ""
        return f"{self.kind}-b{self.batch}-s{self.keys}{own}"

    @property
    def title(self) -> str:
        what = {
            "lsh": f"MagicPIG ({self.bits}, {self.tables})",
            "centroid": f"Squeezed, {self.budget:.0%} of keys",
            "quest": f"Quest, {self.budget:.0%} of keys",
            "indexed": f"listed keys, {self.budget:.0%}",
            "encode": f"hashing ({self.bits}, {self.tables})",
            "kmeans": "an index by k-means to 5%, 10 iterations",
        }[self.kind]
        heads = f"{self.heads_q}q/{self.heads_k}kv D{self.head_dim}"
        where = ", heads apart" if self.planes else ""
        return f"{what}, {self.batch} x {self.keys} keys, {heads}{where}"

    @property
    def work(self) -> int:
        """Bytes of K and V; flops of a product or of k-means."""
        rows = self.batch * self.keys * self.heads_k
        if self.kind == "encode":
            return 2 * rows * self.head_dim * self.bits * self.tables
        if self.kind == "kmeans":
            return 2 * rows * self.head_dim * (self.keys // 20) * 10
        return rows * self.head_dim * 4


def _tensors(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    b, s, d = shape.batch, shape.keys, shape.head_dim
    q = torch.randn(b, 1, shape.heads_q, d, generator=g).bfloat16()
    k = torch.randn(b, s, shape.heads_k, d, generator=g).bfloat16()
    v = torch.randn(b, s, shape.heads_k, d, generator=g).bfloat16()
    if shape.planes:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    return q, k, v


def _step(shape: Shape, backend: str | None) -> Workload:
    q, k, v = _tensors(shape)
    candidate: Callable[[], object]
    if shape.kind == "lsh":
        index = LSHIndex(k, v, num_bits=shape.bits, num_tables=shape.tables)
        candidate = lambda: attnforge.lsh_attention(q, index, backend=backend)  # noqa: E731
    elif shape.kind == "centroid":
        # A random start without iterations: random keys have no clusters that a step could find.
        clusters = CentroidIndex.fit(k, v, iterations=1, segment=4096)
        clusters.calibrate(q, shape.budget)
        candidate = lambda: attnforge.centroid_attention(q, clusters, backend=backend)  # noqa: E731
    elif shape.kind == "quest":
        policy = policies.Quest(int(shape.budget * shape.keys), grouped=True)
        policy.crossover = 0  # sparse also where that is slower: the sweep shows it
        candidate = lambda: policy.attend(q, k, v, backend=backend)  # noqa: E731
    else:
        count = int(shape.budget * shape.keys)
        ids = torch.rand(shape.batch, shape.heads_k, shape.keys).argsort(-1)[..., :count]
        ids = ids.sort(-1).values.int()
        candidate = lambda: attnforge.indexed_attention(q, k, v, ids=ids, backend=backend)  # noqa: E731

    def folded() -> torch.Tensor:
        rows = q.view(shape.batch, shape.heads_k, -1, shape.head_dim)
        return scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))

    peers: dict[str, Callable[[], object] | str] = {
        "dense": lambda: attnforge.flash_decode(q, k, v, backend=backend),
        "sdpa plain": lambda: scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
        ),
        "sdpa folded": folded,
    }
    return Workload(candidate, peers)


def _encode(shape: Shape, backend: str | None) -> Workload:
    _, k, v = _tensors(shape)
    index = LSHIndex(k[:, :256], v[:, :256], num_bits=shape.bits, num_tables=shape.tables)
    rows = k.transpose(1, 2).reshape(-1, shape.head_dim).float()
    room = rows.new_empty(rows.shape[0], shape.bits * shape.tables)
    return Workload(
        lambda: index.encode(k, index.mean),
        {"torch product": lambda: torch.mm(rows, index.planes, out=room)},
    )


def _kmeans(shape: Shape, backend: str | None) -> Workload:
    _, k, v = _tensors(shape)
    # With what goes around it: keys copied and sorted by cluster.
    return Workload(lambda: CentroidIndex.fit(k, v, iterations=10, window=0), {})


def build(shape: Shape, backend: str | None = None) -> Workload:
    """Inputs and every side of one case."""
    return {"encode": _encode, "kmeans": _kmeans}.get(shape.kind, _step)(shape, backend)


_GOALS = {"lsh": Goal(2.5, 3.0), "centroid": Goal(3.5, 5.0), "quest": Goal(8.0, 10.0)}


def _case(shape: Shape, repeats: int, series: str = "") -> Case:
    peers: tuple[str, ...] = ("dense", "sdpa plain", "sdpa folded")
    goals = {"dense": _GOALS[shape.kind]} if shape.kind in _GOALS and not series else {}
    if shape.kind == "encode":
        peers, goals = ("torch product",), {"torch product": Goal(0.6, 0.8)}
    elif shape.kind == "kmeans":
        peers, goals = (), {}
    return Case(
        name=shape.name,
        title=shape.title,
        family="retrieval",
        resource="compute" if shape.kind in ("encode", "kmeans") else "read",
        work=float(shape.work),
        build=lambda backend: build(shape, backend),
        peers=peers,
        goals=goals,
        series=series,
        x=shape.keys,
        repeats=repeats,
    )


def table(quick: bool = False) -> list[Case]:
    """Steps over 96k keys, hashing of 16k, k-means of 32k keys x 8 heads."""
    n = QUICK_REPEATS if quick else REPEATS
    long = 98304
    return [
        _case(Shape("lsh", long), n),
        _case(Shape("lsh", long, bits=9, tables=120), n),
        _case(Shape("centroid", long), n),
        _case(Shape("quest", long, budget=0.05), n),
        _case(Shape("quest", long, budget=0.05, planes=True), n),
        _case(Shape("indexed", long), n),
        _case(Shape("encode", 16384), n),
        _case(Shape("kmeans", 32768), 1),
    ]


def sweep(quick: bool = False) -> list[Case]:
    """Steps over the length of the context: where each method passes dense decode."""
    contexts = (4096, 32768) if quick else (2048, 4096, 8192, 16384, 32768, 65536, 98304)
    kinds = {"lsh": 0.1, "centroid": 0.1, "quest": 0.05}
    return [
        _case(Shape(kind, keys, budget=budget), QUICK_REPEATS, f"{kind} decode over keys")
        for kind, budget in kinds.items()
        for keys in contexts
    ]
