"""``triton.linear.*``: the additive recurrence in Triton, ``triton_kernels/linear``.

The forward is one walk of the recurrence, the backward three with exchanged roles (a fourth for
gates of value channels); see ``triton_kernels.linear.walk``. Boundaries of sequences are read
on the device.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge import _settings
from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape
from attnforge.backends.triton import _interpreter
from attnforge.backends.triton._flash_tiles import padded
from attnforge.backends.triton._linear_tiles import space
from attnforge.backends.triton._selftest import SelfTest
from attnforge.backends.triton.flash import _COMMON, _delta, _on, _tiles, _unit
from attnforge.registry.predicates import Dim
from attnforge.registry.select import device_arch
from attnforge.registry.space import Config
from attnforge.registry.spec import KernelSpec
from attnforge.triton_kernels.linear import config as tiles_of

__all__ = ["SPECS"]

_NORMS = ("", "sum", "abs")


@cache  # kernels of a process never change
def _module(name: str) -> Any:
    if _settings.triton_interpreted():
        _interpreter.repair()
    return importlib.import_module(f"attnforge.triton_kernels.linear.{name}")


def _rows(x: Tensor) -> Any:
    """A View of [B, T, H, X] or [B, T, H]."""
    return importlib.import_module("attnforge.triton_kernels.tensors").View(x, *x.stride()[:3])


def _given(x: Tensor | None) -> Tensor | None:
    """Contiguous, and None where an argument or output is [0] for none."""
    return None if x is None or x.dim() == 1 else x.contiguous()


def _operand(x: Tensor, heads: int, factor: Tensor | None = None) -> Any:
    factor_view = None if factor is None else _rows(factor)
    return _module("walk").Operand(_rows(x), heads // x.shape[2], factor_view)


def _gate(p: LinearParams) -> Any:
    if p.gate is None:
        return None
    gate = p.gate.contiguous()
    if p.gate_kind == "head":
        gate = gate.expand(1, 1, -1).as_strided((1, 1, gate.shape[0]), (0, 0, 1))
    return _rows(gate)


class _Call:
    """What the walks of one call share."""

    def __init__(self, v: Tensor, p: LinearParams, config: Config | None) -> None:
        self.config = config
        self.p, self.heads, self.device = p, v.shape[2], v.device
        self.ends = None if p.cu_seqlens is None else p.cu_seqlens.contiguous()
        self.sequences = v.shape[0] if self.ends is None else self.ends.shape[0] - 1
        self.count, self.gate = v.shape[1], _gate(p)

    def tile(self, decay: int, rows: int, itemsize: int) -> dict[str, Any]:
        """Constants of a walk over states of ``rows`` rows."""
        fixed = {"BLOCK_T": tiles_of.SUB if decay else tiles_of.CHUNK, "BLOCK_R": padded(rows)}
        if self.config is not None:
            return {**fixed, **self.config}
        shape = tiles_of.Shape(device_arch(self.device)[1], itemsize, padded(rows))
        return {**fixed, **tiles_of.choose("channels" if decay else "numbers", shape)}

    def decay(self, transposed: bool) -> int:
        """Whether a decay is a number, or of rows or columns of a state or its transpose."""
        if self.p.gate_kind not in ("key", "value"):
            return 0
        return 2 if transposed == (self.p.gate_kind == "key") else 1

    def walk(
        self, read: Any, write: Any, x: Any, *,
        gains: tuple[float, float] = (1.0, 1.0), out: Tensor | None = None,
        first: Tensor | None = None, last: Tensor | None = None,
        z: tuple[Tensor | None, Tensor | None] = (None, None), extra: Tensor | None = None,
        backward: bool = False, transposed: bool = False, norm: int = 0,
        den: Tensor | None = None, low: Tensor | None = None,
        sides: tuple[Any, Tensor, Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        """One walk. sides: the operand that meets y, where terms go, where their sums start."""
        kernels, rows, columns = _module("walk"), read.view.ptr.shape[3], x.view.ptr.shape[3]
        decay = self.decay(transposed)
        sizes = self.tile(decay, rows, x.view.ptr.dtype.itemsize)
        sizes["BLOCK_C"] = min(sizes["BLOCK_C"], padded(columns))
        tiles = _tiles(columns, sizes["BLOCK_C"])
        other = view = tile_stride = end = None
        if sides is not None:
            other, terms, end = sides
            view = _rows(terms if decay else terms[0])
            tile_stride = None if decay else terms.stride(0)
        strides = (1, rows) if transposed else (columns, 1)
        if grid := tiles * self.heads * self.sequences:
            kernels.walk[(grid,)](
                kernels.Roles(read, write, x, *gains, self.gate,
                              None if extra is None else _rows(extra)),
                kernels.States(first, last, *z, *strides),
                kernels.Sink(*(None if y is None else _rows(y) for y in (out, low, den)),
                             self.p.eps),
                kernels.Sides(other, view, tile_stride, end),
                self.ends, self.count, self.heads, tiles, R=rows, C=columns, DECAY=decay,
                NORM=norm, BACKWARD=backward, BOTH=not self.p.causal, **sizes,
            )  # fmt: skip


def chunk_fwd(
    q: Tensor, k: Tensor, v: Tensor, p: LinearParams, outputs: LinearOutputs,
    *, config: Config | None = None,
) -> None:  # fmt: skip
    """Launcher of ``linear_chunk_fwd``."""
    if p.cu_seqlens is not None:  # rows of no sequence
        for x in (outputs.out, outputs.den, outputs.out_lo):
            x.zero_()
    call, heads = _Call(v, p, config), v.shape[2]
    q, k, v = map(_unit, (q, k, v))
    with _on(v.device):
        call.walk(
            _operand(q, heads), _operand(k, heads), _operand(v, heads), gains=(p.scale, 1.0),
            out=outputs.out, first=_given(p.initial_state), last=_given(outputs.final_state),
            z=(_given(p.initial_z), _given(outputs.final_z)), norm=_NORMS.index(p.normalize),
            den=_given(outputs.den), low=_given(outputs.out_lo),
        )  # fmt: skip


def _denominators(
    dout: Tensor, outputs: LinearOutputs, p: LinearParams
) -> tuple[Tensor | None, Tensor | None]:
    """(factor of dO, gradient of d) per row [B, T, HV]: n / base with base = d + eps or |d|."""
    if not p.normalize:
        return None, None
    den = outputs.den
    batch, time, heads = den.shape
    products = den.new_empty(batch, heads, time)
    if products.numel():
        _delta(dout, _unit(outputs.out), _given(outputs.out_lo), None, None, products)
    share = -products.transpose(1, 2)
    if p.normalize == "sum":
        factor = 1.0 / (den + p.eps)
        return factor, (share * factor).contiguous()
    factor = 1.0 / den.abs().clamp_min(p.eps)
    slope = torch.where(den.abs() > p.eps, den.sign(), 0.0)
    return factor, (share * factor * slope).contiguous()


def _end(
    dfinal_state: Tensor | None, dfinal_z: Tensor | None, outputs: LinearOutputs, kind: str
) -> Tensor | None:
    """<dS_T, S_T> per head or gated channel, where the sums of a gate's gradient start."""
    if dfinal_state is None and dfinal_z is None:
        return None
    total: Tensor | None = None
    if dfinal_state is not None:
        products = dfinal_state * outputs.final_state
        total = products.sum(2) if kind == "value" else products.sum(3)
    if dfinal_z is not None:
        by_row = dfinal_z * outputs.final_z
        total = by_row if total is None else total + by_row
    assert total is not None
    return (total.sum(-1) if kind == "scalar" else total).contiguous()


