"""Problems of the self-tests of flash kernels: one per kernel and group of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnforge._params import FLOAT8, SCORE_FNS, FlashGrads, FlashMods, FlashParams, FlashTape
from attnforge.reference import flash as reference

__all__ = ["GROUPS", "problem"]

# Features that share code are tested together; windows and sinks stand in the plain problem.
GROUPS: dict[str, frozenset[str]] = {
    "packed sequences": frozenset({"varlen"}),
    "softcap, ALiBi and used keys": frozenset({"softcap", "alibi", "seqused_k"}),
    "masks": frozenset({"row_bounds", "mask", "segments"}),
    "biases": frozenset({"key_bias", "bias", "rel_bias", "forget_gate", "row_scale"}),
    "rope": frozenset({"rope"}),
    "dropout": frozenset({"dropout"}),
    **{name: frozenset({name}) for name in SCORE_FNS[1:]},
}
_HEADS, _HEADS_KV, _DIM = 4, 2, 64


def _mods(group: str, rows: int, keys: int, device: torch.device) -> FlashMods:
    """Tensors of a group of features that act on single scores."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=g, dtype=torch.int32).to(device)

    if group == "masks":
        ends = torch.tensor([3, keys - 5], dtype=torch.int32).expand(1, 1, rows, 2)
        return FlashMods(
            row_bounds=ends.contiguous().to(device),
            mask=normal(1, 1, rows, keys) < 1.0,
            segments_q=integers(1, rows),
            segments_k=integers(1, keys),
        )
    if group == "biases":
        gates = torch.nn.functional.logsigmoid(3 + normal(1, _HEADS, keys)).double()
        return FlashMods(
            key_bias=normal(1, 1, keys),
            bias=normal(1, _HEADS, rows, keys),
            rel_bias=normal(_HEADS, 9),
            decay=gates.cumsum(-1),
            row_scale=1 + normal(1, 1, rows) / 4,
        )
    if group == "rope":
        angles = normal(1, rows + keys, _DIM // 4)
        at = torch.arange(rows + keys, dtype=torch.int32, device=device).unsqueeze(0)
        return FlashMods(
            rope_cos=angles.cos(),
            rope_sin=angles.sin(),
            positions_q=at[:, keys:].contiguous(),
            positions_k=at[:, :keys].contiguous(),
        )
    return FlashMods(rng=torch.tensor([7, 1]))


def _params(group: str, rows: int, keys: int, device: torch.device) -> FlashParams:
    """A causal problem with what the group has; the plain one has a window and sinks."""
    g = torch.Generator().manual_seed(2)
    p = FlashParams(None, None, None, None, None, rows, keys, _DIM**-0.5, -1, 0, 0.0)
    if group == "":
        sinks = torch.randn(_HEADS, generator=g).to(device)
        return p._replace(sinks=sinks, window_left=keys * 3 // 4)
    if group in SCORE_FNS:
        return p._replace(score_fn=group)
    if group == "packed sequences":
        rows_at, keys_at = (
            torch.tensor([0, n // 3, n], dtype=torch.int32, device=device) for n in (rows, keys)
        )
        return p._replace(cu_seqlens_q=rows_at, cu_seqlens_k=keys_at)
    if group == "softcap, ALiBi and used keys":
        used = torch.tensor([keys - 7], dtype=torch.int32, device=device)
        slopes = torch.rand(_HEADS, generator=g).to(device) / 8
        return p._replace(seqused_k=used, alibi_slopes=slopes, softcap=5.0)
    if group == "latent":
        return p
    p = p._replace(mods=tuple(_mods(group, rows, keys, device)))
    return p._replace(dropout_p=0.25) if group == "dropout" else p


def _inputs(
    group: str, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, FlashParams]:
    """A GQA problem: whole and masked tiles, tails in both directions."""
    g, keys = torch.Generator().manual_seed(0), 330 if group == "" else 170
    sizes = ((1, rows, _HEADS, _DIM), *[(1, keys, _HEADS_KV, _DIM)] * 2)
    q, k, v = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
    p = _params(group, rows, keys, device)
    if group == "packed sequences":
        q, k, v = q[0], k[0], v[0]
    if group == "" and dtype is FLOAT8:
        factors = 0.5 + torch.rand(2, 1, _HEADS_KV, generator=g).to(device)
        p = p._replace(mods=tuple(FlashMods(qk_descale=factors[0], v_descale=factors[1])))
    return q, k, v, p


def _outputs(q: Tensor, width: int = 0) -> tuple[Tensor, Tensor]:
    """out and lse of a problem whose V is as wide as its K, or has `width` channels."""
    stat = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    shape = (*q.shape[:-1], width or q.shape[-1])
    out = q.new_empty(shape, dtype=torch.bfloat16 if q.dtype is FLOAT8 else q.dtype)
    return out, out.new_empty(stat, dtype=torch.float32)


def _forward(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(group, 200 if group == "" else 70, dtype, device)
    got, want, none = _outputs(q), _outputs(q), q.new_empty(0)
    run(q, k, v, p, *got, none)
    reference.forward(q, k, v, p, *want, none)
    return list(got), list(want)


def _backward(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(group, 200 if group == "" else 70, dtype, device)
    out, lse = _outputs(q)
    low = torch.empty_like(out) if dtype.itemsize == 2 else q.new_empty(0)
    reference.forward(q, k, v, p, out, lse, low)
    tape, dout = FlashTape(q, k, v, out, lse, low), torch.ones_like(out)
    none, learned = q.new_empty(0), [name.removeprefix("d") for name in FlashGrads._fields[4:]]
    found = []
    for backward in (run, reference.backward):
        given = (getattr(p.score_mods, name) for name in learned)
        dmods = [none if x is None else torch.empty_like(x) for x in given]
        dsinks = none if p.sinks is None else torch.empty_like(p.sinks)
        grads = FlashGrads._make([*map(torch.empty_like, (q, k, v)), dsinks, *dmods])
        backward(dout, None, tape, p, grads)
        found.append([x for x in grads if x.numel()])
    return found[0], found[1]


def _decode(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, p = _inputs(group, 3, dtype, device)
    got, want = _outputs(q), _outputs(q)
    run(q, k, v, p, *got, 2)
    reference.forward(q, k, v, p, *want, q.new_empty(0))
    return list(got), list(want)


def _latent_decode(
    group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Decode, and in the plain problem once more where V is the first channels of K."""
    found, wanted = _decode(group, run, dtype, device)
    if group == "":
        g = torch.Generator().manual_seed(3)
        sizes = ((1, 3, _HEADS, 576), (1, 170, 1, 576))
        q, k = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
        v, p = k[..., :512], _params("latent", 3, 170, device)
        got, want = _outputs(q, 512), _outputs(q, 512)
        run(q, k, v, p, *got, 2)
        reference.forward(q, k, v, p, *want, q.new_empty(0))
        found, wanted = [*found, *got], [*wanted, *want]
    return found, wanted


def _merge(
    _: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    outs = [x.to(device, dtype) for x in torch.randn(3, 1, 20, 4, 64, generator=g).unbind()]
    lses = [x.to(device) for x in torch.randn(3, 1, 4, 20, generator=g).unbind()]
    got, want = _outputs(outs[0]), _outputs(outs[0])
    run(outs, lses, *got)
    reference.merge(outs, lses, *want)
    return list(got), list(want)


_PROBLEMS = {"fwd": _forward, "bwd": _backward, "decode": _decode, "merge": _merge,
             "latent_decode": _latent_decode}  # fmt: skip


def problem(
    kind: str, group: str, run: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(results of the launcher ``run``, results of the reference) of ``<backend>.flash.<kind>``."""
    return _PROBLEMS[kind](group, run, dtype, device)
