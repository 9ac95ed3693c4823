"""Argument checks of the reductions family, in the manner of ``_checks``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import _checks
from attnforge.ops._checks import _name, _shape, fail

__all__ = [
    "boundaries",
    "boundary_values",
    "positive",
    "row_stat",
    "same_outputs",
    "scores",
    "threshold",
]


def scores(op: str, q: Any, k: Any, lse: Any) -> None:
    """q [B, Sq, Hq, D] and k [B, Sk, Hk, D] agree, and lse, if any, is [B, Hq, Sq]."""
    _checks.tensor(op, "q", q)
    _checks.tensor(op, "k", k)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            fail(
                op,
                f"{name} has {x.dim()} dims; got shape {_shape(x)}; want [batch, seq, heads, "
                "head_dim]; packed sequences are taken one at a time, as a batch of one",
            )
    if q.dtype is not k.dtype:
        fail(
            op,
            f"dtypes differ; got q {_name(q.dtype)}, k {_name(k.dtype)}; want one dtype; convert "
            f"with .to({q.dtype})",
        )
    if q.shape[0] != k.shape[0]:
        fail(
            op,
            f"batch sizes differ; got q {_shape(q)}, k {_shape(k)}; want one batch size in dim 0; "
            "expand() the shared one (stride 0 is read in place)",
        )
    _checks.dense(op, q, k, k)  # dtype, device, heads and head_dim
    if lse is not None:
        row_stat(op, "lse", lse, q)


def row_stat(op: str, name: str, x: Any, q: Tensor) -> None:
    """A floating [B, Hq, Sq] tensor on q's device."""
    _checks.tensor(op, name, x)
    want = (q.shape[0], q.shape[2], q.shape[1])
    if tuple(x.shape) != want:
        fail(
            op,
            f"{name} has shape {_shape(x)}; want [batch, heads_q, rows] = {want}, as "
            "flash_attention(..., return_lse=True) gives the LSE",
        )
    _checks._floating(op, name, x, q)


def boundaries(op: str, x: Any, q: Tensor) -> None:
    """int32 [n + 1], n >= 1, on q's device."""
    _checks.tensor(op, "boundaries", x)
    if x.dtype is not torch.int32:
        fail(
            op,
            f"boundaries has dtype {_name(x.dtype)}; want int32; convert with "
            "boundaries.to(torch.int32)",
            TypeError,
        )
    if x.dim() != 1 or x.shape[0] < 2:
        fail(
            op,
            f"boundaries has shape {_shape(x)}; want [spans + 1] with at least two entries; "
            "span t is keys boundaries[t] .. boundaries[t + 1] - 1",
        )
    if x.device != q.device:
        fail(op, f"boundaries is on {x.device}; want {q.device} like q; move it with .to()")


def boundary_values(op: str, x: Tensor, keys: int) -> None:
    """Boundaries rise within 0 .. keys; this reads them, so it runs inside the operator."""
    values = x.tolist()
    for n, value in enumerate(values):
        if not 0 <= value <= keys:
            fail(
                op,
                f"boundaries[{n}] is {value}; got {keys} keys; want 0 <= boundaries <= {keys}; "
                "clamp them to the keys there are",
            )
        if n and value < values[n - 1]:
            fail(
                op,
                f"boundaries decreases at entry {n}; got {values[n - 1]} then {value}; want rising "
                "order; an empty span repeats its boundary",
            )


def positive(op: str, name: str, value: Any) -> None:
    """An int >= 1."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 1:
        kind = ValueError if isinstance(value, int) else TypeError
        fail(op, f"{name} is {value!r}; want an int >= 1; use int() on what you have", kind)


def threshold(op: str, value: Any) -> None:
    """A number >= 0: hidden pairs have probability 0 and are no edges."""
    if not isinstance(value, (float, int)) or isinstance(value, bool):
        kind = type(value).__name__
        fail(op, f"threshold must be a number; got {kind}; want a float; use .item()", TypeError)
    if not 0.0 <= value < math.inf:
        fail(op, f"threshold is {value}; want a finite number >= 0; edges have P > threshold")


def same_outputs(op: str, dout: Any, out: Any) -> None:
    """dout and out are [B, S, H, D] of one shape, dtype and device."""
    _checks.tensor(op, "dout", dout)
    _checks.tensor(op, "out", out)
    if out.dim() != 4:
        fail(op, f"out has shape {_shape(out)}; want [batch, seq, heads, head_dim]; unsqueeze it")
    if out.dtype not in _checks._DTYPES:
        want = ", ".join(map(_name, _checks._DTYPES))
        fail(op, f"out has dtype {_name(out.dtype)}; want one of {want}; convert it first")
    if dout.shape != out.shape or dout.dtype != out.dtype or dout.device != out.device:
        fail(
            op,
            f"dout is {_shape(dout)} {_name(dout.dtype)} on {dout.device}; want {_shape(out)} "
            f"{_name(out.dtype)} on {out.device} like out; take it from a backward hook on out",
        )
