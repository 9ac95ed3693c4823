"""The Python twins of the structs that a run-time kernel takes: of
``csrc/include/attnforge/params.h``, ``csrc/cuda/flash/{launch,schedule}.h``,
``csrc/cuda/tile/scores.h``.

Every generated source asserts their layout, so a twin that is out of step
does not compile. Fields that run-time kernels do not use are there for their room only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "Fwd", "Grid", "Merge", "Problem", "RowStat", "ScoreMap", "Splits", "Struct",
           "TensorRef", "layout"]  # fmt: skip

# Of C++'s DType: names and numbers.
DTYPES = {
    torch.float32: ("kFloat32", 0),
    torch.float16: ("kFloat16", 1),
    torch.bfloat16: ("kBFloat16", 2),
}


class Struct(ctypes.Structure):
    """A struct of ``attnforge`` or, by CXX, of another name."""

    CXX = ""


class TensorRef(Struct):
    CXX = "TensorRef"
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "seq_stride", "head_stride")),
    )

    @classmethod
    def of(cls, x: Tensor) -> TensorRef:
        """Of [batch, seq, heads, dim], or [total, heads, dim]."""
        batch = x.stride(0) if x.dim() == 4 else 0
        return cls(x.data_ptr(), batch, x.stride(-3), x.stride(-2))


class RowStat(Struct):
    CXX = "RowStatRef"
    _fields_ = (("data", c_void_p), ("batch_stride", c_int64), ("head_stride", c_int64))

    @classmethod
    def of(cls, x: Tensor) -> RowStat:
        """Of [batch, heads, seq], or [heads, total]."""
        return cls(x.data_ptr(), x.stride(0) if x.dim() == 3 else 0, x.stride(-2))


class Mods(Struct):
    CXX = "FlashMods"
    _fields_ = (("room", c_int64 * 45),)


class Problem(Struct):
    CXX = "FlashProblem"
    _fields_ = (
        *((name, c_int32) for name in ("dtype", "q_dtype", "out_dtype")),
        *((name, c_int64) for name in ("batch", "seqlen_q", "seqlen_k", "total_q", "total_k",
                                       "heads_q", "heads_k", "head_dim", "v_head_dim")),
        *((name, c_void_p) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")),
        ("seqused_batch", c_int64),
        ("seqused_head", c_int64),
        ("alibi_slopes", c_void_p),
        ("alibi_batch_stride", c_int64),
        ("sinks", c_void_p),
        ("softmax_scale", c_float),
        ("softcap", c_float),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("mods", Mods),
    )  # fmt: skip


class Fwd(Struct):
    CXX = "FlashFwdParams"
    _fields_ = (
        ("problem", Problem),
        *((name, TensorRef) for name in ("q", "k", "v", "out", "out_lo")),
        ("lse", RowStat),
        ("route", c_int32),
        # few_rows, most_rows, split_keys, num_splits, the plan, tiles, workspace
        ("few_rows", c_int64),
        ("room", c_int64 * 13),
    )


class Splits(Struct):
    CXX = "cuda::SplitParams"
    _fields_ = (
        ("splits", c_int64),
        ("keys", c_int64),
        ("out", TensorRef),
        ("lse", RowStat),
        ("out_stride", c_int64),
        ("lse_stride", c_int64),
        ("by_sequence", c_bool),
    )


class ScoreMap(Struct):
    CXX = "cuda::ScoreMap"
    _fields_ = (
        *((name, c_float) for name in ("scale", "gain", "cap")),
        ("keys", c_int32 * 2),
        ("sloped", c_bool),
    )


class Grid(Struct):
    CXX = "cuda::RowGrid"
    _fields_ = (
        *((name, c_int32) for name in ("splits", "tiles", "heads", "batch", "pack", "above",
                                       "most")),
        ("map", ScoreMap),
    )  # fmt: skip

    @property
    def blocks(self) -> int:
        """Blocks of a launch."""
        return int(self.splits * self.tiles * self.heads * self.batch)


class Merge(Struct):
    CXX = "MergeParams"
    _fields_ = (
        ("dtype", c_int32),
        *((name, c_int64) for name in ("states", "batch", "seqlen", "heads", "dim")),
        *((name, c_void_p) for name in ("outs", "lses", "out", "lse")),
    )


def layout(call: type[Any], cxx: str) -> Iterator[str]:
    """C++ assertions that ``cxx`` and what it is made of lie in memory as ``call`` does.

    NVRTC has no ``offsetof``: members of the same sizes in the same order, which an initialiser
    with their names needs, lie at the same places.
    """
    seen: set[str] = set()
    todo: list[tuple[type[Any], str]] = [(call, cxx)]
    while todo:
        struct, name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        fields = [(field, kind) for field, kind in struct._fields_ if field != "room"]
        order = ", ".join(f".{field} = {{}}" for field, _ in fields)
        yield f"static_assert(sizeof({name}{{{order}}}) == {ctypes.sizeof(struct)});"
        for field, kind in fields:
            yield f"static_assert(sizeof({name}::{field}) == {ctypes.sizeof(kind)});"
            if isinstance(kind, type) and issubclass(kind, Struct) and kind.CXX:
                todo.append((kind, kind.CXX))
