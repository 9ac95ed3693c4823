"""Masks between transformers and attnforge: what a model asks for, as a description.

transformers composes masks from small functions; `attention_mask` reads them and answers with a
`LazyMask`, a tensor that only describes the mask and takes no [Sq, Sk] memory unless somebody else
reads it. A function that is not known is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge.integrations._mask_plan import Band, MaskSpec

__all__ = ["WHERE", "LazyMask", "attention_mask", "import_masks", "key_padding"]

WHERE = "attnforge.integrations.transformers"
_MASKS = "transformers.masking_utils"


class LazyMask(torch.Tensor):
    """A bool mask [B, 1, Sq, Sk] that exists only as a description, `spec`.

    The attention function reads the description. Any other code may treat it as an ordinary
    tensor: the first operation on it materialises the mask, and the result is a plain tensor.
    """

    spec: MaskSpec

    @staticmethod
    def __new__(cls, spec: MaskSpec) -> LazyMask:
        shape = (spec.batch, 1, spec.q_len, spec.kv_len)
        make: Callable[..., LazyMask] = torch.Tensor._make_wrapper_subclass
        mask = make(cls, shape, dtype=torch.bool, device=spec.device)
        mask.spec = spec
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyMask({tuple(self.shape)}, {self.spec.band})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        copies = (aten.detach.default, aten.alias.default, aten.clone.default)
        if func in copies and isinstance(args[0], LazyMask):
            return LazyMask(args[0].spec)
        args = tuple(_materialise(a) for a in args)
        return func(*args, **{name: _materialise(a) for name, a in kwargs.items()})


def _materialise(x: Any) -> Any:
    if isinstance(x, LazyMask):
        return x.spec.dense()
    if isinstance(x, (list, tuple)):
        return type(x)(_materialise(a) for a in x)
    return x


def import_masks() -> Any:
    import transformers.masking_utils

    return transformers.masking_utils


def _closure(fn: Any) -> dict[str, Any]:
    cells = fn.__closure__ or ()
    return dict(zip(fn.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))


def _read_mask_function(fn: Any) -> tuple[Band, Tensor | None, Tensor | None] | None:
    """(band, segments, chunk origin) of a mask function of transformers; None if it is not known.

    transformers composes masks from small named functions with closures; there is no other
    description of the mask to read. Unknown functions are evaluated instead (see
    `attention_mask`), so a rename there costs memory, not correctness.
    """
    if getattr(fn, "__module__", None) != _MASKS or not hasattr(fn, "__code__"):
        return None
    name = fn.__qualname__.removesuffix(".<locals>.inner_mask").removesuffix(".<locals>.and_mask")
    held = _closure(fn)
    if name == "causal_mask_function":
        return Band(causal=True), None, None
    if name == "bidirectional_mask_function":
        return Band(causal=False), None, None
    if name == "sliding_window_overlay":
        return Band(causal=False, left=held["sliding_window"] - 1), None, None
    if name == "sliding_window_bidirectional_overlay":
        return Band(False, held["sliding_window"], held["sliding_window"]), None, None
    if name == "chunked_overlay":
        return Band(causal=False, chunk=held["chunk_size"]), None, held["left_padding"]
    if name == "packed_sequence_mask_function":
        return Band(causal=False), held["packed_sequence_mask"], None
    if name == "remap_positions_for_packed_sequence":
        # Positions within one packed sequence are consecutive: distances stay what they were.
        inner = _read_mask_function(held["mask_function"])
        return None if inner is None or inner[0].chunk else inner
    if name != "and_masks":
        return None
    parts = [_read_mask_function(f) for f in held["mask_functions"]]
    known = [p for p in parts if p is not None]
    if len(known) != len(parts):
        return None
    bands = [p[0] for p in known]
    segments = [p[1] for p in known if p[1] is not None]
    origins = [p[2] for p in known if p[2] is not None]
    chunks = [b.chunk for b in bands if b.chunk]
    if len(segments) > 1 or len(chunks) > 1:
        return None
    band = Band(
        causal=any(b.causal for b in bands),
        left=min((b.left for b in bands if b.left >= 0), default=-1),
        right=min((b.right for b in bands if b.right >= 0), default=-1),
        chunk=chunks[0] if chunks else 0,
    )
    return band, segments[0] if segments else None, origins[0] if origins else None


def key_padding(mask: Tensor | None, kv_len: int, kv_offset: int) -> Tensor | None:
    """[B, kv_len] bool of the key slots from a 2-D mask over all tokens, None if all are real."""
    if mask is None:
        return None
    missing = kv_offset + kv_len - mask.shape[-1]
    if missing > 0:  # slots of a static cache that are not written yet
        mask = torch.nn.functional.pad(mask, (0, missing))
    mask = mask[:, kv_offset : kv_offset + kv_len].to(torch.bool)
    return None if bool(mask.all()) else mask


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The mask function: a `LazyMask` for what a model asks, never None.

    Arguments are those of `transformers.masking_utils.sdpa_mask`; `cache_position` [Sq] stands
    for `q_length` and `q_offset` in releases before 5.0. A mask function that transformers does
    not define itself (an overlay of the model or of the user) is evaluated to a bool tensor
    [B, 1, Sq, Sk], which the attention function serves if each of its rows is one interval.
    """
    if cache_position is not None and q_length is None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if q_length is None:
        raise TypeError(f"{WHERE}: the mask function needs q_length or cache_position")
    # The plain case first and by identity: it is the one that a graph can trace.
    if mask_function is None or mask_function is import_masks().causal_mask_function:
        known: Any = (Band(causal=True), None, None)
    else:
        known = _read_mask_function(mask_function)
    if known is None:
        return _evaluated_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function,
            attention_mask, device, cache_position, kwargs,
        )  # fmt: skip
    band, segments, origin = known
    compiling = torch.compiler.is_compiling()
    if isinstance(q_offset, Tensor) and not compiling:
        q_offset = int(q_offset)
    spec = MaskSpec(
        batch=batch_size,
        q_len=q_length,
        kv_len=kv_length,
        band=band,
        delta=q_offset - kv_offset,
        padding=key_padding(attention_mask, kv_length, kv_offset),
        segments=segments,
        chunk_origin=None if origin is None else origin - kv_offset,
        device=torch.device(device),
    )
    # A graph can carry the description itself, but not build a tensor subclass.
    return spec if compiling else LazyMask(spec)


def _evaluated_mask(
    batch: int,
    q_len: int,
    kv_len: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Any,
    padding: Tensor | None,
    device: torch.device | str,
    cache_position: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    where: dict[str, Any] = {"q_length": q_len, "q_offset": q_offset}
    if cache_position is not None:
        where = {"cache_position": cache_position}
    kwargs = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return import_masks().sdpa_mask(
        batch_size=batch,
        kv_length=kv_len,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=padding,
        device=device,
        **where,
        **kwargs,
    )
