"""The delta rule: plain, gated per head, gated per key channel (KDA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attnforge.compat.fla._common import Result, known, old_state_name, run
from attnforge.ops import delta as _delta
from attnforge.ops._checks import fail

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_kda",
    "fused_chunk_delta_rule",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_kda",
]


def _beta(op: str, beta: Tensor, sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    if allow_neg_eigval and not sigmoid:
        fail(op, "allow_neg_eigval is True without use_beta_sigmoid_in_kernel; want both, or beta "
                 "in [0, 2) as it is")  # fmt: skip
    if not sigmoid:
        return beta
    return torch.sigmoid(beta.float()) * (2.0 if allow_neg_eigval else 1.0)


def _decay(op: str, g: Tensor, options: dict[str, Any], lower_bound: float | None = None) -> Tensor:
    """Log gates of raw ones: -e^A_log softplus(g + dt_bias), or lower_bound sigmoid(e^A_log ..)."""
    a_log, bias = options.pop("A_log", None), options.pop("dt_bias", None)
    if not options.pop("use_gate_in_kernel", False):
        return g
    if a_log is None and lower_bound is None:
        fail(op, "A_log is None beside use_gate_in_kernel; want the decay of each head, [HV]")
    shape = (-1, *(1,) * (g.dim() - 3))  # heads, beside key channels where there are any
    raw = g.float() if bias is None else g.float() + bias.float().view(g.shape[2:])
    rate = 1.0 if a_log is None else a_log.float().view(shape).exp()
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * raw)
    return -rate * functional.softplus(raw)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``attnforge.delta_rule`` with beta [B, T, H], 1 by default."""
    known("chunk_delta_rule", rest)
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    return run(
        _delta.delta_rule, [q, k, v, beta], scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


fused_chunk_delta_rule = chunk_delta_rule

fused_recurrent_delta_rule = chunk_delta_rule


@old_state_name
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``attnforge.gated_delta_rule`` with g [B, T, HV] and beta [B, T, HV].

    use_gate_in_kernel, A_log [HV], dt_bias [HV]: g is raw, the gate -e^A_log softplus(g + dt_bias).
    """
    op = "chunk_gated_delta_rule"
    gate = _decay(op, g, rest)
    known(op, rest)
    beta = _beta(op, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return run(
        _delta.gated_delta_rule, [q, k, v, gate, beta], scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, state_v_first=state_v_first,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


chunk_gdn = chunk_gated_delta_rule


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **rest: Any,
) -> Result:
    """``chunk_gated_delta_rule``; gk [B, T, HV, K] gates key channels as KDA does."""
    op = "fused_recurrent_gated_delta_rule"
    if gv is not None:
        fail(op, "gv is given; want None: the delta rule here has gates of keys, g or gk")
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    options = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, **rest}
    if gk is not None:
        gate = gk if g is None else gk + g.unsqueeze(-1)
        return chunk_kda(q, k, v, gate, beta, scale, initial_state, output_final_state, **options)
    if g is None:
        g = v.new_zeros(v.shape[:3])
    return chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, **options
    )


fused_recurrent_gdn = fused_recurrent_gated_delta_rule


@old_state_name
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **rest: Any,
) -> Result:
    """``attnforge.kda`` with g [B, T, HV, K] and beta [B, T, HV].

    use_gate_in_kernel, A_log [HV], dt_bias [HV * K], lower_bound: g is raw, see fla.
    """
    op = "chunk_kda"
    if return_intermediate_states:
        fail(op, "return_intermediate_states is True; want False: chunk states are not kept")
    rest["use_gate_in_kernel"] = use_gate_in_kernel
    gate = _decay(op, g, rest, lower_bound)
    known(op, rest)
    beta = _beta(op, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return run(
        _delta.kda, [q, k, v, gate, beta], scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, state_v_first=state_v_first,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    """``chunk_kda`` with fla's other order of arguments."""
    return chunk_kda(
        q, k, v, g, beta, scale, initial_state, output_final_state, A_log=A_log, dt_bias=dt_bias,
        **rest,
    )  # fmt: skip
