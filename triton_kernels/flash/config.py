"""Tile sizes of the flash kernels: what ships, and what a tuner may try. Plain data, no Triton.

A choice depends on the architecture, the size of an element and the padded head dim, never on the
batch or on lengths: the order of sums, and so every bit of a result, is the same in any batch.

No number here was measured yet: they follow from registers and shared memory, as written beside
them, and ``budgets.json`` holds what the compiler makes of them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SHARED_LIMIT", "SPACE", "Shape", "arch_class", "choose", "fits", "merge_rows"]

# Bytes of shared memory that one block may have, by class of architecture.
SHARED_LIMIT = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}


class Shape(NamedTuple):
    """What a choice depends on. itemsize: of V. width: the larger padded head dim of K and V.

    heavy: features of single scores that load a tile of their own or need many registers.
    """

    arch: str
    itemsize: int
    width: int
    heavy: bool = False


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


# fp32 products run without tensor cores and keep operands in registers: small tiles everywhere.
_FP32 = {64: _tile(64, 32, 8, 2), 128: _tile(32, 32, 8, 2), 256: _tile(16, 32, 8, 1)}
_FP32[512] = _tile(16, 16, 8, 1)
_DECODE_FP32 = {64: _tile(16, 32, 4, 2), 128: _tile(16, 32, 8, 2), 256: _tile(16, 32, 8, 1)}
_DECODE_FP32[512] = _tile(16, 16, 8, 1)
_BWD_FP32 = {64: _tile(32, 32, 4, 1), 128: _tile(16, 32, 8, 1), 256: _tile(16, 16, 4, 1)}

# (class, width) -> tile of a 16-bit kernel. A thread of BLOCK_M / (32 warps) rows holds ``width``
# registers of acc and BLOCK_N of S for each: above about 160 together the compiler spills. Spills
# are meant in a loop (``hot_spills`` of the table), with or without masks.
_FWD = {
    ("sm_80", 64): _tile(128, 64, 4, 3),  # acc 64, S 64; 48 KiB, so 2 blocks fit an SM
    ("sm_80", 128): _tile(128, 64, 8, 3),  # acc 64, S 32; 96 KiB
    ("sm_80", 256): _tile(64, 64, 8, 2),  # acc 64, S 16; 104 KiB
    ("sm_80", 512): _tile(32, 32, 8, 1),  # acc 64; 64 rows spill
    ("sm_86", 64): _tile(128, 64, 4, 2),  # as sm_80 with less shared memory
    ("sm_86", 128): _tile(128, 32, 8, 2),
    ("sm_86", 256): _tile(64, 32, 8, 1),
    ("sm_86", 512): _tile(32, 32, 8, 1),
    ("sm_90", 64): _tile(128, 128, 8, 3),  # wgmma: 64 rows per 4 warps; acc 32, S 64; 112 KiB
    ("sm_90", 128): _tile(128, 128, 8, 2),  # acc 64, S 64; 160 KiB
    ("sm_90", 256): _tile(128, 64, 8, 2),  # acc 128, S 32; 192 KiB
    ("sm_90", 512): _tile(32, 32, 8, 1),  # mma.sync: 64 rows spill
    ("sm_100", 64): _tile(128, 64, 8, 3),  # as sm_90; BLOCK_N 128 spills
    ("sm_100", 128): _tile(128, 64, 8, 3),  # the same
    ("sm_100", 256): _tile(128, 64, 8, 2),
    ("sm_100", 512): _tile(64, 64, 8, 1),
}

# Decode streams the cache: 16 rows are what a tensor core takes at least, and what counts are the
# bytes in flight per SM (num_stages * BLOCK_N keys). BLOCK_N divides a split of 2048.
_DECODE = {
    (arch, width): _tile(16, 64 if width < 256 else 32, 4, 2 if arch == "sm_86" else 3)
    for arch in SHARED_LIMIT
    for width in (64, 128, 256)
} | {
    ("sm_80", 512): _tile(16, 32, 8, 2),  # K 36 KiB and V 32 KiB in a stage
    ("sm_86", 512): _tile(16, 32, 8, 1),
    ("sm_90", 512): _tile(16, 32, 8, 2),
    ("sm_100", 512): _tile(16, 32, 8, 2),
}

# dK, dV: BLOCK_N keys stay (two accumulators), BLOCK_M rows stream.
_DKDV = {
    ("sm_80", 64): _tile(32, 128, 8, 2),  # accs 32 + 32, S and dP 16 + 16; BLOCK_M 64 spills
    ("sm_80", 128): _tile(64, 64, 8, 2),  # accs 32 + 32, S and dP 16 + 16
    ("sm_80", 256): _tile(32, 32, 8, 1),  # accs 32 + 32
    ("sm_86", 64): _tile(32, 128, 8, 2),
    ("sm_86", 128): _tile(32, 64, 8, 1),
    ("sm_86", 256): _tile(16, 32, 8, 1),
    ("sm_90", 64): _tile(64, 128, 8, 2),  # accs 32 + 32, S and dP 32 + 32
    ("sm_90", 128): _tile(32, 128, 8, 2),  # accs 64 + 64, S and dP 16 + 16; BLOCK_M 64 spills
    ("sm_90", 256): _tile(32, 32, 8, 1),  # mma.sync: the tiles of wgmma spill in the loop
    ("sm_100", 64): _tile(64, 128, 8, 2),
    ("sm_100", 128): _tile(32, 128, 8, 2),
    ("sm_100", 256): _tile(32, 32, 8, 1),  # mma.sync: two accs would fill the tensor memory
}

# dQ: BLOCK_M rows stay (one accumulator, Q and dO as operands), BLOCK_N keys stream.
_DQ = {
    ("sm_80", 64): _tile(128, 64, 8, 2),
    ("sm_80", 128): _tile(64, 64, 8, 2),
    ("sm_80", 256): _tile(64, 32, 8, 1),
    ("sm_86", 64): _tile(128, 32, 8, 2),
    ("sm_86", 128): _tile(64, 32, 8, 1),
    ("sm_86", 256): _tile(32, 32, 8, 1),
    ("sm_90", 64): _tile(128, 64, 8, 3),
    ("sm_90", 128): _tile(128, 64, 8, 2),
    ("sm_90", 256): _tile(32, 32, 8, 1),  # mma.sync: the tiles of wgmma spill in the loop
    ("sm_100", 64): _tile(128, 64, 8, 3),
    ("sm_100", 128): _tile(128, 64, 8, 2),
    ("sm_100", 256): _tile(64, 32, 8, 1),  # BLOCK_N 64 spills with features
}

# (kernel, width) -> tile of a 16-bit kernel with heavy features, for every class: tiles of masks,
# biases and partners of turned channels are staged in shared memory like K and V, so that there is
# one stage, and S has a few values more beside it.
_HEAVY = {
    ("fwd", 64): _tile(64, 64, 4, 1),
    ("fwd", 128): _tile(64, 32, 4, 1),
    ("fwd", 256): _tile(32, 32, 4, 1),
    ("fwd", 512): _tile(32, 32, 8, 1),
    ("decode", 64): _tile(16, 64, 4, 1),
    ("decode", 128): _tile(16, 32, 4, 1),
    ("decode", 256): _tile(16, 32, 8, 1),
    ("decode", 512): _tile(16, 32, 8, 1),
    ("dkdv", 64): _tile(32, 64, 8, 1),
    ("dkdv", 128): _tile(32, 32, 8, 1),
    ("dkdv", 256): _tile(16, 32, 8, 1),
    ("dq", 64): _tile(64, 32, 8, 1),
    ("dq", 128): _tile(64, 32, 8, 1),
    ("dq", 256): _tile(32, 32, 4, 1),
}

_TABLES = {
    "fwd": (_FWD, _FP32),
    "decode": (_DECODE, _DECODE_FP32),
    "dkdv": (_DKDV, _BWD_FP32),
    "dq": (_DQ, _BWD_FP32),
}

# What a tuner may try; ``fits`` says what to leave out.
SPACE = {
    "fwd": {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4],
        "USE_TMA": [0, 1],
    },
    "decode": {
        "BLOCK_M": [16, 32, 64],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [2, 4, 8],
        "num_stages": [1, 2, 3, 4],
    },
    "dkdv": {
        "BLOCK_M": [16, 32, 64],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3],
    },
    "dq": {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3],
    },
}


# Descriptors are off until a GPU shows that they are faster.
_OPTIONS = {"fwd": {"USE_TMA": 0}}


def choose(kernel: str, shape: Shape) -> dict[str, int]:
    """The shipped tile of a kernel (a key of SPACE) for a shape."""
    return {**_tile_of(kernel, shape), **_OPTIONS.get(kernel, {})}


def _tile_of(kernel: str, shape: Shape) -> dict[str, int]:
    half, full = _TABLES[kernel]
    width = max(64, shape.width)
    if shape.itemsize == 4:
        stages = 1 if shape.heavy else full[width]["num_stages"]
        return {**full[width], "num_stages": stages}
    # Widening fp8 takes registers that the forward's larger tiles have none left of.
    if shape.heavy or (shape.itemsize == 1 and kernel == "fwd"):
        return dict(_HEAVY[kernel, width])
    return dict(half[arch_class(shape.arch), width])


def merge_rows(rows: int, width: int) -> int:
    """Rows of a merge program: 4096 fp32 elements of a tile, no more rows than there are.

    Rows do not meet in a sum, so this may depend on their number.
    """
    return max(1, min(4096 // width, 1 << (rows - 1).bit_length()))


def fits(kernel: str, tile: dict[str, int], shape: Shape) -> bool:
    """Whether an architecture has the shared memory for a tile's operands, and what it uses."""
    if tile.get("USE_TMA", 0) and arch_class(shape.arch) not in ("sm_90", "sm_100"):
        return False
    streamed, held = ("BLOCK_M", "BLOCK_N") if kernel == "dkdv" else ("BLOCK_N", "BLOCK_M")
    tensors_held = 1 if kernel in ("fwd", "decode") else 2
    rows = tensors_held * tile[held] + 2 * tile[streamed] * tile["num_stages"]
    return rows * shape.width * max(2, shape.itemsize) <= SHARED_LIMIT[arch_class(shape.arch)]
