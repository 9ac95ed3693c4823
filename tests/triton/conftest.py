"""Triton kernels on a GPU, or without one: run by the interpreter, or compiled ahead of time.

Triton decides when it is imported, so the two need processes of their own:

    TRITON_INTERPRET=1 python -m pytest tests/triton     # values: everything but test_compile.py
    python -m pytest tests/triton                        # compilation: test_compile.py alone

Where a GPU is there and nothing is interpreted, the same tests of values run on it, with the tiles
that calls get.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from attnforge import _settings
from attnforge.testing import cases
from attnforge.testing.cases import FlashCase, FlashInputs
from attnforge.testing.compare import Report, compare
from attnforge.triton_kernels.flash import config
from attnforge.triton_kernels.paged import config as paged_config

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available() and not _settings.triton_interpreted()
collect_ignore = [
    path.name
    for path in HERE.glob("test_*.py")
    if not ON_GPU and (path.name == "test_compile.py") == _settings.triton_interpreted()
]

# Small and unequal, so that short sequences have whole tiles, edges and tails in each direction.
TILES = {
    "fwd": {"BLOCK_M": 32, "BLOCK_N": 16, "USE_TMA": 0},
    "decode": {"BLOCK_M": 16, "BLOCK_N": 32},
    "dkdv": {"BLOCK_M": 16, "BLOCK_N": 32},
    "dq": {"BLOCK_M": 32, "BLOCK_N": 16},
}
# A tile of 16 keys lies in one page from 16 slots on; both kinds of lookup are for small caches.
PAGED_TILES = {
    "few": {"BLOCK_M": 16, "BLOCK_N": 16},
    "many": {"BLOCK_M": 32, "BLOCK_N": 16},
}


@pytest.fixture
def device() -> str:
    """Where the kernels run: what a test makes by itself goes there."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    """Cases on the device; small tiles for the interpreter; numpy is silent about NaN."""
    monkeypatch.setattr(cases, "DEVICE", device)
    if _settings.triton_interpreted():
        for module, tiles in ((config, TILES), (paged_config, PAGED_TILES)):
            monkeypatch.setattr(
                module,
                "choose",
                lambda kernel, _, tiles=tiles: {**tiles[kernel], "num_warps": 4, "num_stages": 1},
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
