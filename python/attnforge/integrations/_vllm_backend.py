"""The classes that vLLM asks a backend for. Imported by vLLM, by name (see `vllm.register`).

vLLM owns the cache and the batch: blocks [N, 2, block_size, Hk, D], packed queries of all requests,
one table of blocks. That is what `paged_attention` takes, prefill chunks and decodes in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)

from attnforge.ops.paged import paged_attention

__all__ = ["Backend", "Builder", "Implementation", "Metadata"]

_WHERE = "attnforge.integrations.vllm"


@dataclass
class Metadata:
    """One batch: ``tokens`` packed queries; what lies behind them in vLLM's buffers is padding."""

    tokens: int
    cu_seqlens_q: Tensor  # [B + 1] int32
    max_seqlen_q: int
    seq_lens: Tensor  # [B] int32, the new tokens among them
    block_table: Tensor  # [B, max_blocks] int32
    slots: Tensor  # [tokens] int64: block * block_size + offset; -1 for padding


class Builder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Metadata of a batch, for all layers."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Metadata:
        """The fields under our names; nothing is read on the host."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError(f"{_WHERE}: causal={common.causal}; want True")
        return Metadata(
            tokens=common.num_actual_tokens,
            cu_seqlens_q=common.query_start_loc,
            max_seqlen_q=common.max_query_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slots=common.slot_mapping[: common.num_actual_tokens],
        )


class Implementation(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"{_WHERE}: attention of type {attn_type}; want a decoder's")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes)
        self.window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        self.softcap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.writes = kv_sharing_target_layer_name is None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [T, Hq, D], key, value [T, Hk, D] -> output [T, Hq * D], which is filled."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{_WHERE}: output in quantised form; want output_scale=None")
        if attn_metadata is None:  # vLLM measures memory without a batch
            return output.fill_(0)
        m = attn_metadata
        if self.writes:
            # Block 0 is nobody's in vLLM: there padding goes.
            slots = m.slots.clamp_min(0)
            block, offset = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
            kv_cache[block, 0, offset] = key[: m.tokens].to(kv_cache.dtype)
            kv_cache[block, 1, offset] = value[: m.tokens].to(kv_cache.dtype)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(query.device)
        result: Tensor = paged_attention(
            query[: m.tokens],
            kv_cache[:, 0],
            kv_cache[:, 1],
            block_table=m.block_table,
            cache_seqlens=m.seq_lens,
            cu_seqlens_q=m.cu_seqlens_q,
            max_seqlen_q=m.max_seqlen_q,
            window_size=self.window,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            softmax_scale=self.scale,
        )
        output[: m.tokens].view(result.shape).copy_(result)
        return output


class Backend(AttentionBackend):  # type: ignore[misc]
    """What attnforge serves, in vLLM's words."""

    supported_dtypes = (torch.float16, torch.bfloat16, torch.float32)
    supported_kv_cache_dtypes = ("auto", "float16", "bfloat16")
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enumeration; other names are its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        """Of a layer."""
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """Of a batch's metadata."""
        return Builder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Blocks outermost, K before V in each."""
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Those of the kernels; the reference would serve others, slowly."""
        return head_size % 8 == 0 and 8 <= head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks."""
        return True
