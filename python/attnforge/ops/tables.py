"""Small tables that features of the flash functions take: T5's relative bias, rotary angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnforge.ops._checks import fail, tensor

__all__ = ["rope_tables", "t5_rel_bias"]


def t5_rel_bias(table: Tensor, *, bidirectional: bool = True, max_distance: int = 128) -> Tensor:
    """``rel_bias`` [Hq, 2 max_distance + 1] from T5's learned buckets; differentiable.

    table: [num_buckets, Hq], as T5's ``relative_attention_bias`` embedding has it. Distances are
    key minus query; half of the buckets are exact, the others grow with the logarithm up to
    max_distance (Raffel et al., 2020, section 2.1). T5 itself does not scale its logits: pass
    ``softmax_scale=1.0`` beside it. No S x S tensor is made, forward or backward.

    Raises ValueError on a table that has no even number of buckets.
    """
    tensor("t5_rel_bias", "table", table)
    if table.dim() != 2 or table.shape[0] < 4 or table.shape[0] % 2:
        fail(
            "t5_rel_bias",
            f"table has shape {tuple(table.shape)}; want [num_buckets, heads_q] with an even "
            "number of buckets, at least 4",
        )
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = buckets // 2
    if max_distance <= exact:
        fail("t5_rel_bias", f"max_distance is {max_distance}; want more than {exact} exact buckets")
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device)
    size = distance.abs() if bidirectional else (-distance).clamp_min(0)
    growth = torch.log(size.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (buckets - exact)).to(torch.int64)).clamp_max(buckets - 1)
    bucket = torch.where(size < exact, size, far)
    if bidirectional:
        bucket = bucket + torch.where(distance > 0, buckets, 0)
    return table[bucket].transpose(0, 1)


def rope_tables(
    length: int, rotary_dim: int, *, base: float | Tensor = 10000.0, device: str | None = None
) -> tuple[Tensor, Tensor]:
    """``rope`` = (cos, sin), fp32 [1, length, rotary_dim / 2]: angle p * base^(-2 n / rotary_dim).

    base: a number, or one per KV head as a tensor [Hk], which gives [Hk, length, rotary_dim / 2].
    rotary_dim: an even number of channels; fewer than head_dim leave the others alone.
    Source: Su et al., 2021.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        fail("rope_tables", f"rotary_dim is {rotary_dim}; want an even number of channels, >= 2")
    bases = torch.as_tensor(base, dtype=torch.float64, device=device).reshape(-1, 1)
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=bases.device) / rotary_dim
    position = torch.arange(length, dtype=torch.float64, device=bases.device)
    angle = position.view(1, -1, 1) * (bases**-exponent).unsqueeze(1)
    return angle.cos().float(), angle.sin().float()
