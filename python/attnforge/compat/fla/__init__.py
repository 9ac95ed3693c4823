"""The linear attentions of flash-linear-attention (fla.ops) on attnforge's operators.

Names, argument order, defaults and layouts [B, T, H, D] are fla's. ``chunk_*``, ``fused_chunk_*``,
``fused_recurrent_*`` and ``parallel_*`` of one attention are one function here: attnforge chooses
the form. What differs: any device, states with gradients through every form, and arguments that
only tune fla's kernels (``chunk_size``, ``chunk_indices``, ``cu_seqlens_cpu``,
``checkpoint_level``, ``disable_recompute``) are accepted and change nothing.
"""

from attnforge.compat.fla._delta import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gdn,
    chunk_kda,
    fused_chunk_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    fused_recurrent_kda,
)
from attnforge.compat.fla._gated import (
    chunk_gla,
    chunk_gsa,
    chunk_hgrn,
    fused_chunk_gla,
    fused_recurrent_gla,
    fused_recurrent_gsa,
    fused_recurrent_hgrn,
)
from attnforge.compat.fla._linear import (
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_chunk_linear_attn,
    fused_chunk_retention,
    fused_chunk_simple_gla,
    fused_recurrent_lightning_attn,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
    parallel_retention,
    parallel_simple_gla,
)
from attnforge.compat.fla._softmax import (
    parallel_attn,
    parallel_forgetting_attn,
)

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gla",
    "chunk_gsa",
    "chunk_hgrn",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "parallel_attn",
    "parallel_forgetting_attn",
    "parallel_retention",
    "parallel_simple_gla",
]
