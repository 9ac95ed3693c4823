"""Block-sparse attention in transformers by name: ``attn_implementation="attnforge:moba"``.

    import attnforge.integrations.block_sparse as sparse
    sparse.enable("moba", block_size=64, top_k=8)
    model.set_attn_implementation("attnforge:moba")

A *method* says which blocks of keys the queries of a layer attend to; attention over them is exact.
`METHODS` has those that need no training, to compare with each other at equal density, and
SeerAttention, whose gates are learned (`attnforge.nn.distil_seer_gate`). Any function with the call
of `Select` is a method too.

Served: causal models, padding at the ends of sequences, packed sequences by position ids, caches
(a step reads its blocks where they lie), grouped KV heads, softcap, sinks, training of the model.
Windows, chunks and bidirectional layers raise an error: their masks are sparse already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnforge
from attnforge.integrations._hook import Handle, describe, refuse, register
from attnforge.integrations._mask_plan import Piece, Plan
from attnforge.nn._rope import rotated
from attnforge.ops.seer import visible_blocks

__all__ = [
    "METHODS",
    "Handle",
    "MeanPooled",
    "MoBA",
    "Oracle",
    "Recent",
    "Seer",
    "Select",
    "SparseAttention",
    "enable",
]

_WHERE = "attnforge.integrations.block_sparse"

Select = Callable[[torch.nn.Module, Tensor, Tensor, float], attnforge.BlockSelection]
"""(attention module, q [B, Sq, Hq, D], k [B, Sk, Hk, D], both rotated, softmax scale) -> lists."""


@dataclass(frozen=True)
class MoBA:
    """Mixture of block attention as published: a choice per query and head, the own block in it."""

    block_size: int = 512
    top_k: int = 3

    def __call__(
        self, module: torch.nn.Module, q: Tensor, k: Tensor, scale: float
    ) -> attnforge.BlockSelection:
        return attnforge.moba_select(q, k, block_size=self.block_size, top_k=self.top_k)


@dataclass(frozen=True)
class _Best(ABC):
    """The top_k blocks by a score, per row of q_block queries and per query head.

    The first ``init_blocks`` and the blocks of the row's own queries come before all others and
    count towards top_k: methods with equal settings have equal density.
    """

    block_size: int = 64
    top_k: int = 8
    q_block: int = 64
    init_blocks: int = 1

    @abstractmethod
    def scores(self, module: torch.nn.Module, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[B | 1, H | 1, ceil(Sq / q_block), ceil(Sk / block_size)]."""

    def __call__(
        self, module: torch.nn.Module, q: Tensor, k: Tensor, scale: float
    ) -> attnforge.BlockSelection:
        with torch.no_grad():
            scores = self.scores(module, q, k, scale).float()
        (rows, blocks), start = scores.shape[-2:], k.shape[1] - q.shape[1]
        visible = visible_blocks(rows, blocks, self.q_block, self.block_size, start, q.device)
        column = torch.arange(blocks, device=q.device)
        first = torch.arange(rows, device=q.device)[:, None] * self.q_block + start
        forced = (column < self.init_blocks) | ((column + 1) * self.block_size > first)
        scores = scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf)
        return attnforge.BlockSelection.from_scores(
            scores, q_block=self.q_block, kv_block=self.block_size, top_k=self.top_k
        )


@dataclass(frozen=True)
class Oracle(_Best):
    """By the largest attention probability in the block: what no cheap score can know.

    Costs a dense call and its scores again. The probabilities are those over all keys, without
    softcap and sinks.
    """

    def scores(self, module: torch.nn.Module, q: Tensor, k: Tensor, scale: float) -> Tensor:
        _, lse = attnforge.flash_attention(
            q, k, k, causal=True, softmax_scale=scale, return_lse=True
        )
        return attnforge.reductions.block_max(
            q, k, lse, self.q_block, self.block_size, causal=True, softmax_scale=scale
        )


@dataclass(frozen=True)
class MeanPooled(_Best):
    """By the product of the mean query and the mean key: the usual score without training."""

    def scores(self, module: torch.nn.Module, q: Tensor, k: Tensor, scale: float) -> Tensor:
        means = attnforge.pool_blocks(k, block=self.block_size, partial=True)
        rows = attnforge.pool_blocks(q, block=self.q_block, partial=True)
        means = means.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return torch.einsum("bihd,bjhd->bhij", rows, means)


