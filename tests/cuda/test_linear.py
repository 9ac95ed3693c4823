"""CUDA kernels of the linear family under the emulator, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnforge
from attnforge.backends.cuda import linear
from attnforge.testing.compare import Report, assert_same, compare, same_bits
from attnforge.testing.linear import LinearCase, linear_inputs

pytestmark = pytest.mark.usefixtures("twin")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
NAMES = ["fp32", "bf16", "fp16"]
GATES = ("none", "head", "scalar", "key", "value")
# Of 16-bit calls: tf32 operands, 2^-11 each. A result has at most three: what is written, the state
# or the chunk's products, what reads it.
ROUNDING = {FP32: 0.0, BF16: 3 * 2.0**-11, FP16: 3 * 2.0**-11}


def check(case: LinearCase, **changes: Any) -> Report:
    inputs = linear_inputs(case, **changes)
    truth = inputs.truth(ROUNDING[case.dtype])
    return compare(inputs.run("emulated"), truth, str(case)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dims", [(64, 128), (128, 64)], ids=["64x128", "128x64"])
def test_every_kernel(dims: tuple[int, int], gate: str, dtype: torch.dtype) -> None:
    # the backward has the other width as well
    check(LinearCase(time=41, heads=1, value_heads=1, key_dim=dims[0], value_dim=dims[1],
                     gate=gate, dtype=dtype))  # fmt: skip
