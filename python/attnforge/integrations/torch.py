"""torch's own attention functions on attnforge.

    import attnforge.integrations.torch as af
    with af.sdpa():                       # this block's F.scaled_dot_product_attention
        model(x)

    af.register()                         # offers "attnforge" to torch.nn.attention
    torch.nn.attention.activate_flash_attention_impl("attnforge")

Nothing changes until one of these is called. `sdpa` sees Python calls on any device and serves
what torch's function does; `register` (torch 2.13) works below autograd, so that C++ callers and
`nn.MultiheadAttention` are served too, and takes the calls for which torch picks its flash kernel.
`varlen_attn` and `flex_attention` have the signatures of `torch.nn.attention`; `nested_attention`
takes jagged nested tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnforge.integrations._nested import nested_attention
from attnforge.integrations._torch_provider import register, top_left
from attnforge.ops._checks import fail
from attnforge.ops._features import drawn_seed
from attnforge.ops.block_sparse import block_sparse_attention
from attnforge.ops.flash import flash_attention, flash_attention_varlen
from attnforge.ops.paged import paged_attention
from attnforge.ops.selection import BlockSelection

__all__ = [
    "flex_attention",
    "nested_attention",
    "register",
    "scaled_dot_product_attention",
    "sdpa",
    "varlen_attn",
]

_ORIGINAL: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _not_served(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why torch has to compute this call, or None."""
    tensors = (query, key, value)
    if query.dtype not in _DTYPES or any(x.dtype is not query.dtype for x in tensors):
        return f"dtypes {[str(x.dtype) for x in tensors]} are not one floating dtype"
    if any(x.dim() < 2 for x in tensors):
        return "fewer than two dimensions"
    if any(x.is_nested for x in tensors):
        jagged = all(x.is_nested and x.layout is torch.jagged and x.dim() == 4 for x in tensors)
        if not jagged or attn_mask is not None:
            return "nested tensors other than jagged [B, H, S, D] without a mask"
    return None


def _jagged(query: Any, key: Any, value: Any, is_causal: bool, options: dict[str, Any]) -> Tensor:
    """Attention of jagged [B, H, S, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if is_causal and not torch.equal(_lengths(q), _lengths(k)):
        fail("scaled_dot_product_attention", "is_causal is True with nested queries and keys of "
             "different lengths; want equal lengths, as torch aligns to the top left")  # fmt: skip
    out: Tensor = nested_attention(q, k, v, causal=is_causal, **options)
    return out.transpose(1, 2)


def _lengths(x: Any) -> Any:
    lengths = x.lengths()
    return x.offsets().diff() if lengths is None else lengths


def _batched(x: Tensor, lead: torch.Size) -> Tensor:
    """[.., H, S, D] -> [B, S, H, D] with every dimension before H in B."""
    x = x.expand(*lead, *x.shape[-2:])
    if x.dim() == 2:
        x = x.unsqueeze(0)
    return x.reshape(-1, *x.shape[-3:]).transpose(1, 2)


def _masked(mask: Tensor, lead: torch.Size, sq: int, sk: int) -> dict[str, Tensor]:
    """A mask [.., Sq, Sk] as ``mask`` (bool) or ``bias``, of 1 where it broadcasts."""
    shape = (1,) * max(0, len(lead) + 2 - mask.dim()) + tuple(mask.shape)
    mask = mask.reshape(shape).expand(*shape[:-2], sq, sk)
    if len(lead) == 0:
        mask = mask.unsqueeze(0)
    before = mask.shape[:-3]
    if all(n == 1 for n in before):
        mask = mask.reshape(1, *mask.shape[-3:])
    else:
        mask = mask.expand(*lead[:-1], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    return {"mask": mask} if mask.dtype is torch.bool else {"bias": mask}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of query [.., Hq, L, E], key, value [.., H, S, E|Ev].

    Semantics are torch's: is_causal aligns to the top left, a bool attn_mask says what takes part,
    a floating one is added, leading dimensions broadcast, nested jagged tensors are packed
    sequences. A row that sees nothing gives 0. Raises as torch does where both a mask and
    is_causal are given, and on more query than key heads without enable_gqa.
    """
    op = "scaled_dot_product_attention"
    if why := _not_served(query, key, value, attn_mask):
        fail(op, f"{why}; want what torch's function takes in one floating dtype")
    if attn_mask is not None and is_causal:
        fail(op, "attn_mask is given beside is_causal=True; want one of them")
    options: dict[str, Any] = {"softmax_scale": scale}
    if dropout_p > 0.0:
        options |= {"dropout_p": dropout_p, "dropout_seed": drawn_seed()}
    if query.is_nested:
        return _jagged(query, key, value, is_causal, options)
    heads = [x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value)]
    if not enable_gqa and heads[0] != heads[1] and 1 not in (heads[0], heads[1]):
        fail(op, f"query has {heads[0]} heads, key {heads[1]}; want equal, or enable_gqa=True")
    grouped = enable_gqa and heads[0] != heads[1]
    leads = [x.shape[:-3] for x in (query, key, value)]
    batch: torch.Size = torch.broadcast_shapes(*leads)  # type: ignore[no-untyped-call]
    mine = heads[0] if grouped else max(heads)
    if grouped:
        if heads[1] != heads[2]:
            key, value = _equal_heads(key, value)
        theirs = max(heads[1:])
    else:
        theirs = mine
    flat = query.dim() == 2 and key.dim() == 2 and value.dim() == 2
    lead_q = torch.Size() if flat else torch.Size((*batch, mine))
    lead_k = torch.Size() if flat else torch.Size((*batch, theirs))
    sq, sk = query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        options |= _masked(attn_mask, lead_q, sq, sk)
    if is_causal:
        key, value, options["window_size"] = top_left(sq, key, value)
    out = flash_attention(
        _batched(query, lead_q), _batched(key, lead_k), _batched(value, lead_k), **options
    )
    result: Tensor = out.transpose(1, 2).reshape(*lead_q, sq, value.shape[-1])
    return result


