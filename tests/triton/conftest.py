"""Triton kernels without a GPU: run by the interpreter, or compiled ahead of time.

Triton decides when it is imported, so the two need processes of their own:

    TRITON_INTERPRET=1 python -m pytest tests/triton     # values: everything but test_compile.py
    python -m pytest tests/triton                        # compilation: test_compile.py alone
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from attnforge import _settings
from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import Report, compare
from attnforge.triton_kernels.flash import config

HERE = Path(__file__).parent
collect_ignore = [
    path.name
    for path in HERE.glob("test_*.py")
    if (path.name == "test_compile.py") == _settings.triton_interpreted()
]

# Small and unequal, so that short sequences have whole tiles, edges and tails in each direction.
TILES = {
    "fwd": {"BLOCK_M": 32, "BLOCK_N": 16},
    "decode": {"BLOCK_M": 16, "BLOCK_N": 32},
    "dkdv": {"BLOCK_M": 16, "BLOCK_N": 32},
    "dq": {"BLOCK_M": 32, "BLOCK_N": 16},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles for the interpreter, whose time goes by programs; numpy is silent about NaN."""
    if _settings.triton_interpreted():
        monkeypatch.setattr(
            config, "choose", lambda kernel, _: {**TILES[kernel], "num_warps": 4, "num_stages": 1}
        )
    with np.errstate(all="ignore"):
        yield


def _check(case: FlashCase, grad: bool = True, **more: object) -> Report:
    """Run a case, with gradients or forward alone, and hold it to the bounds of 16-bit P."""
    inputs: FlashInputs = case.make()
    got = inputs.run("triton") if grad else inputs.forward("triton", **more)
    return compare(got, inputs.truth(grad, rounded=True), inputs.context).check()


@pytest.fixture
def check() -> object:
    """``check(case, grad=True, **keywords of the call)``."""
    return _check
