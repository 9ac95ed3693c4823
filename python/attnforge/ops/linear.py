"""Linear attention by an additive recurrence, its gates, and one step of it for decoding.

    S_t = decay_t S_{t-1} + k_t v_t^T        o_t = scale q_t^T S_t        S in R^{K x V}, fp32

Cost is linear in T: 4 K V flops per token and value head, whatever the gate. The functions differ
in the gate alone; layouts and names are those of flash-linear-attention. All of them take

    q, k [B, T, H, K], v [B, T, HV, V], HV a multiple of H; fp32, bf16, fp16 (fp64: reference)

and return (o [B, T, HV, V], final_state or None). Options they share:

    scale: factor of the output, default 1 / sqrt(K).
    initial_state: [N, HV, K, V], by default zero; with normalize the pair (state, z [N, HV, K]).
    output_final_state: return the state after the last token too, in the same form.
    cu_seqlens: [N + 1] int32 or int64 boundaries of sequences packed into a batch of one.
    normalize: divide o by q_t^T z_t with z_t = decay_t z_{t-1} + k_t: True or "sum" adds eps to
        it, "abs" takes max(|.|, eps); for keys and queries that passed a positive feature map.
    backend: a backend, kernel id or list; see ``flash_attention``.

Gates are natural logs, at most 0, in any floating dtype. -inf is a reset: what came before does
not reach any later token. Everything is differentiable but decays per head: gates, states,
denominators. Sources: Katharopoulos et al. (2020), RetNet (Sun et al., 2023), Lightning Attention
(Qin et al., 2024), Gated Linear Attention (Yang et al., 2024), Mamba-2 (Dao and Gu, 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._params import LinearParams
from attnforge.ops import _linear_checks, _linear_ops
from attnforge.ops._checks import fail, tensor
from attnforge.ops._linear_autograd import chunk
from attnforge.ops._linear_maps import lightning_decay, retention_decay
from attnforge.ops.flash import _autocast, _choice
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = [
    "gla",
    "lightning_attention",
    "linear_attention",
    "linear_step",
    "retention",
    "simple_gla",
]

State = Tensor | tuple[Tensor, Tensor]
_NORMALIZE = {False: "", None: "", True: "sum", "sum": "sum", "abs": "abs"}
# The layout of each gate, after batch and time where it has them.
_LAYOUTS = {
    "head": "[heads_v]",
    "scalar": "[batch, time, heads_v]",
    "key": "[batch, time, heads_v, head_dim]",
    "value": "[batch, time, heads_v, v_head_dim]",
}
_NAMES = {"head": "decay", "scalar": "g", "key": "gk", "value": "gv"}


def _normalizer(op: str, normalize: Any, eps: Any) -> str:
    if not isinstance(normalize, (bool, str, type(None))) or normalize not in _NORMALIZE:
        fail(op, f"normalize is {normalize!r}; want False, True, 'sum' or 'abs'")
    if not isinstance(eps, float) or not 0.0 <= eps < float("inf"):
        fail(op, f"eps is {eps!r}; want a finite float >= 0; it keeps denominators off zero")
    return _NORMALIZE[normalize]


def _gate(op: str, q: Tensor, v: Tensor, kind: str, gate: Any) -> Tensor | None:
    """The gate in fp32 at value heads; one given per head of q is repeated over the group."""
    if gate is None:
        return None
    heads, width = v.shape[-2], {"key": q.shape[-1], "value": v.shape[-1]}.get(kind)
    tail = () if width is None else (width,)
    lead = () if kind == "head" else tuple(v.shape[:-2])
    tensor(op, _NAMES[kind], gate)
    if kind != "head" and gate.shape == (*lead, q.shape[-2], *tail):
        gate = gate.repeat_interleave(heads // q.shape[-2], len(lead))
    shape = (*lead, heads, *tail)
    return _linear_checks.gate(op, _NAMES[kind], gate, shape, q, _LAYOUTS[kind])


def _initial(op: str, initial: Any, shape: tuple[int, ...], q: Tensor, normalize: str) -> Any:
    """(state, z) of an ``initial_state``; z is None without a denominator."""
    if initial is None:
        return None, None
    z = None
    if normalize:
        if not isinstance(initial, (tuple, list)) or len(initial) != 2:
            fail(op, "initial_state must be a pair (state, z) with normalize; got no pair; want "
                     "what output_final_state=True returned", TypeError)  # fmt: skip
        initial, z = initial
        z = _linear_checks.state(op, "initial_state[1]", z, shape[:3], q, "[N, HV, K]")
    state = _linear_checks.state(op, "initial_state", initial, shape, q, "[N, HV, K, V]")
    return state, z


def _problem(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str = "none",
    gate: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool | str = False,
    eps: float = 1e-10,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, LinearParams]:
    """Checked and normalised operands and parameters."""
    q, k, v = _autocast(op, q, k, v)
    _linear_checks.heads(op, q, k, v)
    cu, n = _linear_checks.packed(op, q, cu_seqlens)
    mode = _normalizer(op, normalize, eps)
    gate = _gate(op, q, v, kind, gate)
    state, z = _initial(op, initial_state, (n, v.shape[2], q.shape[3], v.shape[3]), q, mode)
    chosen = _linear_checks.scale(op, scale, q.shape[-1])
    if mode and kind == "value":
        fail(op, "normalize is on; got a gate per value channel; want normalize=False, as one "
                 "denominator cannot follow the decay of every channel")  # fmt: skip
    kind = "none" if gate is None else kind
    return q, k, v, LinearParams(gate, kind, state, z, cu, chosen, causal, mode, eps)


def _run(
    op: str, *operands: Any, output_final_state: bool, backend: str | None, **options: Any
) -> tuple[Tensor, State | None]:
    q, k, v, p = _problem(op, *operands, **options)
    found = chunk(q, k, v, p, output_final_state, _choice(op, backend))
    if not output_final_state:
        return found.out, None
    return found.out, (found.final_state, found.final_z) if p.normalize else found.final_state


def _requester(op: str, kind: str = "none") -> Callable[..., Sequence[Request]]:
    """The requests of a function whose gate, if any, is the argument after v or a keyword."""

    def requests(q: Tensor, k: Tensor, v: Tensor, gate: Any = None, **options: Any) -> Any:
        named = options.pop(_NAMES.get(kind, ""), None)
        known = {n: x for n, x in options.items() if n in _EXPLAINED}
        chosen = named if gate is None else gate
        if kind == "head":
            chosen = q.new_zeros(v.shape[-2], dtype=torch.float32)
        q, k, v, p = _problem(op, q, k, v, kind, chosen, **known)
        meta = _linear_ops.metadata(q, v, *_linear_ops.features(p))
        return [_linear_ops.request(f"linear_chunk_{way}", meta) for way in ("fwd", "bwd")]

    return requests


_EXPLAINED = ("scale", "initial_state", "cu_seqlens", "normalize", "eps", "causal")


@explained_by(_requester("linear_attention"))
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool | str = False,
    eps: float = 1e-10,
    causal: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """No decay. causal=False: every query reads all keys, o_t = scale q_t^T sum_j k_j v_j^T."""
    return _run(
        "linear_attention", q, k, v, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, normalize=normalize,
        eps=eps, causal=causal, backend=backend,
    )  # fmt: skip


@explained_by(_requester("retention", "head"))
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool | str = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """A constant decay per head: e^decay, decay [HV], default log(1 - 2^(-5 - h)) as in RetNet.

    The decay has no gradient; for a learned one use ``simple_gla``.
    """
    if decay is None:
        decay = retention_decay(v.shape[-2], device=v.device)
    return _run(
        "retention", q, k, v, "head", _constant("retention", decay), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize, eps=eps, backend=backend,
    )  # fmt: skip


@explained_by(_requester("lightning_attention", "head"))
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer_idx: int = 0,
    num_layers: int = 1,
    decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool | str = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Retention with the decays of Lightning Attention.

    -2^(-8 h / HV) (1 - layer_idx / num_layers) for h = 1 .. HV, or ``decay`` [HV]. Helpers of
    other libraries compute other slopes under this name: give those as ``decay``.
    """
    if decay is None:
        decay = lightning_decay(v.shape[-2], layer_idx, num_layers, device=v.device)
    return _run(
        "lightning_attention", q, k, v, "head", _constant("lightning_attention", decay),
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize, eps=eps, backend=backend,
    )  # fmt: skip


