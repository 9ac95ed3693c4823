"""Linear attention with the tokens of a sequence spread over ranks: sequence parallelism, LASP-2.

Rank r of W has tokens r T .. (r + 1) T of q, k, v and gates; it gets its tokens' outputs. States
have a fixed size, so ranks exchange those and no tokens: one all-gather of states in the forward
and one of their gradients in the backward, whatever T. From them every rank computes its incoming
state (or outgoing gradient) and runs the ordinary operators. Results equal one process's to
rounding.

    from attnforge.distributed import linear_sp

    o, state = linear_sp.gla(q, k, v, gk, group=group)           # in every rank of the group

Arguments are those of the functions of the same names, plus ``group`` (default: all ranks).

    initial_state: of a batch, used on the first rank; of packed sequences all [N, ..] everywhere.
    output_final_state: the state behind this rank's tokens: final on the last rank, and for a
        packed sequence on the rank that has its last token. Gradients come in through all of them.
    cu_seqlens: boundaries of the whole, the same on all ranks; T must then be equal on all ranks.

Every rank takes part in the backward, or the others wait. Delta rules exchange [K, K + V] per head
instead of [K, V], and their backward runs twice, the first time for the gradient of the incoming
state. Sources: Sun et al., LASP-2 (2025); transition matrices as in DeltaNet (Yang et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnforge.distributed._segments import (
    Layout,
    Segment,
    decays,
    gather,
    layout,
    prefix,
    suffix,
)
from attnforge.ops import _linear_checks
from attnforge.ops import delta as delta_ops
from attnforge.ops import linear as linear_ops
from attnforge.ops._checks import fail
from attnforge.ops._linear_maps import lightning_decay, retention_decay

__all__ = [
    "delta_rule",
    "gated_delta_rule",
    "gla",
    "kda",
    "lightning_attention",
    "linear_attention",
    "retention",
    "simple_gla",
]


class _Rule(NamedTuple):
    """A function's recurrence: its kind of gate, whether it erases, and its other options."""

    name: str
    gate: str  # none, head, scalar, key, value
    delta: bool
    scale: float
    backend: str | None


