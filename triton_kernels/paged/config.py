"""Tile sizes of the paged kernels: what ships, and what a tuner may try. Plain data, no Triton.

``few`` serves sequences whose packed rows fit 16 rows of a tensor core, ``many`` the others. What
was said of flash holds: a choice depends on nothing that a batch could change, and no number was
measured yet; ``budgets.json`` holds what the compiler makes of them.
"""

from __future__ import annotations

from attnforge.triton_kernels.flash import config as flash
from attnforge.triton_kernels.flash.config import SHARED_LIMIT, Shape

__all__ = ["FEW", "SPACE", "choose", "fits"]

FEW = 16  # packed rows of a sequence
_AS = {"few": "decode", "many": "fwd"}  # flash's kernels with the same operands in flight

SPACE = {
    "few": flash.SPACE["decode"],
    "many": {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4],
    },
}


def choose(kernel: str, shape: Shape) -> dict[str, int]:
    """The shipped tile of a kernel (a key of SPACE) for a shape."""
    tile = flash.choose(_AS[kernel], shape)
    return {name: tile[name] for name in SPACE[kernel]}


def fits(kernel: str, tile: dict[str, int], shape: Shape) -> bool:
    """Whether an architecture has the shared memory for a tile's operands."""
    rows = tile["BLOCK_M"] + 2 * tile["BLOCK_N"] * tile["num_stages"]
    limit = SHARED_LIMIT[flash.arch_class(shape.arch)]
    return rows * shape.width * max(2, shape.itemsize) <= limit
