"""The problems of the self-test of the block-sparse kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import BlockLists, FlashParams, FlashTape
from attnforge.reference import block_sparse as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {
    "packed sequences": frozenset({"varlen"}),
    "softcap, ALiBi and used keys": frozenset({"softcap", "alibi", "seqused_k"}),
}
_ROWS, _KEYS, _HEADS, _HEADS_KV, _DIM = 70, 150, 4, 2, 64
_Q_BLOCK, _KV_BLOCK = 16, 32


def _params(group: str, device: torch.device) -> FlashParams:
    p = FlashParams(None, None, None, None, None, _ROWS, _KEYS, _DIM**-0.5, -1, 0, 0.0)
    if group == "packed sequences":
        rows, keys = (
            torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device)
            for n in (_ROWS // 2, _KEYS // 2)
        )
        return p._replace(cu_seqlens_q=rows, cu_seqlens_k=keys, max_seqlen_q=_ROWS // 2,
                          max_seqlen_k=_KEYS // 2)  # fmt: skip
    if group:
        used = torch.tensor([_KEYS - 20], dtype=torch.int32, device=device)
        slopes = torch.linspace(0.1, 0.4, _HEADS, device=device)
        return p._replace(softcap=5.0, alibi_slopes=slopes, seqused_k=used)
    return p


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference), of ``fwd`` or ``bwd``."""
    g = torch.Generator().manual_seed(0)
    p = _params(group, device)
    packed = p.cu_seqlens_q is not None
    lead = () if packed else (1,)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=g).to(device, dtype)

    q, k = normal(_ROWS, _HEADS, _DIM), normal(_KEYS, _HEADS_KV, _DIM)
    v, dout = normal(_KEYS, _HEADS_KV, _DIM), normal(_ROWS, _HEADS, _DIM)
    rows = 2 * -(-(_ROWS // 2) // _Q_BLOCK) if packed else -(-_ROWS // _Q_BLOCK)
    blocks = -(-_KEYS // _KV_BLOCK)
    ids = torch.randint(-1, blocks, (*lead, _HEADS_KV, rows, 4), generator=g, dtype=torch.int32)
    lists = BlockLists(ids.to(device), None, _Q_BLOCK, _KV_BLOCK)

    def outputs() -> tuple[Tensor, Tensor]:
        lse = torch.empty((*lead, _HEADS, _ROWS), dtype=torch.float32, device=device)
        return torch.empty_like(q), lse

    got, want, none = outputs(), outputs(), q.new_empty(0)
    low = torch.empty_like(q) if kind == "bwd" and dtype.itemsize == 2 else none
    reference.forward(q, k, v, p, lists, *want, low)
    if kind == "fwd":
        run(q, k, v, p, lists, *got, none)
        return list(got), list(want)
    tape, found = FlashTape(q, k, v, *want, low), []
    for backward in (run, reference.backward):
        dq, dk, dv = map(torch.empty_like, (q, k, v))
        grads = (dq, dk, dv, torch.empty(_HEADS, device=device))
        backward(dout, None, tape, p, lists, grads)
        found.append(list(grads[:3]))
    return found[0], found[1]
