"""The class that SGLang asks a backend for (see `sglang.register`).

SGLang keeps one pool of tokens [slots, Hk, D] per layer and, per request, the list of its slots. A
slot is a page of one token, so the list is a block table: nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from attnforge.ops.paged import paged_attention

__all__ = ["Backend", "Metadata"]

_WHERE = "attnforge.integrations.sglang"


@dataclass
class Metadata:
    """One batch, for all layers."""

    block_table: Tensor  # [B, longest] int32: slots
    seq_lens: Tensor  # [B] int32, the new tokens among them
    cu_seqlens_q: Tensor  # [B + 1] int32
    max_seqlen_q: int


class Backend(AttentionBackend):  # type: ignore[misc]
    """Decode and extend of decoder models, with windows, softcap and sinks."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        if getattr(model_runner, "use_mla_backend", False):
            raise NotImplementedError(f"{_WHERE}: a model with latent attention (MLA)")
        self.metadata: Metadata | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Table and boundaries of a batch."""
        batch = forward_batch
        lengths = batch.seq_lens.to(torch.int32)
        if batch.forward_mode.is_decode_or_idle():
            rows, longest = torch.ones_like(lengths), 1
        else:
            rows = batch.extend_seq_lens.to(torch.int32)
            longest = max(batch.extend_seq_lens_cpu, default=0)
        cu = torch.nn.functional.pad(rows.cumsum(0, dtype=torch.int32), (1, 0))
        # Lengths on the host, where SGLang has them, spare a wait for the device.
        known = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.seq_lens
        width = int(known.max()) if known.numel() else 0
        table = batch.req_to_token_pool.req_to_token[batch.req_pool_indices.long(), :width]
        self.metadata = Metadata(table.to(torch.int32), lengths, cu, longest)

    def _attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """q [T, Hq * D] -> [T, Hq * Dv]; k and v [T, Hk, D | Dv] go into the pool first."""
        kind = getattr(layer.attn_type, "value", layer.attn_type)
        given = sorted(name for name, value in others.items() if value is not None)
        if layer.is_cross_attention or kind != "decoder" or given:
            raise NotImplementedError(
                f"{_WHERE}: cross={layer.is_cross_attention}, type {kind!r}, arguments {given}; "
                "want self-attention of a decoder"
            )
        m = self.metadata
        if m is None:
            raise RuntimeError(f"{_WHERE}: forward before init_forward_metadata")
        pool = forward_batch.token_to_kv_pool
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        window = layer.sliding_window_size  # keys to the left of the own one; -1: all
        left = -1 if window is None or window < 0 else window
        out: Tensor = paged_attention(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            pool.get_key_buffer(layer.layer_id).unsqueeze(1),
            pool.get_value_buffer(layer.layer_id).unsqueeze(1),
            block_table=m.block_table,
            cache_seqlens=m.seq_lens,
            cu_seqlens_q=m.cu_seqlens_q,
            max_seqlen_q=m.max_seqlen_q,
            window_size=(left, 0),
            softcap=float(layer.logit_cap or 0.0),
            sinks=sinks,
            softmax_scale=layer.scaling,
        )
        return out.flatten(1)

    forward_decode = _attend
    forward_extend = _attend

    def support_triton(self) -> bool:
        """Whether SGLang may run Triton kernels of its own beside; they do not meet ours."""
        return True