def _local(rule: _Rule, x: dict[str, Tensor], ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """The function itself, on this rank's tokens, from their incoming states."""
    o: dict[str, Any] = {
        "scale": rule.scale, "initial_state": x["state"], "output_final_state": True,
        "cu_seqlens": ends, "backend": rule.backend,
    }  # fmt: skip
    qkv, gate = (x["q"], x["k"], x["v"]), x.get("gate")
    if rule.delta:
        run = delta_ops.kda if rule.gate == "key" else delta_ops.gated_delta_rule
        return run(*qkv, gate, x["beta"], **o)  # type: ignore[arg-type, return-value]
    additive: dict[str, Callable[[], Any]] = {
        "none": lambda: linear_ops.linear_attention(*qkv, **o),
        "head": lambda: linear_ops.retention(*qkv, decay=gate, **o),
        "scalar": lambda: linear_ops.simple_gla(*qkv, gate, **o),
        "key": lambda: linear_ops.gla(*qkv, gate, **o),
        "value": lambda: linear_ops.gla(*qkv, gv=gate, **o),
    }
    return additive[rule.gate]()  # type: ignore[no-any-return]


def _read(x: Tensor, heads: int) -> Tensor:
    """q or k at value heads, in the states' dtype."""
    wide = x.to(_linear_checks.accumulator(x.dtype))
    return wide.repeat_interleave(heads // x.shape[2], 2)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """sum_t a_t b_t^T: [B, T, H, K], [B, T, H, V] -> [B, H, K, V]."""
    return a.permute(0, 2, 3, 1) @ b.permute(0, 2, 1, 3)


def _segment(rule: _Rule, x: dict[str, Tensor], at: slice, state: Tensor, begun: bool) -> Segment:
    """E and Phi of the tokens ``at``; begun: they start from ``state``, and nothing else enters."""
    part = {n: t[:, at] for n, t in x.items() if n not in ("state", "gate")}
    if "gate" in x:
        part["gate"] = x["gate"] if rule.gate == "head" else x["gate"][:, at]
    k, v = part["k"], part["v"]
    wide = _linear_checks.accumulator(v.dtype)
    if rule.delta:
        # The same recurrence of the columns [S | I], with no values in those of I.
        eye = torch.eye(k.shape[-1], dtype=wide, device=v.device)
        eye = eye.expand(*state.shape[:2], -1, -1)
        start = state if begun else torch.zeros_like(state)
        part["state"] = torch.cat([start, eye], -1)
        part["v"] = torch.cat([v, v.new_zeros(*v.shape[:3], k.shape[-1])], -1)
        both = _local(rule, part, None)[1]
        end, phi = both[..., : v.shape[-1]], both[..., v.shape[-1] :]
        return Segment(end, torch.zeros_like(phi) if begun else phi, True)
    keys, values = _read(k, v.shape[2]), v.to(wide)
    gates = decays(part.get("gate"), rule.gate, v)
    total = values.new_zeros(1, 1, 1).expand(v.shape[0], v.shape[2], 1)
    if gates is not None:
        total = gates.sum(1)
        later = torch.cat([gates[:, 1:], torch.zeros_like(gates[:, :1])], 1)
        weight = later.flip(1).cumsum(1).flip(1).exp()[:, : v.shape[1]]
        keys, values = (keys, values * weight) if rule.gate == "value" else (keys * weight, values)
    segment = Segment(_outer(keys, values), _per_entry(total.exp(), rule), False)
    if not begun:
        return segment
    return Segment(segment.after(state), torch.zeros_like(segment.phi), False)


def _per_entry(decay: Tensor, rule: _Rule) -> Tensor:
    """[B, HV, width] as factors of states [B, HV, K, V]."""
    return decay.unsqueeze(-2 if rule.gate == "value" else -1)


def _entering_gradient(
    rule: _Rule, x: dict[str, Tensor], dout: Tensor, dstate: Tensor, stop: int
) -> Tensor:
    """Additive rules: the gradient of the incoming state by outputs up to ``stop`` and the end."""
    q, dout = _read(x["q"][:, :stop], dout.shape[2]), dout[:, :stop]
    dout = dout.to(q.dtype)
    gates = decays(x.get("gate"), rule.gate, x["v"])
    if gates is None:
        return rule.scale * _outer(q, dout) + dstate
    weight = gates[:, :stop].cumsum(1).exp()
    q, dout = (q, dout * weight) if rule.gate == "value" else (q * weight, dout)
    total = _per_entry(gates[:, :stop].sum(1).exp(), rule)
    return rule.scale * _outer(q, dout) + total * dstate


class _Parallel(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """(rule, layout, group, names, *tensors) -> (out, state behind this rank's tokens)."""

    @staticmethod
    def forward(ctx: Any, rule: _Rule, at: Layout, group: Any, names: tuple[str, ...],
                *tensors: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        x = {n: t.detach() for n, t in zip(names, tensors, strict=True)}
        state = torch.where(at.owned[:, None, None, None], x["state"], 0.0)
        segments = _exchange(rule, x, state, at, group)
        if at.enters is not None:
            state[at.enters] = prefix(segments, at.rank)
        x["state"] = state
        wanted = ctx.needs_input_grad[4:]
        with torch.set_grad_enabled(any(wanted)):
            # The incoming state always needs one: it depends on inputs of other ranks.
            x = {
                n: t.requires_grad_(w or (n == "state" and any(wanted)))
                for (n, t), w in zip(x.items(), wanted, strict=True)
            }
            out, final = _local(rule, x, at.ends)
        ctx.rule, ctx.at, ctx.group, ctx.segments = rule, at, group, segments
        ctx.inputs, ctx.outputs, ctx.wanted = x, (out, final), wanted
        return out.detach(), final.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> Any:
        rule, at, x = ctx.rule, ctx.at, ctx.inputs
        own = torch.zeros_like(ctx.segments[0].end)
        if at.enters is not None and rule.delta:
            (grad,) = torch.autograd.grad(
                ctx.outputs, x["state"], (dout, dfinal), retain_graph=True
            )
            own = grad[at.enters]
        elif at.enters is not None:
            own = _entering_gradient(rule, x, dout, dfinal[at.enters], at.enter_stop)
        every = gather((own,), ctx.group)
        if at.leaves is not None:
            dfinal = dfinal.clone()
            dfinal[at.leaves] += suffix(ctx.segments, [g for (g,) in every], at.rank)
        asked = [t for t in x.values() if t.requires_grad]
        grads = iter(torch.autograd.grad(ctx.outputs, asked, (dout, dfinal), retain_graph=True))
        found = {n: next(grads) for n, t in x.items() if t.requires_grad}
        found["state"] = found["state"] * at.owned[:, None, None, None]
        results = [found[n] if w else None for n, w in zip(x, ctx.wanted, strict=True)]
        return (None, None, None, None, *results)


def _exchange(
    rule: _Rule, x: dict[str, Tensor], state: Tensor, at: Layout, group: Any
) -> list[Segment]:
    """Every rank's segment of the sequence that leaves it."""
    if at.leaves is not None:
        own = _segment(rule, x, slice(at.leave_start, None), state[at.leaves], at.begun)
    else:  # no tokens on top of a state of 0
        nothing = state.new_zeros(x["q"].shape[0], *state.shape[1:])
        own = _segment(rule, x, slice(0, 0), nothing, True)
    return [Segment(e, phi, own.dense) for e, phi in gather((own.end, own.phi), group)]


def _run(
    rule: _Rule,
    group: dist.ProcessGroup | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    op = f"distributed.linear_sp.{rule.name}"
    if not dist.is_initialized():
        fail(op, "no process group; want torch.distributed.init_process_group() before",
             RuntimeError)  # fmt: skip
    _linear_checks.heads(op, q, k, v)
    cu, count = _linear_checks.packed(op, q, cu_seqlens)
    total = dist.get_world_size(group) * q.shape[1]
    _linear_checks.boundary_values(op, cu, total)
    shape = (count, v.shape[2], q.shape[3], v.shape[3])
    if initial_state is None:
        initial_state = q.new_zeros(shape, dtype=_linear_checks.accumulator(q.dtype))
    state = _linear_checks.state(op, "initial_state", initial_state, shape, q, "[N, HV, K, V]")
    named = {"q": q, "k": k, "v": v, "gate": gate, "beta": beta, "state": state}
    given = {n: t for n, t in named.items() if t is not None}
    apply: Callable[..., tuple[Tensor, Tensor]] = _Parallel.apply
    out, final = apply(rule, layout(q, cu, group), group, tuple(given), *given.values())
    return out, final if output_final_state else None


def _scale(name: str, scale: float | None, q: Tensor) -> float:
    return _linear_checks.scale(f"distributed.linear_sp.{name}", scale, q.shape[-1])


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.linear_attention``, causal, without a denominator; see the module.

    For one, give v a last column of ones and divide by that column of the output.
    """
    rule = _Rule("linear_attention", "none", False, _scale("linear_attention", scale, q), backend)
    return _run(rule, group, q, k, v, None, None, initial_state, output_final_state, cu_seqlens)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.retention``: a constant log decay per head, [HV]; see the module."""
    if decay is None:
        decay = retention_decay(v.shape[2], device=v.device)
    decay = linear_ops._constant("distributed.linear_sp.retention", decay)
    rule = _Rule("retention", "head", False, _scale("retention", scale, q), backend)
    return _run(rule, group, q, k, v, decay, None, initial_state, output_final_state, cu_seqlens)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer_idx: int = 0,
    num_layers: int = 1,
    decay: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.lightning_attention``; options as in ``retention``."""
    if decay is None:
        decay = lightning_decay(v.shape[2], layer_idx, num_layers, device=v.device)
    return retention(q, k, v, decay=decay, **options)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.simple_gla``, g [B, T, HV] (or H); see the module."""
    rule = _Rule("simple_gla", "scalar", False, _scale("simple_gla", scale, q), backend)
    g = linear_ops._gate("distributed.linear_sp.simple_gla", q, v, "scalar", g)  # type: ignore[assignment]
    return _run(rule, group, q, k, v, g, None, initial_state, output_final_state, cu_seqlens)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.gla``, one of gk [B, T, HV, K] and gv [B, T, HV, V]; see the module."""
    op = "distributed.linear_sp.gla"
    kind, gate = linear_ops._vector_gate(op, gk, gv)
    gate = linear_ops._gate(op, q, v, kind, gate)
    rule = _Rule("gla", kind, False, _scale("gla", scale, q), backend)
    return _run(rule, group, q, k, v, gate, None, initial_state, output_final_state, cu_seqlens)


def _delta(
    name: str,
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    group: dist.ProcessGroup | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    op, channels = f"distributed.linear_sp.{name}", kind == "key"
    g, beta = delta_ops._factors(op, q, v, g, beta, channels)
    rule = _Rule(name, kind, True, _scale(name, scale, q), backend)
    if use_qk_l2norm_in_kernel:
        q, k = delta_ops._normalized(q), delta_ops._normalized(k)
    return _run(rule, group, q, k, v, g, beta, initial_state, output_final_state, cu_seqlens)


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
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.delta_rule``; see the module."""
    return _delta(
        "delta_rule", "none", q, k, v, None, beta, scale, initial_state, output_final_state,
        cu_seqlens, use_qk_l2norm_in_kernel, group, backend,
    )  # fmt: skip


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
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.gated_delta_rule``, g [B, T, HV] (or H); see the module."""
    return _delta(
        "gated_delta_rule", "scalar", q, k, v, g, beta, scale, initial_state, output_final_state,
        cu_seqlens, use_qk_l2norm_in_kernel, group, backend,
    )  # fmt: skip


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
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``attnforge.kda``, g [B, T, HV, K] (or H); see the module."""
    return _delta(
        "kda", "key", q, k, v, g, beta, scale, initial_state, output_final_state,
        cu_seqlens, use_qk_l2norm_in_kernel, group, backend,
    )  # fmt: skip
