"""ComfyUI's diffusion models on attnforge, for a custom node.

    import attnforge.integrations.comfyui as af_comfyui
    model = af_comfyui.patch(model)        # a clone; the model that was given stays as it is

ComfyUI hands every attention of a patched model to the function in
``transformer_options["optimized_attention_override"]``. It needs nothing of ComfyUI to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnforge.integrations.torch import scaled_dot_product_attention

__all__ = ["attention", "patch"]

_WHERE = "attnforge.integrations.comfyui"
_KEY = "optimized_attention_override"


def attention(
    func: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **others: Any,
) -> Tensor:
    """In place of ComfyUI's ``func``: q, k, v [B, S, H * D], or [B, H, S, D] with skip_reshape.

    mask: bool or added, [Sq, Sk], [B, Sq, Sk] or [B, H, Sq, Sk]. Accumulation is fp32 whatever
    ``attn_precision`` says. Returns [B, Sq, H * D], or [B, H, Sq, D] with skip_output_reshape.
    """
    if not skip_reshape:
        width = q.shape[-1] // heads
        q, k, v = (x.view(*x.shape[:2], -1, width).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def patch(model: Any) -> Any:
    """A clone of a ComfyUI model (a ModelPatcher) whose attention runs on attnforge.

    Raises:
        ValueError: the model's attention is overridden by something else already.
    """
    options = dict(model.model_options.get("transformer_options", {}))
    if options.get(_KEY, attention) is not attention:
        raise ValueError(f"{_WHERE}.patch: the model has {_KEY!r} {options[_KEY]!r} already")
    clone = model.clone()
    options[_KEY] = attention
    clone.model_options = {**clone.model_options, "transformer_options": options}
    return clone
