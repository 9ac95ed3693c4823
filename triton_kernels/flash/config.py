"""Tile sizes of the flash kernels: what ships, and what a tuner may try. Plain data, no Triton.

A choice depends on the architecture, the size of an element and the padded head dim, never on the
batch or on lengths: the order of sums, and so every bit of a result, is the same in any batch.

No number here was measured yet: they follow from registers and shared memory, as written beside
them, and ``budgets.json`` holds what the compiler makes of them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SHARED_LIMIT", "SPACE", "Shape", "arch_class", "choose", "shared_bytes"]

# Bytes of shared memory that one block may have, by class of architecture.
SHARED_LIMIT = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}


class Shape(NamedTuple):
    """What a choice depends on. width: the larger of the padded head dims of K and V."""

    arch: str
    itemsize: int
    width: int


def arch_class(arch: str) -> str:
    """``sm_89`` -> ``sm_86``: the class whose table serves an architecture."""
    digits = arch.removeprefix("sm_").rstrip("af")
    number = int(digits) if digits.isdigit() else 86  # the interpreter, or unknown: the smallest
    if number in (80, 87):
        return "sm_80"
    if 90 <= number < 100:
        return "sm_90"
    if 100 <= number < 120:
        return "sm_100"
    return "sm_86"  # consumer parts, Ampere to Blackwell: 99 KiB of shared memory


def _tile(m: int, n: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


_FP32 = {  # true fp32 products run without tensor cores and keep operands in registers: small tiles
    64: _tile(64, 32, 4, 2),
    128: _tile(32, 32, 4, 2),
    256: _tile(16, 32, 4, 1),
}

# (class, width of a 16-bit head) -> tile. acc takes BLOCK_M * width / (32 * warps) registers of a
# thread and S half of it or less: above about 160 together the compiler spills.
_FWD = {
    ("sm_80", 64): _tile(128, 64, 4, 3),  # acc 64, S 64; 2 blocks of 64 KiB per SM
    ("sm_80", 128): _tile(128, 64, 8, 3),  # acc 64, S 32; 128 KiB
    ("sm_80", 256): _tile(64, 64, 8, 2),  # acc 64, S 16; 160 KiB
    ("sm_86", 64): _tile(128, 64, 4, 2),  # as sm_80 with less shared memory
    ("sm_86", 128): _tile(128, 32, 8, 2),
    ("sm_86", 256): _tile(64, 32, 8, 1),
    ("sm_90", 64): _tile(128, 128, 8, 3),  # wgmma of 64 rows per 4 warps; acc 32, S 64; 112 KiB
    ("sm_90", 128): _tile(128, 128, 8, 2),  # acc 64, S 64; 160 KiB
    ("sm_90", 256): _tile(128, 64, 8, 2),  # acc 128, S 32; 192 KiB
    ("sm_100", 64): _tile(128, 128, 4, 3),  # accumulators live in tensor memory
    ("sm_100", 128): _tile(128, 128, 8, 2),
    ("sm_100", 256): _tile(128, 64, 8, 2),
}

_TABLES = {"fwd": (_FWD, _FP32)}

SPACE = {
    "fwd": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4],
    },
}


def choose(kernel: str, shape: Shape) -> dict[str, int]:
    """The shipped tile of a kernel (a key of SPACE) for a shape."""
    half, full = _TABLES[kernel]
    width = max(64, shape.width)
    if shape.itemsize == 4:
        return dict(full[width])
    return dict(half[arch_class(shape.arch), width])


def shared_bytes(config: dict[str, int], shape: Shape) -> int:
    """About what a tile needs: BLOCK_M rows of one tensor, and num_stages of BLOCK_N rows of two."""
    rows = config["BLOCK_M"] + 2 * config["BLOCK_N"] * max(1, config["num_stages"])
    return rows * shape.width * shape.itemsize
