"""Triton's interpreter, put right where 3.6 is wrong, so that kernels run on CPU tensors.

With ``TRITON_INTERPRET=1`` Triton runs kernels in numpy, which is how they are tested without a
GPU. Three things of it are repaired, once, before the first interpreted launch:

- a loop bound is an array of one element, which numpy 2.4 no longer turns into an int;
- fp32 to bf16 cuts instead of rounding to nearest even, and loses the carry where it does round;
- a product of bf16 tiles multiplies their bit patterns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["repair"]


@cache  # a patch is put in once per process
def repair() -> None:
    """Patch ``triton.runtime.interpreter``; only for a process that interprets."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    convert = interpreter._convert_float
    builder = interpreter.InterpreterBuilder
    plain_dot = builder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = data.view(np.uint32) if data.flags.c_contiguous else data.copy().view(np.uint32)
            even = (bits >> 16) & 1
            rounded = (bits.astype(np.uint64) + 0x7FFF + even) >> 16
            return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return convert(data, source, target, mode)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def wide(x: Any) -> Any:
            if x.dtype.scalar == tl.bfloat16:
                return interpreter.TensorHandle(
                    convert_float(x.data, tl.bfloat16, tl.float32, None), tl.float32
                )
            return x

        with np.errstate(all="ignore"):
            return plain_dot(self, wide(a), wide(b), *rest)

    interpreter._patch_lang_tensor = patched
    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
