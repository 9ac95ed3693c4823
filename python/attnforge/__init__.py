"""attnforge: attention kernels for PyTorch behind ``torch.ops`` operators with autograd.

    import attnforge
    out = attnforge.flash_attention(q, k, v, causal=True)      # [B, S, H, D]
    print(attnforge.explain(attnforge.flash_attention, q, k, v, causal=True))

Importing registers operators and nothing else: kernels are found and native code is loaded at
the first call.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from attnforge import backends as _backends
from attnforge import registry as _registry
from attnforge import tuning as _tuning
from attnforge._version import __version__
from attnforge.ops import _nsa_ops as _nsa_ops  # its operators; what calls them waits
from attnforge.ops import reductions, retrieval
from attnforge.ops.block_sparse import block_sparse_attention
from attnforge.ops.cope import cope_attention
from attnforge.ops.delta import delta_rule, delta_step, gated_delta_rule, kda
from attnforge.ops.flash import (
    flash_attention,
    flash_attention_varlen,
    flash_decode,
    merge_states,
)
from attnforge.ops.indexed import indexed_attention
from attnforge.ops.linear import (
    gla,
    lightning_attention,
    linear_attention,
    linear_step,
    retention,
    simple_gla,
)
from attnforge.ops.paged import cascade_attention, paged_append, paged_attention
from attnforge.ops.scan import hgrn
from attnforge.ops.selection import BlockSelection
from attnforge.registry import (
    Config,
    KernelSpec,
    SearchSpace,
    backend,
    debug,
    explain,
    list_kernels,
    register,
)
from attnforge.tuning import trace_shapes

if _TYPE_CHECKING:
    from attnforge import jit
    from attnforge.ops import patterns
    from attnforge.ops.block_sparse_decode import block_sparse_decode
    from attnforge.ops.centroid import CentroidIndex, centroid_attention
    from attnforge.ops.compressed import compressed_attention
    from attnforge.ops.gating import gated_combine
    from attnforge.ops.gsa import gsa
    from attnforge.ops.inverse import invert_selection
    from attnforge.ops.linear_models import additive_gla, mamba2_ssd
    from attnforge.ops.lsh import LSHIndex, lsh_attention
    from attnforge.ops.moba import moba_attention, moba_select
    from attnforge.ops.msa import msa_select
    from attnforge.ops.nsa import nsa_attention, nsa_select
    from attnforge.ops.pooling import pool_blocks
    from attnforge.ops.seer import seer_attention, seer_loss, seer_select, seer_targets
    from attnforge.ops.tables import rope_tables, t5_rel_bias
    from attnforge.ops.yoso import yoso_attention
    from attnforge.paged_cache import PagedKVCache
    from attnforge.tuning.runner import tune

_registry.add_source(_backends.discover)
_registry.set_table(_tuning.Tables())

# What defines no operator waits for its first use: name -> module, of itself or that has it.
_LATER = {
    "CentroidIndex": ".ops.centroid",
    "LSHIndex": ".ops.lsh",
    "PagedKVCache": ".paged_cache",
    "additive_gla": ".ops.linear_models",
    "block_sparse_decode": ".ops.block_sparse_decode",
    "centroid_attention": ".ops.centroid",
    "compressed_attention": ".ops.compressed",
    "gated_combine": ".ops.gating",
    "gsa": ".ops.gsa",
    "invert_selection": ".ops.inverse",
    "jit": ".jit",
    "lsh_attention": ".ops.lsh",
    "mamba2_ssd": ".ops.linear_models",
    "moba_attention": ".ops.moba",
    "moba_select": ".ops.moba",
    "msa_select": ".ops.msa",
    "nsa_attention": ".ops.nsa",
    "nsa_select": ".ops.nsa",
    "paged_cache": ".paged_cache",
    "patterns": ".ops.patterns",
    "pool_blocks": ".ops.pooling",
    "rope_tables": ".ops.tables",
    "seer_attention": ".ops.seer",
    "seer_loss": ".ops.seer",
    "seer_select": ".ops.seer",
    "seer_targets": ".ops.seer",
    "t5_rel_bias": ".ops.tables",
    "tune": ".tuning.runner",
    "yoso_attention": ".ops.yoso",
}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_LATER[name], __name__)
    found = vars(module).get(name, module)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BlockSelection",
    "CentroidIndex",
    "Config",
    "KernelSpec",
    "LSHIndex",
    "PagedKVCache",
    "SearchSpace",
    "__version__",
    "additive_gla",
    "backend",
    "block_sparse_attention",
    "block_sparse_decode",
    "cascade_attention",
    "centroid_attention",
    "compressed_attention",
    "cope_attention",
    "debug",
    "delta_rule",
    "delta_step",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "flash_decode",
    "gated_combine",
    "gated_delta_rule",
    "gla",
    "gsa",
    "hgrn",
    "indexed_attention",
    "invert_selection",
    "jit",
    "kda",
    "lightning_attention",
    "linear_attention",
    "linear_step",
    "list_kernels",
    "lsh_attention",
    "mamba2_ssd",
    "merge_states",
    "moba_attention",
    "moba_select",
    "msa_select",
    "nsa_attention",
    "nsa_select",
    "paged_append",
    "paged_attention",
    "patterns",
    "pool_blocks",
    "reductions",
    "register",
    "retention",
    "retrieval",
    "rope_tables",
    "seer_attention",
    "seer_loss",
    "seer_select",
    "seer_targets",
    "simple_gla",
    "t5_rel_bias",
    "trace_shapes",
    "tune",
    "yoso_attention",
]
