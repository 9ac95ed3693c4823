"""Softmax attention with the tokens of a sequence spread over ranks: context parallelism.

Every rank of W holds its share of q, k and v, [B, S / W, H, D], and gets its rows of the output:

    from attnforge.distributed import context

    q, k, v = (context.shard(x, group=group) for x in (q, k, v))
    out = context.ring_attention(q, k, v, causal=True, group=group)
    whole = context.unshard(out, group=group)

ring_attention: K and V go round, step by step, beside the products; W - 1 shares are sent, in the
    backward twice that and one more. Keeps one share.
gather_attention: the same keys in one all-gather, the gradients in one all-to-all. Keeps all keys.
ulysses_attention: q, k, v and out by all-to-all over heads. Keeps 1 / W of the heads of all tokens.
mesh_attention: Ulysses inside, a ring outside (LoongTrain).
decode_attention: new rows over a cache in shares; out and LSE of the rows are gathered.

Layouts: ``zigzag`` (the default) cuts the sequence into 2 W pieces and gives rank r pieces r and
2 W - 1 - r, so that causal masks leave all ranks the same work; ``contiguous`` gives rank r piece r
of W. All functions of one model must be told the same layout. S must be a multiple of 2 W (or W).

Options that the functions share:

    causal, window_size, softmax_scale, softcap, backend: as in ``flash_attention``, with positions
        in the whole sequence, whose queries and keys are the same tokens.
    cu_seqlens: [N + 1] int32, documents packed into a batch of one: boundaries of the whole,
        the same on all ranks; a row sees its own document.
    return_lse: also the LSE [B, Hq, S / W]; differentiable.
    group: a process group; default: all ranks.

Every rank must call, also in the backward. Results equal one process's to rounding. Sources: Ring
Attention (Liu et al., 2023), striped and zigzag orders (Brandon et al., 2023), DeepSpeed-Ulysses
(Jacobs et al., 2023), LoongTrain (Gu et al., 2024), Llama 3's all-gather (2024), tree and
Infinite-LLM decoding by LSE (Shyam et al., Lin et al., 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnforge.distributed._pairs import Mask
from attnforge.distributed._ring import Gathered, Ring, Share, pieces
from attnforge.distributed._segments import gather
from attnforge.distributed._transpose import all_to_all
from attnforge.ops import _checks
from attnforge.ops._checks import fail
from attnforge.ops.flash import flash_attention, flash_attention_varlen, flash_decode, merge_states

__all__ = [
    "decode_attention",
    "gather_attention",
    "mesh_attention",
    "ring_attention",
    "shard",
    "ulysses_attention",
    "unshard",
]

Window = tuple[int, int]


def _ranks(op: str, group: Any) -> tuple[int, int]:
    """(rank, world); a clear error without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        fail(op, "no process group; want torch.distributed.init_process_group first", RuntimeError)
    rank = dist.get_rank(group)
    if rank < 0:
        fail(op, "this process is not in the group; want calls from its members alone")
    return rank, dist.get_world_size(group)


def shard(x: Tensor, dim: int = 1, layout: str = "zigzag", group: Any = None) -> Tensor:
    """This rank's tokens of a whole tensor, along ``dim``; a differentiable index."""
    rank, world = _ranks("context.shard", group)
    order = pieces("context.shard", layout, rank, world, x.shape[dim])
    return torch.cat([x.narrow(dim, start, length) for start, length in order], dim)


def unshard(x: Tensor, dim: int = 1, layout: str = "zigzag", group: Any = None) -> Tensor:
    """The whole tensor of every rank's tokens, on every rank; no gradient."""
    _, world = _ranks("context.unshard", group)
    every = [part for (part,) in gather((x.detach().contiguous(),), group)]
    size = x.shape[dim] * world
    whole = x.new_empty(*x.shape[:dim], size, *x.shape[dim + 1 :])
    for rank, part in enumerate(every):
        at = 0
        for start, length in pieces("context.unshard", layout, rank, world, size):
            whole.narrow(dim, start, length).copy_(part.narrow(dim, at, length))
            at += length
    return whole


def _share(
    op: str, q: Tensor, k: Tensor, v: Tensor, group: Any, layout: str, cu_seqlens: Tensor | None
) -> Share:
    rank, world = _ranks(op, group)
    _checks.tensors(op, q, k, v)
    _checks.dense(op, q, k, v)
    if q.shape[1] != k.shape[1]:
        fail(op, f"q has {q.shape[1]} tokens on this rank, k {k.shape[1]}; want the same tokens")
    size = q.shape[1] * world
    if cu_seqlens is not None and (q.shape[0] != 1 or int(cu_seqlens[-1]) > size):
        fail(op, f"cu_seqlens ends at {int(cu_seqlens[-1])} beside {q.shape[0]} x {size} tokens; "
                 "want a batch of one and boundaries within the whole sequence")  # fmt: skip
    return Share(op, rank, world, group, layout, size, cu_seqlens)