@dataclass(frozen=True)
class Recent(_Best):
    """The first blocks and the last ones (StreamingLLM in blocks): no score at all."""

    def scores(self, module: torch.nn.Module, q: Tensor, k: Tensor, scale: float) -> Tensor:
        rows, blocks = -(-q.shape[1] // self.q_block), -(-k.shape[1] // self.block_size)
        return torch.arange(blocks, device=q.device).expand(1, 1, rows, blocks)


@dataclass(frozen=True)
class Seer(_Best):
    """By learned gates: ``gates[layer]`` is an `attnforge.nn.SeerAttentionGate` of this block_size,
    of form "prefill" with q_block = block_size, of form "decode" with q_block = 1.

    Gates read queries and keys before rotation. The models' rotation, halves of all channels at
    positions that count from the first key, is undone with ``rope_base``; None: they are used
    as they come.
    """

    gates: Sequence[torch.nn.Module] | Mapping[int, torch.nn.Module] = ()
    rope_base: float | None = 10000.0

    def scores(self, module: torch.nn.Module, q: Tensor, k: Tensor, scale: float) -> Tensor:
        layer: Any = module.layer_idx
        out: Tensor = self.gates[layer](*unrotated(q, k, self.rope_base))
        return out


METHODS: dict[str, Callable[..., Select]] = {
    "mean": MeanPooled,
    "moba": MoBA,
    "oracle": Oracle,
    "recent": Recent,
    "seer": Seer,
}
"""Name -> what makes the method from its settings."""


def unrotated(q: Tensor, k: Tensor, base: float | None) -> tuple[Tensor, Tensor]:
    """Queries, the last of the keys, and keys before their rotation."""
    at = -torch.arange(k.shape[1], device=k.device)
    return rotated(q, at[k.shape[1] - q.shape[1] :], base), rotated(k, at, base)


Watch = Callable[[torch.nn.Module, Tensor, Tensor, attnforge.BlockSelection, Tensor], None]


class SparseAttention:
    """The attention function of a method, called as `transformers.attention_forward` is.

    watch: called after each piece of attention with (module, q, k, lists, LSE).
    """

    def __init__(self, select: Select, watch: Watch | None = None) -> None:
        self.select, self.watch = select, watch

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        refuse(dropout, kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                f"{_WHERE}: cu_seq_lens_q is not supported; pass position_ids, or use "
                'attn_implementation="attnforge"'
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        plan = describe(q, k, attention_mask, bool(causal), sliding_window)
        if not isinstance(plan, Plan):
            plan.split_at_restarts(position_ids)
            plan = plan.plan()
        options: dict[str, Any] = {"softcap": softcap or 0.0, "sinks": s_aux}
        options["softmax_scale"] = q.shape[-1] ** -0.5 if scaling is None else scaling
        if plan.uniform is not None:
            return self._run(module, q, k, v, plan.uniform, options), None
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])  # rows of padding stay 0
        for piece in plan.pieces:
            b = slice(piece.batch, piece.batch + 1)
            out[b] = out[b] + self._run(module, q[b], k[b], v[b], piece, options)
        return out, None

    def _run(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, p: Piece, options: dict[str, Any]
    ) -> Tensor:
        """One piece of all batch entries given; rows outside it are 0."""
        if not p.causal or p.left >= 0 or p.q_index is not None:
            raise ValueError(
                f"{_WHERE}: a mask is not plain causal (a window, chunks, a bidirectional layer, "
                'or padding between tokens); use attn_implementation="attnforge"'
            )
        rows = q.shape[1]
        q, k, v = q[:, p.q0 : p.q1], k[:, p.k0 : p.k1], v[:, p.k0 : p.k1]
        lists = self.select(module, q, k, options["softmax_scale"])
        out, lse = attnforge.block_sparse_attention(
            q, k, v, lists, causal=True, return_lse=True, **options
        )
        if self.watch is not None:
            self.watch(module, q, k, lists, lse)
        padded: Tensor = torch.nn.functional.pad(out, (0, 0, 0, 0, p.q0, rows - p.q1))
        return padded


def enable(method: str | Select, *, name: str | None = None, watch: Watch | None = None,
           **settings: Any) -> Handle:  # fmt: skip
    """Make a method available to transformers models as ``attn_implementation="attnforge:..."``.

    method: a name of `METHODS`, made with ``settings``; or a method itself, with a name of its own.
    name: what models select; default "attnforge:" and the method's name. Calling again with the
        same name replaces the method.
    watch: see `SparseAttention`.

    Returns:
        a `Handle` with `.remove()`, also a context manager.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: no such method, or the name is used by others.
        TypeError: the method has no such setting.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"{_WHERE}.enable: no method {method!r}; there are {sorted(METHODS)}")
        name = f"attnforge:{method}" if name is None else name
        select = METHODS[method](**settings)
    else:
        select = method
    if name is None or not name.startswith("attnforge:"):
        raise ValueError(f'{_WHERE}.enable: name is {name!r}; want one like "attnforge:mine"')
    function = SparseAttention(select, watch)
    return register(_WHERE, name, function, lambda taken: isinstance(taken, SparseAttention))