def _constant(op: str, decay: Tensor) -> Tensor:
    if isinstance(decay, Tensor) and decay.requires_grad:
        fail(op, "decay requires grad; got a learned decay; want a constant, as no gradient is "
                 "computed for it; expand it to g [B, T, HV] for simple_gla")  # fmt: skip
    return decay


@explained_by(_requester("simple_gla", "scalar"))
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool | str = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """One gate per token and head: S_t = e^{g_t} S_{t-1} + k_t v_t^T, g [B, T, HV] (or H).

    The recurrence of Mamba-2 (see ``mamba2_ssd``), gated RetNet and RFA.
    """
    return _run(
        "simple_gla", q, k, v, "scalar", g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, normalize=normalize,
        eps=eps, backend=backend,
    )  # fmt: skip


def _vector_gate(op: str, gk: Tensor | None, gv: Tensor | None) -> tuple[str, Tensor | None]:
    if (gk is None) == (gv is None):
        fail(op, f"{'no gate' if gk is None else 'both gates'} given; want one of gk [B, T, HV, K] "
                 "and gv [B, T, HV, V]; linear_attention has none")  # fmt: skip
    return ("key", gk) if gv is None else ("value", gv)


def _gla_requests(q: Any, k: Any, v: Any, gk: Any = None, *, gv: Any = None, **options: Any) -> Any:
    kind, gate = _vector_gate("gla", gk, gv)
    return _requester("gla", kind)(q, k, v, gate, **options)


