"""Tiles of the linear kernels: what ships, and what a tuner may try. Plain data, no Triton.

A walk's state [rows, BLOCK_C] stays in registers, with what a chunk reads and writes of it beside;
BLOCK_C follows from that. Chunks are fixed: 32 tokens keep the products inside a chunk small beside
those with the state; 64, which wgmma would want, spill beside 128 rows. With a decay per channel
products inside a chunk run on plain cores, and 16 tokens are what a tensor core takes at least.

A choice depends on dims and dtype alone: the order of sums is the same in any batch. Spills were
seen in compiled kernels; no number here was measured on a GPU.
"""

from __future__ import annotations

from attnforge.triton_kernels.flash.config import SHARED_LIMIT, Shape, arch_class

__all__ = ["CHUNK", "SCAN", "SPACE", "STEP_COLUMNS", "SUB", "Shape", "choose", "delta", "fits"]

CHUNK, SUB = 32, 16
STEP_COLUMNS = 32  # of a decode's program: K x 32 fp32 are up to 64 registers of 128 threads
# Of the diagonal scan: 32 tokens of 64 channels, a pair of fp32 each, are 32 registers of a thread.
SCAN = {"BLOCK_T": 32, "BLOCK_D": 64, "num_warps": 4}

SPACE = {"BLOCK_C": [16, 32, 64, 128], "num_warps": [2, 4, 8], "num_stages": [1, 2, 3]}


def choose(kernel: str, shape: Shape) -> dict[str, int]:
    """The shipped tile of walks with decays of "numbers" or "channels"; width: rows of a state."""
    if kernel == "channels":
        # Up to six tiles [16, rows] in fp32 beside the state.
        return {"BLOCK_C": 32, "num_warps": 4 if shape.width <= 64 else 8, "num_stages": 1}
    # Operands [32, rows] twice and a state of rows x 64: 4 warps spill.
    size = shape.width * shape.itemsize
    columns = 64 if size <= 256 else 32 if size <= 512 else 16
    return {"BLOCK_C": columns, "num_warps": 8, "num_stages": 2 if size <= 256 else 1}


def delta(kernel: str, width: int, itemsize: int) -> dict[str, int]:
    """The tile of the delta rules' kernel "fwd" or "bwd"; width: of keys, padded.

    The backward holds two states, and up to eight tiles [16, width] in fp32 beside them: with 4
    warps it spills in its loops from a width of 64 on.
    """
    forward = kernel == "fwd"
    columns = 32 if forward and itemsize == 2 else 16
    return {"BLOCK_C": columns, "num_warps": 4 if forward and width <= 64 else 8, "num_stages": 1}


def fits(kernel: str, tile: dict[str, int], shape: Shape) -> bool:
    """Whether an architecture has the shared memory for the operands of a chunk and the state."""
    chunk = CHUNK if kernel == "numbers" else SUB
    operands = chunk * (2 * shape.width + tile["BLOCK_C"]) * tile["num_stages"]
    elements = operands + shape.width * tile["BLOCK_C"] + chunk * chunk
    return elements * max(2, shape.itemsize) <= SHARED_LIMIT[arch_class(shape.arch)]