def _terms(call: _Call, q: Tensor, v: Tensor, dgate: Tensor) -> tuple[int, Tensor]:
    """(column tiles of K, terms [2, tiles, B, T, HV] of a gate per token: of q dq and of k dk)."""
    columns = call.tile(0, v.shape[3], v.dtype.itemsize)["BLOCK_C"]
    tiles = _tiles(q.shape[3], min(columns, padded(q.shape[3])))
    shape = dgate.shape if call.p.gate_kind == "scalar" else (0,)
    return tiles, dgate.new_empty(2, tiles, *shape)


def chunk_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    dfinal_z: Tensor | None,
    tape: LinearTape,
    p: LinearParams,
    grads: LinearGrads,
    *,
    config: Config | None = None,
) -> None:
    """Launcher of ``linear_chunk_bwd``.

    dq and dk of value heads that share one are added up from fp32 parts per value head.
    """
    q, k, v, dout = map(_unit, (tape.q, tape.k, tape.v, dout))
    call, heads = _Call(v, p, config), v.shape[2]
    if p.cu_seqlens is not None:  # rows of no sequence
        for x in grads[:3] if p.gate_kind == "head" else grads[:4]:
            x.zero_()
    shared = heads > q.shape[2]
    dq, dk = (
        x.new_zeros((*v.shape[:3], x.shape[3]), dtype=torch.float32) if shared else x
        for x in (grads.dq, grads.dk)
    )
    dgate = _given(grads.dgate)
    with _on(v.device):
        factor, extra = _denominators(dout, tape.outputs, p)
        q_rows, k_rows, v_rows = (_operand(x, heads) for x in (q, k, v))
        dn = _operand(dout, heads, factor)
        state, dstate = _given(p.initial_state), _given(dfinal_state)
        q_side = k_side = o_side = v_side = None
        if dgate is not None:
            end = _end(dfinal_state, dfinal_z, tape.outputs, p.gate_kind)
            tiles, terms = _terms(call, q, v, dgate)
            if p.gate_kind == "value":
                o_side, v_side = (dn, dgate, None), (v_rows, dgate, end)
            elif p.gate_kind == "key":
                q_side, k_side = (q_rows, dgate, None), (k_rows, dgate, end)
            else:
                q_side, k_side = (q_rows, terms[0], None), (k_rows, terms[1], None)
        call.walk(
            dn, v_rows, k_rows, gains=(p.scale, 1.0), out=dq, first=state, extra=extra,
            z=(_given(p.initial_z), None), transposed=True, sides=q_side,
        )  # fmt: skip
        call.walk(
            v_rows, dn, q_rows, gains=(1.0, p.scale), out=dk, first=dstate, extra=extra,
            z=(_given(dfinal_z), _given(grads.dinitial_z)), backward=True, transposed=True,
            sides=k_side,
        )  # fmt: skip
        if o_side is not None:  # o once more, in fp32
            call.walk(q_rows, k_rows, v_rows, gains=(p.scale, 1.0), first=state, sides=o_side)
        call.walk(
            k_rows, q_rows, dn, gains=(1.0, p.scale), out=grads.dv, first=dstate,
            last=_given(grads.dinitial_state), backward=True, sides=v_side,
        )  # fmt: skip
        if dgate is not None and p.gate_kind == "scalar" and call.sequences * heads:
            _module("over_time").over_time[(call.sequences * heads,)](
                _rows(terms[0, 0]), _rows(terms[1, 0]), call.gate, end, _rows(dgate), call.ends,
                call.count, heads, tiles, terms.stride(1), BLOCK_T=tiles_of.CHUNK, num_warps=4,
            )  # fmt: skip
    for whole, parts in ((grads.dq, dq), (grads.dk, dk)):
        if shared:
            batch, time, few, width = whole.shape
            whole.copy_(parts.view(batch, time, few, heads // few, width).sum(3))


def launch_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, indices: Tensor | None, out: Tensor, *,
    scale: float, gate: Tensor | None, kind: str, beta: Tensor | None = None,
    z: Tensor | None = None, norm: int = 0, eps: float = 0.0,
) -> None:  # fmt: skip
    """One token per row [B, heads, X] on a pool of states; beta: of the delta rule."""
    (batch, heads, width), rows = v.shape, q.shape[2]
    sizes = {"BLOCK_R": padded(rows), "BLOCK_C": min(padded(width), tiles_of.STEP_COLUMNS)}
    tiles = _tiles(width, sizes["BLOCK_C"])

    def view(x: Tensor | None) -> Any:
        return None if x is None else _rows(_unit(x).unsqueeze(1))

    if kind == "head" and gate is not None:
        gate = gate.contiguous().expand(batch, heads)
    per = tiles if norm else 1
    if grid := batch * heads * _tiles(tiles, per):
        with _on(v.device):
            _module("step").step[(grid,)](
                view(q), view(k), view(v), view(gate), view(beta), view(out), state, z,
                None if indices is None else indices.contiguous(), state.shape[0], scale, eps,
                heads, heads // q.shape[1], tiles, per, R=rows, C=width,
                DECAY={"key": 1, "value": 2}.get(kind, 0), NORM=norm, num_warps=4, **sizes,
            )  # fmt: skip


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    indices: Tensor | None,
    p: LinearParams,
    out: Tensor,
) -> None:
    """Launcher of ``linear_step``."""
    launch_step(q, k, v, state, indices, out, scale=p.scale, gate=p.gate, kind=p.gate_kind, z=z,
                norm=_NORMS.index(p.normalize), eps=p.eps)  # fmt: skip


_DEVICE, _DTYPES, _TRITON = _COMMON[0], _COMMON[1], _COMMON[-1]
_REQUIRES = (_DEVICE, _DTYPES, Dim("head_dim", 1, 256), Dim("v_head_dim", 1, 256), _TRITON)


def _spec(kind: str, notes: str) -> KernelSpec:
    return KernelSpec(
        id=f"triton.linear.{kind}",
        op=f"linear_{kind}",
        backend="triton",
        launch=f"{__name__}:{kind}",
        requires=(*_REQUIRES, SelfTest(f"linear.{kind}")),
        score=50.0,  # above the reference; native kernels of a device go first
        space=None if kind == "step" else space(),
        notes=notes,
    )


SPECS = (
    _spec("chunk_fwd", "chunks of 32 (16 with gates per channel), the state in registers"),
    _spec("chunk_bwd", "three walks of the same recurrence, nothing stored between"),
    _spec("step", "a tile of a state per program, read once and written once"),
)
