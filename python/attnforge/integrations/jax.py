"""attnforge's CPU kernels in JAX.

    from attnforge.integrations.jax import dot_product_attention, flash_attention

    out = flash_attention(q, k, v, causal=True)              # as attnforge.flash_attention
    out = dot_product_attention(q, k, v, is_causal=True)     # as jax.nn.dot_product_attention

Both work under ``jit``, ``grad``, ``vmap`` and ``checkpoint``, on CPU arrays of fp32, bf16 and
fp16, with memory linear in the sequence length in both directions. The kernels read and write
JAX's own buffers on XLA's threads. Needs jax: ``pip install 'attnforge[jax]'``.
"""

from __future__ import annotations

from typing import Any

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(
        "attnforge.integrations.jax: jax is not installed; pip install 'attnforge[jax]'"
    ) from error

from attnforge.integrations._jax_calls import Extras, Options, attend
from attnforge.ops import _checks

__all__ = ["dot_product_attention", "flash_attention"]

Array = Any
_OP = "integrations.jax.flash_attention"
_SDPA = "integrations.jax.dot_product_attention"
_DTYPES = ("float32", "bfloat16", "float16")


def _check_qkv(op: str, named: dict[str, Array]) -> None:
    (q_name, q), (k_name, k), (v_name, v) = named.items()
    for name, x in named.items():
        if x.ndim != 4:
            _checks.fail(op, f"{name} has shape {x.shape}; want [batch, seq, heads, head_dim]")
        if str(x.dtype) not in _DTYPES or x.dtype != q.dtype:
            got = ", ".join(str(x.dtype) for x in named.values())
            _checks.fail(op, f"dtypes are {got}; want one of {', '.join(_DTYPES)} for all three")
    if not k.shape[0] == v.shape[0] == q.shape[0] or k.shape[1:3] != v.shape[1:3]:
        _checks.fail(
            op,
            f"shapes do not fit; got {q_name} {q.shape}, {k_name} {k.shape}, {v_name} {v.shape}; "
            "want one batch size, and keys and values of one length and number of heads",
        )
    if k.shape[3] != q.shape[3] or 0 in (q.shape[3], v.shape[3]):
        _checks.fail(op, f"head dims are {q.shape[3]}, {k.shape[3]}, {v.shape[3]}; want equal ones "
                         f"of {q_name} and {k_name}, and at least 1")  # fmt: skip
    if q.shape[3] > 256 or v.shape[3] > 1024:
        _checks.fail(op, f"head dims are {q.shape[3]} and {v.shape[3]} (values); want at most 256 "
                         "and 1024")  # fmt: skip
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        _checks.fail(op, f"{q_name} has {q.shape[2]} heads, {k_name} {k.shape[2]}; want a multiple")


def _scores(op: str, name: str, x: Any, q: Array, k: Array) -> Array:
    """``x`` [B|1, Hq|1, Sq|1, Sk|1] or without B, as [B|1, Hq|1, Sq, Sk]."""
    x = jnp.asarray(x)
    x = x[None] if x.ndim == 3 else x
    want = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if x.ndim != 4 or any(n not in (1, m) for n, m in zip(x.shape, want, strict=True)):
        _checks.fail(op, f"{name} has shape {x.shape}; want what broadcasts to {want}, in 4 dims")
    if (name == "mask") != (x.dtype == jnp.bool_):
        _checks.fail(op, f"{name} has dtype {x.dtype}; want bool for mask, floating for bias")
    return jnp.broadcast_to(x, (*x.shape[:2], *want[2:]))


def _bias(op: str, x: Any, q: Array, k: Array) -> Array:
    bias = _scores(op, "bias", x, q, k)
    return bias if bias.dtype == q.dtype else bias.astype(jnp.float32)


def _lengths(op: str, name: str, x: Any, batch: int) -> Array:
    x = jnp.asarray(x)
    if x.shape != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
        _checks.fail(op, f"{name} is {x.dtype}{list(x.shape)}; want int32 [batch] = ({batch},)")
    return x.astype(jnp.int32)


def _per_head(name: str, x: Any, *shapes: tuple[int, ...]) -> Array:
    x = jnp.asarray(x)
    if x.shape not in shapes:
        _checks.fail(_OP, f"{name} has shape {x.shape}; want {' or '.join(map(str, shapes))}")
    return x.astype(jnp.float32)


def _padded(x: Array) -> Array:
    """Head dims are multiples of 8 in the kernels; zeros change no score and no value."""
    rest = -x.shape[-1] % 8
    return jnp.pad(x, ((0, 0),) * 3 + ((0, rest),)) if rest else x