@explained_by(_gla_requests)
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool | str = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """A gate per token and key channel, gk [B, T, HV, K]: S_t = diag(e^{gk_t}) S_{t-1} + k v^T.

    gv [B, T, HV, V] instead gates value channels: S_t = S_{t-1} diag(e^{gv_t}) + k v^T, the first
    pass of gated slot attention.
    """
    kind, gate = _vector_gate("gla", gk, gv)
    return _run(
        "gla", q, k, v, kind, gate, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, normalize=normalize,
        eps=eps, backend=backend,
    )  # fmt: skip


def _step_requests(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, normalize: Any = False, **options: Any
) -> Sequence[Request]:
    gates = {kind: options.get(name) for kind, name in _NAMES.items()}
    kind, gate = next(((n, x) for n, x in gates.items() if x is not None), ("none", None))
    p = LinearParams(gate, kind, None, None, None, 1.0, True, "sum" if normalize else "", 0.0)
    meta = _linear_ops.metadata(q, v, *_linear_ops.features(p))
    return [_linear_ops.request("linear_step", meta)]


@explained_by(_step_requests)
def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    decay: Tensor | None = None,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    normalize: bool | str = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> Tensor:
    """One token per sequence; ``state`` is updated in place. Returns o [B, HV, V]; no gradient.

    q, k [B, H, K], v [B, HV, V]. state: a pool [P, HV, K, V] in fp32, contiguous; with normalize
    the pair (state, z [P, HV, K]). One gate at most: decay [HV], g [B, HV], gk [B, HV, K] or
    gv [B, HV, V]. state_indices: [B] int32, the slot of each row, -1 for a row to skip (o is 0);
    by default row b owns slot b. Reads and writes each state once: 8 K V bytes per value head.
    """
    op = "linear_step"
    q, k, v = (x.detach() for x in _autocast(op, q, k, v))
    _linear_checks.heads(op, q, k, v, rank=3)
    mode = _normalizer(op, normalize, eps)
    given = [(kind, x) for kind, x in zip(_NAMES, (decay, g, gk, gv), strict=True) if x is not None]
    if len(given) > 1:
        names = ", ".join(_NAMES[kind] for kind, _ in given)
        fail(op, f"{len(given)} gates given ({names}); want one at most; add gates of equal shape")
    kind, gate = given[0] if given else ("none", None)
    gate = _gate(op, q, v, kind, None if gate is None else gate.detach())
    pool, z = state if mode and isinstance(state, tuple) else (state, None)
    shape = (v.shape[1], q.shape[2], v.shape[2])
    _pool(op, "state", pool, shape, q)
    if mode:
        _pool(op, "state[1]", z, shape[:2], q)
    assert isinstance(pool, Tensor)  # as _pool has checked
    indices = _linear_checks.state_indices(op, state_indices, q, pool.shape[0])
    chosen = _linear_checks.scale(op, scale, q.shape[-1])
    out: Tensor = _linear_ops.linear_step(
        q, k, v, pool, z, gate, kind, indices, chosen, mode, eps, _choice(op, backend)
    )
    return out


def _pool(op: str, name: str, x: Any, shape: tuple[int, ...], q: Tensor) -> None:
    """A contiguous pool of states [P, *shape]: it is written in place, so it is never copied."""
    want = ", ".join(map(str, shape))
    acc = _linear_checks.accumulator(q.dtype)
    if (
        not isinstance(x, Tensor)
        or tuple(x.shape[1:]) != shape
        or x.dtype is not acc
        or x.device != q.device
        or not x.is_contiguous()
        or x.requires_grad
    ):
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        fail(op, f"{name} is {got}; want a contiguous {acc} pool [slots, {want}] on {q.device} "
                 "without a gradient, as it is updated in place")  # fmt: skip
