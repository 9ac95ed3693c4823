"""What a run-time kernel is, and its C++: a user's functions around ``csrc/cuda/jit/kernels.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnforge.backends.jit import _structs
from attnforge.jit import Signature

__all__ = ["Program", "mod_struct", "pack_mod"]

_SCALARS: dict[str, Any] = {"float": ctypes.c_float, "int64_t": ctypes.c_int64}
_CALLS = {
    "score": "AF_DEVICE float score(float s, const Place& at) const "
    "{ return user_score::score(s, at, score_aux); }",
    "mask": "AF_DEVICE bool sees(const Place& at) const { return user_mask::mask(at, mask_aux); }",
}


def _view(rank: int) -> Any:
    fields = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * rank))
    return type("View", (_structs.Struct,), {"_fields_": fields})


def _aux_struct(signature: Signature) -> Any:
    fields = [(name, _view(rank) if rank else _SCALARS[kind]) for name, kind, rank in signature.aux]
    return type("Aux", (_structs.Struct,), {"_fields_": fields})


def _aux_source(signature: Signature) -> str:
    members = (f"View<{kind}, {rank}>" if rank else kind for _, kind, rank in signature.aux)
    body = " ".join(f"{m} {name};" for m, (name, _, _) in zip(members, signature.aux, strict=True))
    return f"struct Aux {{ {body} }};"


@cache
def mod_struct(mods: tuple[Signature, ...]) -> Any:
    """The twin of ``struct Mod``; C++ gives a struct, or a member, without fields one byte."""

    def room(struct: Any) -> Any:
        return struct if struct._fields_ else ctypes.c_char

    fields = [(f"{mod.kind}_aux", room(_aux_struct(mod))) for mod in mods]
    return type("Mod", (_structs.Struct,), {"_fields_": fields or [("room", ctypes.c_char)]})


@cache
def _call_struct(merge: bool, mods: tuple[Signature, ...]) -> Any:
    fields: list[tuple[str, Any]] = [("params", _structs.Merge)]
    if not merge:
        fields = [("params", _structs.Fwd), ("splits", _structs.Splits),
                  ("grid", _structs.Grid), ("mod", mod_struct(mods))]  # fmt: skip
    return type("Call", (_structs.Struct,), {"_fields_": fields})


def pack_mod(mods: tuple[Signature, ...], tensors: Sequence[Tensor]) -> Any:
    """A ``mod_struct`` with the tensors' addresses and the numbers."""
    packed, rest = mod_struct(mods)(), iter(tensors)
    for mod in mods:
        aux = getattr(packed, f"{mod.kind}_aux")
        for name, _, rank in mod.aux:
            x = next(rest)
            if rank == 0:
                setattr(aux, name, x.item())
                continue
            view = getattr(aux, name)
            view.data = x.data_ptr()
            view.stride[:] = x.stride()
    return packed


@dataclass(frozen=True)
class Program:
    """A kernel to compile. kind: "fwd", "decode" or "merge"; the latter has a dtype alone."""

    kind: str
    dtype: torch.dtype
    head_dim: int = 0  # of the tile: multiples of 16
    v_head_dim: int = 0
    features: bool = False  # softcap or ALiBi
    mods: tuple[Signature, ...] = ()

    @property
    def call(self) -> Any:
        """The twin of its ``Case::Call``."""
        return _call_struct(self.kind == "merge", self.mods)

    def source(self) -> str:
        """The translation unit. The user's lines keep their numbers, in files by the kind."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        dtype, _ = _structs.DTYPES[self.dtype]
        yield f"#define ATTNFORGE_DTYPE {dtype}"
        yield '#include "cuda/jit/kernels.h"'
        yield "namespace attnforge::cuda::jit {"
        if self.kind == "merge":
            yield f"struct Case : MergeCase<ElementOf<DType::{dtype}>::Type> {{}};"
        else:
            yield from self._mod()
            decode, features, mod = (
                str(bool(x)).lower() for x in (self.kind == "decode", self.features, self.mods)
            )
            dims = f"{{{self.head_dim}, {self.v_head_dim}}}"
            yield (
                f"constexpr FwdTile kTile = tile_of({decode}, DType::{dtype}, {dims}, "
                f"{features}, {mod});"
            )
            yield f"struct Case : RowCase<{decode}, kTile, Mod> {{}};"
        yield from _structs.layout(self.call, "Case::Call")
        yield (
            "template __global__ void kernel<Case, Case::kRows, Case::kThreads, Case::kShared>("
            "const __grid_constant__ Case::Call);"
        )
        yield "}  // namespace attnforge::cuda::jit"

    def _mod(self) -> Iterator[str]:
        for mod in self.mods:
            yield f"namespace user_{mod.kind} {{"
            yield _aux_source(mod)
            yield f'#line 1 "{mod.kind}_mod"'
            yield mod.source
            yield '#line 1 "generated"'
            yield "}"
        kinds = {mod.kind for mod in self.mods}
        scores, masks = (str(kind in kinds).lower() for kind in ("score", "mask"))
        yield "struct Mod {"
        yield f"static constexpr bool kScores = {scores}, kMasks = {masks};"
        for mod in self.mods:
            yield f"user_{mod.kind}::Aux {mod.kind}_aux;"
            yield _CALLS[mod.kind]
        yield "};"
