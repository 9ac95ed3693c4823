"""Linear attention with delta rules: what a token writes first erases what its key would read.

    S~ = e^{g_t} S_{t-1}      S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T      o_t = scale S_t^T q_t

with S in R^{K x V}, fp32. Layouts and names are those of flash-linear-attention. All take

    q, k [B, T, H, K], v [B, T, HV, V], HV a multiple of H; fp32, bf16, fp16 (fp64: reference)
    beta [B, T, HV] (or H) in any floating dtype: write strengths, usually in (0, 1) or (0, 2)

and return (o [B, T, HV, V], final_state or None). Options they share:

    scale: factor of the output, default 1 / sqrt(K).
    initial_state: [N, HV, K, V], by default zero.
    output_final_state: return the state after the last token too.
    cu_seqlens: [N + 1] int32 or int64 boundaries of sequences packed into a batch of one.
    use_qk_l2norm_in_kernel: divide q and k by sqrt(sum of squares + 1e-6) first.
    backend: a backend, kernel id or list; see ``flash_attention``.

Keys should have norm 1 and beta stay within 0 .. 2: else the recurrence itself grows without
bound, whatever computes it. Gates are natural logs, at most 0; -inf is a reset: what came before
does not reach any later token. A NaN or infinity may spread over the 64 tokens around it, and
from there to every later one. Everything is differentiable: gates, beta, states too. Sources:
Yang et al., DeltaNet (2024) and Gated DeltaNet (2024); Kimi Linear (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnforge._params import DeltaParams
from attnforge.ops import _delta_ops, _linear_checks
from attnforge.ops._checks import tensor
from attnforge.ops._delta_autograd import delta_chunk
from attnforge.ops._linear_ops import metadata, request
from attnforge.ops.flash import _autocast, _choice
from attnforge.ops.linear import _pool
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["delta_rule", "delta_step", "gated_delta_rule", "kda"]


def _normalized(x: Tensor) -> Tensor:
    """x over its norm, computed in the accumulator."""
    wide = x.to(_linear_checks.accumulator(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _at_value_heads(
    op: str, name: str, x: Any, q: Tensor, v: Tensor, width: tuple[int, ...], layout: str
) -> Tensor:
    """A per-head factor in the accumulator's dtype; one per head of q is repeated in the group."""
    tensor(op, name, x)
    lead = v.dim() - 2
    if x.shape == (*v.shape[:lead], q.shape[-2], *width):
        x = x.repeat_interleave(v.shape[-2] // q.shape[-2], lead)
    return _linear_checks._floats(op, name, x, (*v.shape[:-1], *width), q, layout)


def _factors(
    op: str, q: Tensor, v: Tensor, g: Any, beta: Any, channels: bool
) -> tuple[Tensor | None, Tensor]:
    lead = "batch, time, heads_v" if v.dim() == 4 else "batch, heads_v"
    if g is not None:
        width, tail = ((q.shape[-1],), ", head_dim") if channels else ((), "")
        g = _at_value_heads(op, "g", g, q, v, width, f"a natural-log gate [{lead}{tail}]")
    return g, _at_value_heads(op, "beta", beta, q, v, (), f"a write strength [{lead}]")


def _problem(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Any,
    beta: Any,
    channels: bool,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor, Tensor, DeltaParams]:
    """Checked and normalised operands and parameters."""
    q, k, v = _autocast(op, q, k, v)
    _linear_checks.heads(op, q, k, v)
    cu, n = _linear_checks.packed(op, q, cu_seqlens)
    g, beta = _factors(op, q, v, g, beta, channels)
    if initial_state is not None:
        shape = (n, v.shape[2], q.shape[3], v.shape[3])
        initial_state = _linear_checks.state(
            op, "initial_state", initial_state, shape, q, "[N, HV, K, V]"
        )
    chosen = _linear_checks.scale(op, scale, q.shape[-1])
    if use_qk_l2norm_in_kernel:
        q, k = _normalized(q), _normalized(k)
    return q, k, v, DeltaParams(g, beta, initial_state, cu, chosen)


def _run(
    op: str, *operands: Any, output_final_state: bool, backend: str | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    q, k, v, p = _problem(op, *operands, **options)
    out, state = delta_chunk(q, k, v, *p, output_final_state, _choice(op, backend))
    return out, state if output_final_state else None


_EXPLAINED = ("scale", "initial_state", "cu_seqlens")


def _requester(op: str, channels: bool) -> Callable[..., Sequence[Request]]:
    """The requests of a function with gates."""

    def requests(
        q: Tensor, k: Tensor, v: Tensor, g: Any, beta: Any, **options: Any
    ) -> Sequence[Request]:
        known = {n: x for n, x in options.items() if n in _EXPLAINED}
        q, k, v, p = _problem(op, q, k, v, g, beta, channels, **known)
        meta = metadata(q, v, *_delta_ops.features(p.g, 3, p.cu_seqlens))
        return [request(f"delta_chunk_{way}", meta) for way in ("fwd", "bwd")]

    return requests


def _plain_requests(q: Any, k: Any, v: Any, beta: Any, **options: Any) -> Sequence[Request]:
    return _requester("delta_rule", False)(q, k, v, None, beta, **options)


@explained_by(_plain_requests)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet: no gate, S_t = (I - beta k k^T) S_{t-1} + beta k v^T."""
    return _run(
        "delta_rule", q, k, v, None, beta, False, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, backend=backend,
    )  # fmt: skip


@explained_by(_requester("gated_delta_rule", False))
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet: one gate per token and head, g [B, T, HV] (or H); the decay comes first."""
    return _run(
        "gated_delta_rule", q, k, v, g, beta, False, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, backend=backend,
    )  # fmt: skip


@explained_by(_requester("kda", True))
def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention: a gate per token and key channel, g [B, T, HV, K] (or H)."""
    return _run(
        "kda", q, k, v, g, beta, True, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, backend=backend,
    )  # fmt: skip


def _step_requests(
    q: Tensor, k: Tensor, v: Tensor, state: Any, beta: Any, *, g: Any = None, **_: Any
) -> Sequence[Request]:
    return [request("delta_step", metadata(q, v, *_delta_ops.features(g, 2, None)))]


@explained_by(_step_requests)
def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    beta: Tensor,
    *,
    g: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One token per sequence; ``state`` is updated in place. Returns o [B, HV, V]; no gradient.

    q, k [B, H, K], v [B, HV, V], beta [B, HV]; g [B, HV] or per key channel [B, HV, K] (or H).
    state: a pool [P, HV, K, V] in fp32, contiguous. state_indices: [B] int32, the slot of each
    row, -1 for a row to skip (o is 0); by default row b owns slot b. Reads and writes each state
    once: 8 K V bytes per value head.
    """
    op = "delta_step"
    q, k, v = (x.detach() for x in _autocast(op, q, k, v))
    _linear_checks.heads(op, q, k, v, rank=3)
    channels = isinstance(g, Tensor) and g.dim() == 3
    g, beta = _factors(op, q, v, g, beta, channels)
    _pool(op, "state", state, (v.shape[1], q.shape[2], v.shape[2]), q)
    indices = _linear_checks.state_indices(op, state_indices, q, state.shape[0])
    chosen = _linear_checks.scale(op, scale, q.shape[-1])
    if use_qk_l2norm_in_kernel:
        q, k = _normalized(q), _normalized(k)
    out: Tensor = _delta_ops.delta_step(
        q, k, v, None if g is None else g.detach(), beta.detach(), state, indices, chosen,
        _choice(op, backend),
    )  # fmt: skip
    return out
