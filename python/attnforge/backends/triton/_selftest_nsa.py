"""The problems of the self-test of NSA's choice of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FlashParams, NsaSelectParams
from attnforge.reference import flash
from attnforge.reference import nsa as reference

__all__ = ["GROUPS", "problem"]

GROUPS: dict[str, frozenset[str]] = {"packed sequences": frozenset({"varlen"})}
_ROWS, _KEYS, _HEADS, _HEADS_KV, _DIM = 70, 150, 4, 2, 64
_SIZES = (8, 4, 16)  # a window, from one to the next, a block: 604 tokens in 38 blocks


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference), of importance or choice.

    Of lists, where ties of rounding may order two blocks otherwise, the importance that was chosen
    is compared.
    """
    g = torch.Generator().manual_seed(0)
    packed = bool(group)
    lead = () if packed else (1,)
    q = torch.randn(*lead, _ROWS, _HEADS, _DIM, generator=g).to(device, dtype)
    k = torch.randn(*lead, _KEYS, _HEADS_KV, _DIM, generator=g).to(device, dtype)
    at = torch.linspace(3, 603, _ROWS, device=device).int()
    p = FlashParams(None, None, None, None, None, _ROWS, _KEYS, _DIM**-0.5, -1, -1, 0.0)
    if packed:
        ends = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (_ROWS // 2, _KEYS // 2))
        cu_q, cu_k = (x.to(device) for x in ends)
        p = p._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=_ROWS // 2,
                       max_seqlen_k=_KEYS // 2)  # fmt: skip
    out, lse = torch.empty_like(q), q.new_empty((*lead, _HEADS, _ROWS), dtype=torch.float32)
    flash.forward(q, k, k, p, out, lse, q.new_empty(0))
    asked = NsaSelectParams(p, *_SIZES, 38, 5, 1, 2)
    at = at if packed else at.unsqueeze(0)
    shape = (*lead, _HEADS_KV, _ROWS)
    weights = lse.new_empty((*shape, 38))
    reference.importance(q, k, lse, at, asked, weights)
    if kind == "importance":
        found = torch.empty_like(weights)
        run(q, k, lse, at, asked, found)
        return [found], [weights]
    results = []
    for choose in (run, reference.select):
        ids = torch.empty((*shape, 5), dtype=torch.int32, device=device)
        choose(q, k, lse, at, asked, ids)
        mine = weights.gather(-1, ids.clamp_min(0).long()).masked_fill(ids < 0, 0.0)
        results.append([mine.sum(-1), (ids >= 0).sum(-1)])
    return results[0], results[1]
