"""Tile sizes of the paged kernels: what ships, and what a tuner may try. Plain data, no Triton.

``few`` serves sequences whose packed rows fit 16 rows of a tensor core, ``many`` the others. What
was said of flash holds: a choice depends on nothing that a batch could change, and no number was
measured yet; ``budgets.json`` holds what the compiler makes of them.
"""

from __future__ import annotations

from attnforge.triton_kernels.flash import config as flash
from attnforge.triton_kernels.flash.config import SHARED_LIMIT, Shape

__all__ = ["FEW", "SPACE", "append_rows", "choose", "fits", "row_width", "stages"]

FEW = 16  # packed rows of a sequence

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
    """The shipped tile of a kernel (a key of SPACE) for a shape; codes are heavy."""
    light = shape._replace(heavy=False)
    if kernel == "few":  # streams the cache: as flash, with registers for codes and trees
        tile = flash.choose("decode", light)
        return {**tile, "num_warps": 8} if shape.heavy else tile
    tile = flash.choose("fwd", shape)
    # Pointers of each key take the registers that flash's longest tiles need.
    short = flash.arch_class(shape.arch) in ("sm_80", "sm_86")
    tile["BLOCK_N"] = min(tile["BLOCK_N"], 32 if short else 64)
    if shape.heavy:
        tile["num_warps"] = 8
    return {name: tile[name] for name in SPACE[kernel]}


def stages(tile: dict[str, int], page_size: int) -> int:
    """Stages of the compiler's pipeline for a tile of ``num_stages``.

    Where keys are looked up one by one, loads of entries and of keys share them.
    """
    alone = page_size % tile["BLOCK_N"] == 0 or tile["num_stages"] == 1
    return tile["num_stages"] if alone else 2 * tile["num_stages"] - 1


def fits(kernel: str, tile: dict[str, int], shape: Shape) -> bool:
    """Whether an architecture has the shared memory for a tile's operands."""
    rows = tile["BLOCK_M"] + 2 * tile["BLOCK_N"] * tile["num_stages"]
    limit = SHARED_LIMIT[flash.arch_class(shape.arch)]
    return rows * shape.width * max(2, shape.itemsize) <= limit


def row_width(size: int) -> int:
    """A head dim as the tiles of ``append`` have it."""
    return max(2, 1 << (size - 1).bit_length())


def append_rows(width: int) -> int:
    """Rows of an append's program: 4096 elements of a tile."""
    return max(1, min(64, 4096 // width))