def _attend(options: Options, q: Array, k: Array, v: Array, extras: Extras) -> tuple[Array, Array]:
    out, lse = attend(options, _padded(q), _padded(k), _padded(v), extras)
    return out[..., : v.shape[-1]], lse


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    seqused_k: Any = None,
    mask: Any = None,
    bias: Any = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """``attnforge.flash_attention`` of JAX arrays; differentiable in q, k, v, sinks and bias.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], one dtype of fp32, bf16, fp16; Hq a
    multiple of Hk, D at most 256.

    causal: query i sees keys up to i + Sk - Sq (bottom-right aligned).
    window_size: (left, right) keys beside that diagonal that are seen; -1 is unlimited.
    softcap: logits become softcap * tanh(logits / softcap); 0 is off.
    alibi_slopes: [Hq] or [B, Hq]; logits get -slope * |i + Sk - Sq - j|. No gradient.
    sinks: [Hq]; one logit per head that takes part in the softmax and brings no value.
    seqused_k: [B] int32; keys at and past it are never read, and Sk above means it.
    mask: bool, broadcasts to [B, Hq, Sq, Sk]; False hides. bias: added to the logits, likewise.
    softmax_scale: default 1 / sqrt(D). It and the options above it that are numbers are static.
    return_lse: also return the LSE [B, Hq, Sq] fp32, natural log, sinks included;
        differentiable.

    Returns out [B, Sq, Hq, Dv] of q's dtype, or (out, lse). A row that sees no key gives 0 and
    an LSE of -inf (with a sink: the sink). Under ``vmap`` the mapped axis becomes part of the
    batch; with sinks, or a mask or bias that the batch shares, its entries run one by one.

    Raises ValueError on arguments that do not fit, RuntimeError without the native library.
    Cost: 2 (D + Dv) flops per visible pair and head, 2.5 times that backward.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    _check_qkv(_OP, {"q": q, "k": k, "v": v})
    left, right = _checks.window(_OP, window_size, causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(_OP, scale, softcap)
    batch, _, heads, _ = q.shape
    extras = Extras()
    if seqused_k is not None:
        extras = extras._replace(seqused_k=_lengths(_OP, "seqused_k", seqused_k, batch))
    if alibi_slopes is not None:
        slopes = _per_head("alibi_slopes", alibi_slopes, (heads,), (batch, heads))
        extras = extras._replace(alibi_slopes=jax.lax.stop_gradient(slopes.reshape(-1, heads)))
    if sinks is not None:
        extras = extras._replace(sinks=_per_head("sinks", sinks, (heads,)))
    if mask is not None:
        extras = extras._replace(mask=_scores(_OP, "mask", mask, q, k))
    if bias is not None:
        extras = extras._replace(bias=_bias(_OP, bias, q, k))
    out, lse = _attend(Options(float(scale), float(softcap), left, right), q, k, v, extras)
    return (out, lse) if return_lse else out


def _interval(
    q: Array,
    k: Array,
    is_causal: bool,
    window: tuple[int, int] | None,
    lengths_q: Array | None,
    lengths_k: Array | None,
) -> Array | None:
    """Keys that each row sees, [B|1, 1, T, 2]: jax.nn aligns to the top left."""
    if not is_causal and window is None and lengths_q is None and lengths_k is None:
        return None
    row = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    low, high = jnp.zeros_like(row), jnp.full_like(row, k.shape[1])
    if is_causal:
        high = jnp.minimum(high, row + 1)
    if window is not None:
        low, high = jnp.maximum(low, row - window[0]), jnp.minimum(high, row + window[1] + 1)
    if lengths_k is not None:
        high = jnp.minimum(high, lengths_k[:, None])
    if lengths_q is not None:
        high = jnp.where(row < lengths_q[:, None], high, 0)
    return jnp.stack(jnp.broadcast_arrays(low, high), -1)[:, None]


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Any:
    """``jax.nn.dot_product_attention`` on attnforge's kernels, without its ``implementation``.

    query [B, T, N, H] or [T, N, H], key, value [B, S, K, H] or [S, K, H]; N a multiple of K.
    bias and mask (bool) broadcast to [B, N, T, S]. is_causal and local_window_size (left, right)
    align to the top left: query i stands at key i. Lengths are int32 [B]; rows past
    query_seq_lengths give 0. With return_residual the result is (out, lse [B, T, N]); the lse is
    of the inputs' dtype and has no gradient, as jax's.

    A row that sees no key gives 0, where jax.nn gives the mean of all values. Raises ValueError on
    arguments that do not fit. Differentiable in query, key, value and bias.
    """
    q, k, v = (jnp.asarray(x) for x in (query, key, value))
    single = q.ndim == 3
    if single:
        q, k, v = (x[None] if x.ndim == 3 else x for x in (q, k, v))
    _check_qkv(_SDPA, {"query": q, "key": k, "value": v})
    batch = q.shape[0]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _checks.scalars(_SDPA, scale, 0.0)
    window = local_window_size
    if isinstance(window, int):
        window = (window, window)
    if window is not None and min(_checks.window(_SDPA, window, causal=False)) < 0:
        _checks.fail(_SDPA, f"local_window_size is {window}; want sizes >= 0, or None")
    used = [
        None if x is None else _lengths(_SDPA, name, x, batch)
        for name, x in (
            ("query_seq_lengths", query_seq_lengths),
            ("key_value_seq_lengths", key_value_seq_lengths),
        )
    ]
    extras = Extras(
        row_bounds=_interval(q, k, is_causal, window, *used),
        mask=None if mask is None else _scores(_SDPA, "mask", mask, q, k),
        bias=None if bias is None else _bias(_SDPA, bias, q, k),
    )
    out, lse = _attend(Options(float(scale), 0.0, -1, -1), q, k, v, extras)
    lse = jax.lax.stop_gradient(lse.swapaxes(1, 2).astype(k.dtype))
    if single:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out
