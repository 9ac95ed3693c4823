"""Tiles of the walks of linear attention: what a tuner may try of them."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from attnforge.backends.triton._flash_tiles import padded
from attnforge.registry.space import Config, SearchSpace
from attnforge.registry.spec import Request
from attnforge.triton_kernels.linear import config as tiles_of

__all__ = ["space"]


def _kernel(request: Request) -> str:
    by_channel = not request.features.isdisjoint({"key_gate", "value_gate"})
    return "channels" if by_channel else "numbers"


def _shape(request: Request) -> tiles_of.Shape:
    width = max(padded(request.dim(name) or 1) for name in ("head_dim", "v_head_dim"))
    return tiles_of.Shape(request.arch, request.dtype.itemsize, width)


def _fits(config: Config, request: Request) -> str | None:
    tile = {name: int(value) for name, value in config.items()}
    if tiles_of.fits(_kernel(request), tile, _shape(request)):
        return None
    return f"the tile is too large for the shared memory of {request.arch}"


@cache
def _digest() -> str:
    """A digest of all that the kernels are made of."""
    root = Path(str(tiles_of.__file__)).parents[1]
    digest = hashlib.sha256()
    for path in sorted((*root.glob("*.py"), *root.glob("linear/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def space() -> SearchSpace:
    """Columns of a program, warps and stages: of the walks that a request's gate needs."""
    return SearchSpace(
        tiles_of.SPACE,
        lambda request: tiles_of.choose(_kernel(request), _shape(request)),
        "the table of triton_kernels/linear/config.py",
        constraints=(_fits,),
        environment=lambda: {"triton": version("triton")},
        source=_digest,
    )
