"""SeerAttention's gates for a transformers model: one per layer, learned from the model's own runs.

gates = seer.make_gates(model, block_size=64)
losses = seer.distil(model, gates, rows, steps=200)     # rows: token ids [N, S]
sparse.enable("seer", gates=gates, rope_base=seer.rope_base(model), top_k=8)
model.set_attn_implementation("attnforge:seer")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import attnforge
import attnforge.nn as anf
from attnforge.integrations import block_sparse as sparse
from attnforge.nn.seer_training import SeerSample, distil_seer_gate, seer_sample

__all__ = ["Gates", "distil", "make_gates", "rope_base", "samples"]

_WHERE = "attnforge.integrations.seer"

Gates = Sequence[anf.SeerAttentionGate]
"""One per layer; an `nn.ModuleList` made of them saves or moves them together."""


def rope_base(model: Any) -> float:
    """The base of a model's rotation.

    Raises:
        ValueError: the rotation is scaled, partial or none: it cannot be undone by its base.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    base = rope.get("rope_theta", getattr(config, "rope_theta", None))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0 or base is None:
        raise ValueError(
            f"{_WHERE}: rotation {rope or None} is not supported; want rope_type 'default' of all "
            "channels"
        )
    return float(base)


def make_gates(model: Any, *, block_size: int = 64, **options: Any) -> Gates:
    """A prefill gate for each layer, at the model's sizes; options of `SeerAttentionGate`."""
    config = model.config
    options.setdefault("rope_base", rope_base(model))
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (dim, config.num_attention_heads, config.num_key_value_heads)
    return [
        anf.SeerAttentionGate(*sizes, block_size=block_size, **options)
        for _ in range(config.num_hidden_layers)
    ]


@torch.no_grad()
def samples(model: Any, gates: Gates, rows: Iterable[Tensor]) -> list[list[SeerSample]]:
    """For each gate what it learns from: one pass of the model per row of token ids [S].

    Holds queries and keys of all layers: S (Hq + Hk) D elements per layer and row.
    """
    base = rope_base(model)
    found: list[list[SeerSample]] = [[] for _ in gates]
    everything = sparse.Recent(block_size=4096, top_k=1 << 20)

    def look(module: Any, q: Tensor, k: Tensor, scale: float) -> attnforge.BlockSelection:
        layer = module.layer_idx
        gate, raw = gates[layer], sparse.unrotated(q, k, base)
        found[layer].append(seer_sample(gate, *raw, q, k, softmax_scale=scale))
        return everything(module, q, k, scale)

    before = model.config._attn_implementation
    with sparse.enable(look, name="attnforge:seer-samples"):
        model.set_attn_implementation("attnforge:seer-samples")
        try:
            for row in rows:
                model.base_model(row[None], use_cache=False)
        finally:
            model.set_attn_implementation(before)
    return found


def distil(
    model: Any, gates: Gates, rows: Iterable[Tensor], *, steps: int, **options: Any
) -> list[list[float]]:
    """Trains each layer's gate on the rows; losses by layer. Options of `distil_seer_gate`."""
    seen = samples(model, gates, rows)
    return [
        distil_seer_gate(gate, own, steps=steps, **options)
        for gate, own in zip(gates, seen, strict=True)
    ]