def _attend(
    function: Any, q: Tensor, k: Tensor, v: Tensor, share: Share, mask: Mask, return_lse: bool
) -> Any:
    out, lse = function.apply(q, k, v, share, mask)
    return (out, lse) if return_lse else out


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    group: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """K and V go round the ring while each rank attends to what it holds at the moment.

    Step s of W sends this step's keys on while it computes with them. Blocks that the mask hides
    are skipped. The backward sends gradients of K and V round with them, in fp32.
    """
    op = "context.ring_attention"
    share = _share(op, q, k, v, group, layout, cu_seqlens)
    mask = Mask(*_checks.window(op, window_size, causal), softmax_scale, softcap, backend)
    return _attend(Ring, q, k, v, share, mask, return_lse)


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    group: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """One all-gather of K and V, then local attention; for few KV heads and short rings."""
    op = "context.gather_attention"
    share = _share(op, q, k, v, group, layout, cu_seqlens)
    mask = Mask(*_checks.window(op, window_size, causal), softmax_scale, softcap, backend)
    return _attend(Gathered, q, k, v, share, mask, return_lse)


def _by_heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S / W, H, D] -> [B, S, H / W, D], tokens in the order of the ranks."""
    _, world = _ranks(op, group)
    if q.shape[2] % world:
        fail(op, f"q has {q.shape[2]} heads; want a multiple of the {world} ranks")
    if k.shape[2] % world:  # fewer KV heads than ranks, or an uneven share: repeat them
        want = q.shape[2] if world % k.shape[2] else world
        k, v = (x.repeat_interleave(want // x.shape[2], 2) for x in (k, v))
    return tuple(all_to_all(x, 2, 1, group) for x in (q, k, v))  # type: ignore[return-value]


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    group: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Every rank gets all tokens of its heads, attends, and sends the tokens back.

    Hq must be a multiple of W; KV heads that do not divide by W are repeated.
    """
    op = "context.ulysses_attention"
    share = _share(op, q, k, v, group, layout, cu_seqlens)
    order = share.order().to(q.device)
    back = torch.argsort(order)
    q, k, v = (x[:, back] for x in _by_heads(op, q, k, v, group))
    options: dict[str, Any] = {
        "causal": causal, "window_size": window_size, "softcap": softcap,
        "softmax_scale": softmax_scale, "backend": backend, "return_lse": True,
    }  # fmt: skip
    if cu_seqlens is None:
        out, lse = flash_attention(q, k, v, **options)
    else:
        bounds = cu_seqlens.to(torch.int32)
        packed = (x.squeeze(0) for x in (q, k, v))
        out, lse = flash_attention_varlen(
            *packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options
        )
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    out = all_to_all(out[:, order], 1, 2, group)
    if not return_lse:
        return out
    return out, all_to_all(lse[..., order], 2, 1, group)


def mesh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_group: Any,
    ring_group: Any,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Ulysses over head_group, a ring over ring_group: both dimensions of a DeviceMesh.

    Tokens: ``shard(x, group=ring_group)`` and of that the head_group's ``contiguous`` shares.
    head_group should be the inner, faster one, as it moves q and out too.
    """
    op = "context.mesh_attention"
    q, k, v = _by_heads(op, q, k, v, head_group)
    out, lse = ring_attention(
        q, k, v, causal=causal, window_size=window_size, softcap=softcap,
        softmax_scale=softmax_scale, cu_seqlens=cu_seqlens, layout=layout, group=ring_group,
        return_lse=True, backend=backend,
    )  # fmt: skip
    out = all_to_all(out, 1, 2, head_group)
    return (out, all_to_all(lse, 2, 1, head_group)) if return_lse else out


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    group: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """``flash_decode`` over a cache whose keys are spread over ranks, by one all-gather of results.

    q [B, Sq, Hq, D], the same on all ranks; k_cache, v_cache [B, Sk, Hk, D] this rank's keys, of
    which cache_seqlens [B] int32 are valid, none too. causal: the rows' own keys are the last ones
    of this rank's cache; set it on that rank alone. No gradient. With ``flash_attention`` over
    [anchor | own block] on each rank before it, this is Star Attention (Acharya et al., 2024).
    """
    _ranks("context.decode_attention", group)
    with torch.no_grad():
        out, lse = flash_decode(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, causal=causal, softcap=softcap,
            softmax_scale=softmax_scale, return_lse=True, backend=backend,
        )  # fmt: skip
        outs, lses = zip(*gather((out.to(lse.dtype), lse), group), strict=True)
        out, lse = merge_states(outs, lses)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out