def _equal_heads(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of different head counts, repeated to the larger one (torch allows it)."""
    top = max(key.shape[-3], value.shape[-3])
    return tuple(x.repeat_interleave(top // x.shape[-3], -3) for x in (key, value))  # type: ignore[return-value]


class _Sdpa(TorchFunctionMode):
    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _ORIGINAL:
            return func(*args, **kwargs)
        tensors = [*args[:4]]
        names = ("query", "key", "value", "attn_mask")
        tensors += [kwargs.get(name) for name in names[len(tensors) :]]
        if not self.strict and _not_served(*tensors):
            return func(*args, **kwargs)
        return scaled_dot_product_attention(*args, **kwargs)


@contextmanager
def sdpa(strict: bool = False) -> Iterator[None]:
    """Within it, ``F.scaled_dot_product_attention`` runs on attnforge, on CPU tensors too.

    Gradients of calls made within it are attnforge's as well. What attnforge does not serve
    (other dtypes, strided nested tensors) runs as before; strict=True raises ValueError instead.
    """
    with _Sdpa(strict):
        yield


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """``torch.nn.attention.varlen.varlen_attn``: query [Tq, Hq, D], key, value [Tk, H, D].

    With block_table [B, pages] key and value are pages [P, page_size, H, D] and lengths are
    seqused_k, else those of cu_seq_k. window_size (-1, 0) is causal, bottom-right aligned.
    return_aux: an ``AuxRequest``; with lse=True the result is (out, lse [Hq, Tq]).
    """
    op = "varlen_attn"
    heads = key.shape[-2]
    if not enable_gqa and query.shape[1] != heads:
        fail(op, f"query has {query.shape[1]} heads, key {heads}; want equal, or enable_gqa=True")
    options: dict[str, Any] = {
        "softmax_scale": scale, "window_size": window_size, "causal": window_size[1] == 0,
        "return_lse": True,
    }  # fmt: skip
    if block_table is not None:
        if seqused_k is None and cu_seq_k is None:
            fail(op, "seqused_k and cu_seq_k are None beside block_table; want the lengths")
        lengths = seqused_k if seqused_k is not None else cu_seq_k.diff()  # type: ignore[union-attr]
        out, lse = paged_attention(
            query, key, value, block_table=block_table, cache_seqlens=lengths,
            cu_seqlens_q=cu_seq_q, max_seqlen_q=max_q, num_splits=num_splits or 0, **options,
        )  # fmt: skip
    else:
        if cu_seq_k is None:
            fail(op, "cu_seq_k is None without block_table; want the boundaries of the keys")
        out, lse = flash_attention_varlen(
            query, key, value, cu_seqlens_q=cu_seq_q, cu_seqlens_k=cu_seq_k, max_seqlen_q=max_q,
            max_seqlen_k=max_k, seqused_k=seqused_k, **options,
        )  # fmt: skip
    return (out, lse) if getattr(return_aux, "lse", False) else out


def _is_causal(block_mask: Any, lists: Tensor, size: tuple[int, int]) -> bool:
    """Whether every listed partial block is masked as causal attention would mask it.

    Reads the mask function on the tokens of those blocks alone.
    """
    batch, head, row, column = lists.to(torch.bool).nonzero().unbind(-1)
    if not batch.numel():
        return True
    (sq, sk), (q_block, kv_block) = size, block_mask.BLOCK_SIZE
    rows = torch.arange(q_block, device=lists.device)
    keys = torch.arange(kv_block, device=lists.device)
    for b, h, r, c in zip(*(x.tolist() for x in (batch, head, row, column)), strict=True):
        i, j = (r * q_block + rows).view(-1, 1), (c * kv_block + keys).view(1, -1)
        seen = torch.as_tensor(block_mask.mask_mod(torch.tensor(b), torch.tensor(h), i, j))
        valid = (i < sq) & (j < sk)
        if not torch.equal(seen & valid, (j <= i) & valid):
            return False
    return True


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Any:
    """``flex_attention`` with a BlockMask: query [B, Hq, L, E], key, value [B, H, S, E|Ev].

    Blocks of a BlockMask that are causal inside (L = S) run on ``block_sparse_attention`` at a cost
    that follows their number. Other partial blocks need every token's mask: the mask function is
    evaluated once into [B|1, H|1, L, S] bool. Score functions are keywords of
    ``flash_attention`` (softcap, ALiBi, biases). LSE is natural log, as flex's.
    """
    op = "flex_attention"
    if not hasattr(block_mask, "mask_mod"):
        fail(op, f"block_mask is {type(block_mask).__name__}; want a flex BlockMask", TypeError)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        fail(op, f"query has {query.shape[1]} heads, key {key.shape[1]}; want equal, or "
                 "enable_gqa=True")  # fmt: skip
    sq, sk = query.shape[2], key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    partial = _dense_lists(block_mask.kv_num_blocks, block_mask.kv_indices)
    options: dict[str, Any] = {"softmax_scale": scale, "return_lse": True}
    if sq == sk and _is_causal(block_mask, partial, (sq, sk)) and _below(block_mask):
        selection = BlockSelection.from_flex(block_mask)
        out, lse = block_sparse_attention(q, k, v, selection, causal=True, **options)
    else:
        out, lse = flash_attention(q, k, v, mask=_token_mask(block_mask, sq, sk), **options)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _dense_lists(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    """bool [B, H, rows, columns] of lists of blocks."""
    if counts is None or indices is None:
        return torch.zeros(0, 0, 0, 0, dtype=torch.bool)
    slot = torch.arange(indices.shape[-1], device=indices.device)
    mask = torch.zeros_like(indices, dtype=torch.int32)
    mask.scatter_add_(-1, indices.long(), (slot < counts.unsqueeze(-1)).to(torch.int32))
    return mask > 0


def _below(block_mask: Any) -> bool:
    """Whether all full blocks lie below the diagonal, where causal masks nothing."""
    full = _dense_lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    q_block, kv_block = block_mask.BLOCK_SIZE
    _, _, row, column = full.nonzero().unbind(-1)
    return bool(((column + 1) * kv_block - 1 <= row * q_block).all())


def _token_mask(block_mask: Any, sq: int, sk: int) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = block_mask.kv_num_blocks.shape[:2]
    device = block_mask.kv_indices.device
    return create_mask(block_mask.mask_mod, batch, heads, sq, sk, device=str(device))
