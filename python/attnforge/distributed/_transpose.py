"""The all-to-all that trades one dimension of a tensor for another, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_to_all"]


def _run(x: Tensor, scatter: int, join: int, group: Any) -> Tensor:
    world = dist.get_world_size(group)
    parts = torch.stack(x.tensor_split(world, scatter)).contiguous()  # [W, ..]
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(0), join)


class _AllToAll(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: int, join: int, group: Any) -> Tensor:
        ctx.dims, ctx.group = (scatter, join), group
        return _run(x, scatter, join, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scatter, join = ctx.dims
        return _run(grad, join, scatter, ctx.group), None, None, None


def all_to_all(x: Tensor, scatter: int, join: int, group: Any) -> Tensor:
    """Rank r gets part r of dimension ``scatter`` from all ranks, in their order along ``join``."""
    run: Any = _AllToAll.apply
    return run(x, scatter, join, group)  # type: ignore[no-any-return]
