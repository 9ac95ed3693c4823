"""Cases of the retrieval family: lists with entries that name nothing, poison behind, truth.

    inputs = IndexedCase(keys=70, entries=20, lists="query").make()
    compare(inputs.run("cpu"), inputs.truth()).check()

The truth of one head is that of dense attention over the rows that its list names, repeated as
often as they stand there, with the biases as a key bias (``oracle``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import attnforge
from attnforge.testing import cases, oracle
from attnforge.testing.oracle import Truth

__all__ = ["IndexedCase", "IndexedInputs", "grown_tables"]


@dataclass(frozen=True)
class IndexedCase:
    """One call. lists: "one", "kv" or "query", who has lists of their own.

    entries: slots of a list; lengths are drawn up to it. order: "rising" (each key once) or
    "any" (repeated, shuffled). bias: log-biases, some of them -inf. used: keys in use per sequence.
    page_size: 0 for keys in one piece.
    """

    batch: int = 2
    rows: int = 1
    keys: int = 70
    entries: int = 30
    heads_q: int = 4
    heads_k: int = 2
    head_dim: int = 32
    v_head_dim: int = 0
    lists: str = "query"
    order: str = "rising"
    bias: bool = True
    used: tuple[int, ...] = ()
    page_size: int = 0
    layout: str = "NHD"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def make(self) -> IndexedInputs:
        """Tensors and keywords; keys that no list names are NaN."""
        g = torch.Generator().manual_seed(self.seed)
        b, n, dv = self.batch, self.entries, self.v_head_dim or self.head_dim
        heads = {"one": 1, "kv": self.heads_k, "query": self.heads_q}[self.lists]
        used = self.used or (self.keys,) * b
        ids = torch.randint(-3, self.keys + 6, (b, heads, n), generator=g)
        if self.order == "rising":
            order = torch.rand(b, heads, max(n, self.keys + 9), generator=g).argsort(-1)
            ids = (order[..., :n] - 3).sort(-1).values
        lens = torch.randint(0, n + 1, (b, heads), generator=g)
        lens[:, 0], lens[-1, -1] = n, 0
        slot = torch.arange(n)
        room = torch.tensor(used).view(b, 1, 1)
        valid = (slot < lens.unsqueeze(-1)) & (ids >= 0) & (ids < room)
        ids = torch.where(slot < lens.unsqueeze(-1), ids, 0)  # behind the length: a poisoned key?
        q = torch.randn(b, self.rows, self.heads_q, self.head_dim, generator=g)
        k = torch.randn(b, self.keys, self.heads_k, self.head_dim, generator=g)
        v = torch.randn(b, self.keys, self.heads_k, dv, generator=g) + 0.5
        options: dict[str, Any] = {"ids": ids.int(), "lens": lens.int()}
        if self.bias:
            bias = torch.randn(b, heads, n, generator=g)
            bias[torch.rand(b, heads, n, generator=g) < 0.1] = -torch.inf
            valid &= ~bias.isneginf()
            options["log_bias"] = bias
        listed = torch.zeros(b, self.heads_k, self.keys + 1, dtype=torch.bool)
        at = torch.where(valid, ids, self.keys)
        for h in range(self.heads_k):
            mine = {"one": slice(0, 1), "kv": slice(h, h + 1)}.get(
                self.lists, slice(h * heads // self.heads_k, (h + 1) * heads // self.heads_k)
            )
            listed[:, h].scatter_(1, at[:, mine].flatten(1), True)
        hidden = ~listed[..., :-1].transpose(1, 2).unsqueeze(-1)
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        k, v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan"))
        if self.used or self.page_size:
            options["cache_seqlens"] = torch.tensor(used).int()
        dout = torch.randn(b, self.rows, self.heads_q, dv, generator=g).to(self.dtype)
        dlse = torch.randn(b, self.heads_q, self.rows, generator=g)
        q, k, v, valid, dout, dlse = (x.to(cases.DEVICE) for x in (q, k, v, valid, dout, dlse))
        options = {name: x.to(cases.DEVICE) for name, x in options.items()}
        return IndexedInputs(self, q, k, v, valid, dout, dlse, options)


@dataclass(frozen=True)
class IndexedInputs:
    """The tensors of a call, which entries are seen, and its keywords."""

    case: IndexedCase
    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor  # [B, H, N]
    dout: Tensor
    dlse: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def with_(self, **more: Any) -> IndexedInputs:
        """The same with other tensors or keywords."""
        names = ("q", "k", "v", "dout", "dlse")
        own = {n: more.pop(n) for n in names if n in more}
        return replace(self, **own, options={**self.options, **more})

    def paged(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """k and v in shuffled pages, and the keywords with their table."""
        size, b = self.case.page_size, self.case.batch
        pages = -(-self.case.keys // size)
        order = torch.randperm(b * pages, generator=torch.Generator().manual_seed(1))
        order = order.to(self.k.device)
        found = []
        for x in (self.k, self.v):
            room = x.new_full((b, pages * size, *x.shape[2:]), float("nan"))
            room[:, : x.shape[1]] = x
            flat = room.view(b * pages, size, *x.shape[2:])
            store = torch.empty_like(flat)
            store[order] = flat
            found.append(store.transpose(1, 2) if self.case.layout == "HND" else store)
        table = order.view(b, pages).int()
        return found[0], found[1], {
            **self.options, "block_table": table, "kv_layout": self.case.layout,
        }  # fmt: skip

    def forward(self, backend: str, **more: Any) -> dict[str, Tensor]:
        """``out`` and ``lse``."""
        k, v, options = (self.k, self.v, self.options)
        if self.case.page_size:
            k, v, options = self.paged()
        out, lse = attnforge.indexed_attention(
            self.q, k, v, return_lse=True, backend=backend, **{**options, **more}
        )
        return {"out": out, "lse": lse}

    def run(self, backend: str) -> dict[str, Tensor]:
        """Outputs and gradients of <out, dout> + <lse, dlse> over rows that see something."""
        inputs = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        options = dict(self.options)
        names = ["dq", "dk", "dv"]
        if self.case.bias:
            options["log_bias"] = options["log_bias"].clone().requires_grad_()
            inputs.append(options["log_bias"])
            names.append("dlog_bias")
        out, lse = attnforge.indexed_attention(
            *inputs[:3], return_lse=True, backend=backend, **options
        )
        grads = torch.autograd.grad([out, lse], inputs, [self.dout, self.dlse])
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}

    def truth(self, gradients: bool = True, rounded: bool = False) -> Truth:
        """Values and bounds of everything that ``run`` gives; rounded: see ``oracle.truth``."""
        c, o, device = self.case, self.options, self.q.device
        heads, group = o["ids"].shape[1], c.heads_q // c.heads_k
        shapes = {"out": self.dout.shape, "lse": self.dlse.shape, "dq": self.q.shape,
                  "dk": self.k.shape, "dv": self.v.shape, "dlog_bias": o["ids"].shape}  # fmt: skip
        values, bounds = (
            {n: torch.zeros(s, dtype=torch.float64, device=device) for n, s in shapes.items()}
            for _ in range(2)
        )
        for b in range(c.batch):
            for h in range(c.heads_q):
                own, kv = h * heads // c.heads_q, h // group
                seen = self.valid[b, own].nonzero().flatten()
                at = o["ids"][b, own, seen].long()
                options: dict[str, Any] = {}
                if c.bias:
                    options["key_bias"] = o["log_bias"][b, own, seen].view(1, 1, -1)
                if "softmax_scale" in o:
                    options["softmax_scale"] = o["softmax_scale"]
                one = slice(h, h + 1)
                found = oracle.truth(
                    self.q[b : b + 1, :, one], self.k[b, at, kv][None, :, None],
                    self.v[b, at, kv][None, :, None], options,
                    self.dout[b : b + 1, :, one] if gradients else None,
                    self.dlse[b : b + 1, one] if gradients else None, rounded,
                )  # fmt: skip
                for kept, new in ((values, found.values), (bounds, found.bounds)):
                    kept["out"][b, :, h], kept["lse"][b, h] = new["out"][0, :, 0], new["lse"][0, 0]
                    if not gradients:
                        continue
                    kept["dq"][b, :, h] = new["dq"][0, :, 0]
                    kept["dk"][b, :, kv].index_add_(0, at, new["dk"][0, :, 0])
                    kept["dv"][b, :, kv].index_add_(0, at, new["dv"][0, :, 0])
                    if c.bias:
                        kept["dlog_bias"][b, own, seen] += new["dkey_bias"].flatten()
        result = Truth()
        for name in values:
            if gradients or name in ("out", "lse"):
                result.put(name, values[name], bounds[name])
        return result


def grown_tables(
    backend: str,
    codes: Tensor,
    bits: int,
    segments: tuple[int, int],
    steps: tuple[tuple[int, ...], ...],
    lengths: tuple[tuple[int, ...], ...] = (),
) -> list[Tensor]:
    """LSH tables of codes [B, H, rows, L] as ``backend`` leaves them after each step.

    segments: how many, and keys of one. steps: keys that go in per sequence, row 0 of the codes
    first each time. lengths: what tables are cut down to, per sequence. Ids behind the end are -1.
    """
    batch, heads, _, tables = codes.shape
    shape = (batch, heads, segments[0], tables)
    starts = torch.zeros(*shape, (1 << bits) + 1, dtype=torch.int32, device=codes.device)
    ids = torch.full((*shape, segments[1]), -7, dtype=torch.int16, device=codes.device)
    place = torch.arange(segments[1], device=codes.device)
    states = []

    def numbers(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(codes.device)

    first = torch.zeros(batch, dtype=torch.int32, device=codes.device)
    for step in steps:
        torch.ops.attnforge.lsh_insert(starts, ids, bits, codes, first, numbers(step), backend)
        first = first + numbers(step)
        states += [starts.clone(), ids.masked_fill(place >= starts[..., -1:], -1)]
    for length in lengths:
        torch.ops.attnforge.lsh_truncate(starts, ids, bits, numbers(length), backend)
        states += [starts.clone(), ids.masked_fill(place >= starts[..., -1:], -1)]
    return states
