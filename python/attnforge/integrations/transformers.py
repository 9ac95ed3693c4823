"""Hugging Face transformers on attnforge: ``attn_implementation="attnforge"``.

    import attnforge.integrations.transformers as hf
    hf.enable()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="attnforge")

`enable` registers two functions. The *mask function* answers a model's request for a mask with a
`LazyMask`: a tensor that only describes the mask (band, padding, packing, cache offset) and takes
no [Sq, Sk] memory unless somebody else reads it. The *attention function* runs what the
description says on `attnforge.flash_attention`. Supported: padding on either side or between
tokens, chunked prefill, dynamic and static caches, sliding windows, chunked attention, packed
sequences (position ids or cu_seq_lens), softcap, sinks, grouped KV heads (never repeated), a V
head dim of its own, encoders and cross-attention, training. Whatever cannot be computed exactly
raises an error; nothing is approximated or ignored.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnforge.integrations._hook import (
    MIN_VERSION,
    Handle,
    describe,
    import_transformers,
    refuse,
    register,
)
from attnforge.integrations._mask_plan import MaskSpec, Plan
from attnforge.integrations._mask_run import run_plan, run_spec
from attnforge.integrations._masks import WHERE, LazyMask, attention_mask
from attnforge.integrations._paged_states import PagedStates, paged_attention_forward

if TYPE_CHECKING:
    from attnforge.integrations._paged_cache import PagedCache, PagedStep

__all__ = [
    "MIN_VERSION",
    "Handle",
    "LazyMask",
    "PagedCache",
    "PagedStep",
    "attention_forward",
    "attention_mask",
    "enable",
]


def __getattr__(name: str) -> Any:
    if name in ("PagedCache", "PagedStep"):  # subclasses of transformers' Cache
        import_transformers()
        return getattr(importlib.import_module("attnforge.integrations._paged_cache"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention_forward(
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
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function.

    query [B, Hq, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, Dv] (Hk divides Hq; the heads are
    not repeated). attention_mask: what `attention_mask` made; or a 2-D padding mask [B, Sk]; or a
    4-D mask whose rows are intervals; or None, when `is_causal` (default: the module's, else
    True) and `sliding_window` describe the mask, bottom-right aligned. A given mask is the whole
    truth: it already contains the window. s_aux: one sink logit per head [Hq].

    Returns (out, None): out [B, Sq, Hq, Dv], contiguous; rows of padding queries are 0.

    Raises:
        ValueError: dropout, attention weights, additive biases, masks that are not intervals,
            paged caches; and whatever `attnforge.flash_attention` refuses.
    """
    refuse(dropout, kwargs)
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if isinstance(key, PagedStates):
        window = -1 if sliding_window is None else sliding_window - 1
        return paged_attention_forward(query, key, attention_mask, causal, window, options), None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.shape[0] != k.shape[0] and q.shape[0] == 1:
        q = q.expand(k.shape[0], -1, -1, -1)  # learned queries shared by the batch
    described = describe(q, k, attention_mask, bool(causal), sliding_window)
    if isinstance(described, Plan):
        if cu_seq_lens_q is not None:
            raise ValueError(f"{WHERE}: got cu_seq_lens_q together with a 4-D attention_mask")
        out = run_plan(q, k, v, described, options)
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        out = _varlen(q, k, v, described, cu_seq_lens_q, cu_seq_lens_k, options)
    else:
        if not torch.compiler.is_compiling():
            described.split_at_restarts(position_ids)
        out = run_spec(q, k, v, described, options)
    return out.contiguous(), None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, cu_q: Tensor, cu_k: Tensor, options: Any
) -> Tensor:
    """Packed sequences given by their boundaries over the flattened batch."""
    import attnforge

    if spec.padding is not None or spec.band.chunk:
        raise ValueError(
            f"{WHERE}: cu_seq_lens_q and cu_seq_lens_k describe sequences without padding; got a "
            "padding or chunked mask too"
        )
    out: Tensor = attnforge.flash_attention_varlen(
        q.flatten(0, 1) if q.shape[0] != 1 else q[0],
        k.flatten(0, 1) if k.shape[0] != 1 else k[0],
        v.flatten(0, 1) if v.shape[0] != 1 else v[0],
        cu_seqlens_q=cu_q.to(torch.int32),
        cu_seqlens_k=cu_k.to(torch.int32),
        causal=spec.band.causal,
        window_size=(spec.band.left, spec.band.right),
        **options,
    )
    return out.reshape(*q.shape[:2], *out.shape[1:])


def enable(name: str = "attnforge") -> Handle:
    """Make attnforge available to transformers models as ``attn_implementation=name``.

    Calling it again does nothing more. Models choose it in `from_pretrained(...,
    attn_implementation=name)` or `model.set_attn_implementation(name)`.

    Args:
        name: what models select. It may not contain "flash" (transformers would load the
            flash-attn package), "/", "@", ":" or "|" (hub kernels), nor be taken by others.

    Returns:
        a `Handle` with `.remove()`, also a context manager.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: the name cannot be used.
    """
    import_transformers()
    if not name or name == "eager" or "flash" in name or any(c in name for c in "/@:|"):
        raise ValueError(
            f"{WHERE}.enable: name {name!r} has a meaning of its own in transformers; choose one "
            'without "flash", "/", "@", ":" and "|"'
        )
    return register(WHERE, name, attention_forward, lambda taken: taken is attention_forward)
