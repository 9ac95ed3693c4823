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
import importlib.metadata
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnforge.integrations._mask_plan import Band, MaskSpec, Plan, plan_from_dense
from attnforge.integrations._mask_run import run_plan, run_spec
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
        _import_transformers()
        return getattr(importlib.import_module("attnforge.integrations._paged_cache"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


MIN_VERSION = (4, 56)
"""Oldest transformers whose attention and mask interfaces have the form used here."""

_WHERE = "attnforge.integrations.transformers"
_MASKS = "transformers.masking_utils"
_ADVICE = 'use attn_implementation="sdpa" or "eager"'

# Keyword arguments of some models that change the result of attention and are not served.
_REFUSED = {
    "position_bias": "an additive position bias",
    "head_mask": "a head mask",
    "indices": "key indices (sparse attention)",
    "block_indices": "block indices (block-sparse attention)",
    "block_table": "a paged cache",
    "cache": "a paged cache (continuous batching)",
    "sinks": "sinks under another name than s_aux",
}


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


def _import_masks() -> Any:
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


def _key_padding(mask: Tensor | None, kv_len: int, kv_offset: int) -> Tensor | None:
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
        raise TypeError(f"{_WHERE}: the mask function needs q_length or cache_position")
    # The plain case first and by identity: it is the one that a graph can trace.
    if mask_function is None or mask_function is _import_masks().causal_mask_function:
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
        padding=_key_padding(attention_mask, kv_length, kv_offset),
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
    return _import_masks().sdpa_mask(
        batch_size=batch,
        kv_length=kv_len,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=padding,
        device=device,
        **where,
        **kwargs,
    )


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
    _refuse(dropout, kwargs)
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if isinstance(key, PagedStates):
        window = -1 if sliding_window is None else sliding_window - 1
        return paged_attention_forward(query, key, attention_mask, causal, window, options), None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.shape[0] != k.shape[0] and q.shape[0] == 1:
        q = q.expand(k.shape[0], -1, -1, -1)  # learned queries shared by the batch
    described = _describe(q, k, attention_mask, bool(causal), sliding_window)
    if isinstance(described, Plan):
        if cu_seq_lens_q is not None:
            raise ValueError(f"{_WHERE}: got cu_seq_lens_q together with a 4-D attention_mask")
        out = run_plan(q, k, v, described, options)
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        out = _varlen(q, k, v, described, cu_seq_lens_q, cu_seq_lens_k, options)
    else:
        if not torch.compiler.is_compiling():
            described.split_at_restarts(position_ids)
        out = run_spec(q, k, v, described, options)
    return out.contiguous(), None


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"{_WHERE}: attention dropout {dropout} is not supported; set the model's "
            f"attention_dropout to 0, call model.eval(), or {_ADVICE}"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{_WHERE}: output_attentions=True needs the attention weights, which are never "
            'formed; use attn_implementation="eager"'
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{_WHERE}: {name}= ({what}) is not supported; {_ADVICE}")


def _describe(
    q: Tensor, k: Tensor, mask: Any, causal: bool, sliding_window: int | None
) -> MaskSpec | Plan:
    """The mask of one call, as a description or as pieces."""
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    spec = mask.spec if isinstance(mask, LazyMask) else mask
    if isinstance(spec, MaskSpec):
        sizes, expected = (spec.batch, spec.q_len, spec.kv_len), (batch, q_len, kv_len)
        if sizes != expected and (spec.batch != 1 or sizes[1:] != expected[1:]):
            raise ValueError(
                f"{_WHERE}: the mask was made for (batch, queries, keys) = {sizes}, but attention "
                f"was called with {expected}"
            )
        return spec
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _dense_plan(mask, batch, q_len, kv_len)
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (batch, kv_len)):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{_WHERE}: attention_mask {got} is not supported; expected None, [batch, keys] = "
            f"{(batch, kv_len)} or [batch, 1, queries, keys]"
        )
    if sliding_window is not None and not causal and sliding_window < kv_len:
        raise ValueError(
            f"{_WHERE}: sliding_window={sliding_window} without a mask in a bidirectional layer "
            f"does not say where the window lies; {_ADVICE}"
        )
    left = -1 if sliding_window is None or not causal else sliding_window - 1
    return MaskSpec(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        band=Band(causal, left),
        delta=kv_len - q_len if causal else 0,
        padding=_key_padding(mask, kv_len, 0),
        device=q.device,
    )


def _dense_plan(mask: Tensor, batch: int, q_len: int, kv_len: int) -> Plan:
    """`plan_from_dense`, remembered on the mask: all layers of a forward pass share it."""
    version = 0 if mask.is_inference() else mask._version
    stamp = (version, batch, q_len, kv_len)
    held: tuple[Any, Plan] | None = getattr(mask, "_attnforge_plan", None)
    if held is None or held[0] != stamp:
        held = (stamp, plan_from_dense(mask, batch, q_len, kv_len))
        mask._attnforge_plan = held  # type: ignore[attr-defined]
    return held[1]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, cu_q: Tensor, cu_k: Tensor, options: Any
) -> Tensor:
    """Packed sequences given by their boundaries over the flattened batch."""
    import attnforge

    if spec.padding is not None or spec.band.chunk:
        raise ValueError(
            f"{_WHERE}: cu_seq_lens_q and cu_seq_lens_k describe sequences without padding; got a "
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


class Handle:
    """A registration in transformers; `remove()` or leaving the context undoes it."""

    def __init__(self, name: str, attention: Any, masks: Any) -> None:
        self.name = name
        self._interfaces = (attention, masks)

    @property
    def active(self) -> bool:
        """Whether models can select this implementation now."""
        return self._interfaces[0]._global_mapping.get(self.name) is attention_forward

    def remove(self) -> None:
        """Take the functions out of transformers again. Models that selected them stop working."""
        for interface, function in zip(
            self._interfaces, (attention_forward, attention_mask), strict=True
        ):
            if interface._global_mapping.get(self.name) is function:
                del interface._global_mapping[self.name]

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _import_transformers() -> Any:
    try:
        module = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"{_WHERE}.enable: transformers is not installed; "
            "run: pip install 'attnforge[transformers]'"
        ) from error
    found = importlib.metadata.version("transformers")
    if _version(found) < MIN_VERSION:
        raise ImportError(
            f"{_WHERE}.enable: transformers {found} is too old; its attention interface is needed "
            f"in the form of {MIN_VERSION[0]}.{MIN_VERSION[1]} or newer; "
            "run: pip install -U 'attnforge[transformers]'"
        )
    return module


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
    module = _import_transformers()
    if not name or "flash" in name or any(c in name for c in "/@:|"):
        raise ValueError(
            f"{_WHERE}.enable: name {name!r} has a meaning of its own in transformers; choose one "
            'without "flash", "/", "@", ":" and "|"'
        )
    attention = module.AttentionInterface
    masks = _import_masks().AttentionMaskInterface
    for interface, function in ((attention, attention_forward), (masks, attention_mask)):
        taken = interface._global_mapping.get(name)
        if name == "eager" or taken not in (None, function):
            raise ValueError(f"{_WHERE}.enable: name {name!r} is already used by transformers")
    attention.register(name, attention_forward)
    masks.register(name, attention_mask)
    return Handle(name, attention, masks)
