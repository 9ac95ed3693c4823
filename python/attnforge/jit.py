"""Score and mask functions of your own, in CUDA C++, compiled into the flash kernels at first use.

    alibi = attnforge.jit.score_mod(
        "float score(float s, const Place& at, const Aux& aux) {"
        "  return s - aux.slopes(at.head) * abs(at.position - at.key);"
        "}",
        aux={"slopes": slopes},
    )
    out = attnforge.flash_attention(q, k, v, score_mod=alibi)

The language of the snippets, what ``at`` and ``aux`` hold, and the limits are in ``docs/jit.md``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AUX_DTYPES", "CompileError", "Mod", "Signature", "known", "mask_mod", "remember",
           "score_mod"]  # fmt: skip

# Dtypes of aux tensors -> what a kernel reads them as.
AUX_DTYPES = {
    torch.float32: "float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
_SCALARS = {torch.float32: "float", torch.int64: "int64_t"}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PREFIX = "jit:"


class CompileError(ValueError):
    """A snippet does not compile. ``log`` is the compiler's whole text."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class Signature(NamedTuple):
    """What of a mod is compiled: not the numbers in its tensors."""

    kind: str  # "score" or "mask"
    source: str
    aux: tuple[tuple[str, str, int], ...]  # name, C++ type, rank; 0 is a number


class Mod:
    """A score or mask function with its tensors: made by ``score_mod`` and ``mask_mod``."""

    def __init__(self, kind: str, source: str, aux: Mapping[str, Any] | None) -> None:
        where = f"attnforge.jit.{kind}_mod"
        if not isinstance(source, str):
            raise TypeError(f"{where}: source is {type(source).__name__}; want a str of CUDA C++")
        if not re.search(rf"\b{kind}\s*\(", source):
            raise ValueError(
                f"{where}: source defines no function {kind}; want "
                + ("float score(float s, const Place& at, const Aux& aux) { ... }"
                   if kind == "score" else "bool mask(const Place& at, const Aux& aux) { ... }")
            )  # fmt: skip
        self.tensors = tuple(_aux(where, name, x) for name, x in (aux or {}).items())
        types = (
            (name, _SCALARS[x.dtype] if x.dim() == 0 else AUX_DTYPES[x.dtype], x.dim())
            for name, x in zip(aux or {}, self.tensors, strict=True)
        )
        self.signature = Signature(kind, source, tuple(types))

    def __repr__(self) -> str:
        names = ", ".join(name for name, _, _ in self.signature.aux)
        return f"attnforge.jit.{self.signature.kind}_mod(..., aux=({names}))"


def score_mod(source: str, aux: Mapping[str, Any] | None = None) -> Mod:
    """A function of single logits, for ``score_mod=`` of the flash functions.

    source: CUDA C++ that defines ``float score(float s, const Place& at, const Aux& aux)``; s is
        the logit in natural units, after scale, softcap and ALiBi. It returns another one.
    aux: names of ``Aux`` -> tensors of 1 to 4 dimensions on the device of q (fp32, fp16, bf16,
        int32, int64, uint8, bool), read as ``aux.name(i, j)``; or numbers, read as ``aux.name``.

    Compiling happens at the first call, once per source, dtype, head dim and architecture; numbers
    and the content of tensors may change without. Raises ValueError or TypeError on bad arguments;
    a snippet that does not compile raises ``CompileError`` at that call. Forward only.
    """
    return Mod("score", source, aux)


def mask_mod(source: str, aux: Mapping[str, Any] | None = None) -> Mod:
    """A function that hides keys, for ``mask_mod=``.

    source: CUDA C++ that defines ``bool mask(const Place& at, const Aux& aux)``. True is seen,
        beside causal masks, windows and lengths, which stay. Tiles of keys that nobody sees are
        still computed. Values of hidden keys do not count, NaN neither.

    Otherwise as ``score_mod``.
    """
    return Mod("mask", source, aux)


def _aux(where: str, name: Any, x: Any) -> Tensor:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}: aux has the name {name!r}; want a C++ identifier such as 'bias'"
        )
    if isinstance(x, (bool, int)):
        if not -(1 << 63) <= x < 1 << 63:
            raise ValueError(f"{where}: aux {name} is {x}; want a number of 64 bits")
        return torch.tensor(int(x), dtype=torch.int64)
    if isinstance(x, float):
        return torch.tensor(x, dtype=torch.float32)
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: aux {name} is {type(x).__name__}; want a tensor or a number")
    if not 1 <= x.dim() <= 4:
        raise ValueError(
            f"{where}: aux {name} has {x.dim()} dimensions; want 1 to 4, or a Python number"
        )
    if x.dtype not in AUX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in AUX_DTYPES)
        raise TypeError(f"{where}: aux {name} has dtype {x.dtype}; want one of {names}")
    return x


# Operators take plain types: a call carries the key of its mods in ``score_fn``, and their tensors
# behind the others in ``mods``. Keys are of signatures, of which a program has few.
_KNOWN: dict[str, tuple[Signature, ...]] = {}


def remember(mods: tuple[Mod, ...]) -> str:
    """The ``score_fn`` that stands for mods."""
    signatures = tuple(mod.signature for mod in mods)
    key = _PREFIX + hashlib.sha256(repr(signatures).encode()).hexdigest()[:32]
    _KNOWN[key] = signatures
    return key


def known(score_fn: str) -> tuple[Signature, ...]:
    """The signatures of the mods that a ``score_fn`` stands for; () for any other."""
    return _KNOWN[score_fn] if score_fn.startswith(_PREFIX) else ()
