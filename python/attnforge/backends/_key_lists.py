"""Lists of keys as backward kernels on GPUs take them: the entries that name each key.

Made by a sort on the device of the lists, without a synchronisation; sizes do not depend on data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnforge._params import IndexedParams
from attnforge.backends._block_lists import Ascending, Inverse, inverse

__all__ = ["naming"]


def _named(k: Tensor, p: IndexedParams) -> Tensor:
    """int32 [B, 1 | Hk, E, 1]: keys that the entries of a KV head name, Sk for none.

    The lists of its query heads stand one behind the other.
    """
    keys, ids = k.shape[1], p.ids
    room = ids.new_full((1, 1, 1), keys)
    if p.cache_seqlens is not None:
        room = p.cache_seqlens.view(-1, 1, 1).clamp(0, keys)
    real = (ids >= 0) & (ids < room)
    if p.lens is not None:
        real &= torch.arange(ids.shape[2], device=ids.device) < p.lens.unsqueeze(-1)
    if p.log_bias is not None:
        real &= ~p.log_bias.isneginf()
    lists = min(k.shape[2], ids.shape[1])
    return ids.masked_fill(~real, keys).reshape(ids.shape[0], lists, -1, 1)


def naming(k: Tensor, p: IndexedParams) -> Inverse:
    """For each key of ``k`` [B, Sk, Hk, D] the entries of its KV head that name it, ascending."""
    named = _named(k, p)
    return inverse(Ascending(named, named, None), k.shape[1], k.shape[0])
