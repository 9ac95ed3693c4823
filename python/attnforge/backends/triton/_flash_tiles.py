"""Tiles of the Triton flash kernels: the constants of a launch, and what a tuner may try."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from attnforge.backends.triton._flash_mods import HEAVY
from attnforge.registry.select import device_arch
from attnforge.registry.space import Config, SearchSpace
from attnforge.registry.spec import Request
from attnforge.triton_kernels.flash import config as tiles_of

__all__ = ["padded", "sizes", "space"]


def padded(size: int) -> int:
    """A head dim as tiles have it: a power of two, and what a tensor core takes at least.

    At most 512: what is left of a larger one is a second tile.
    """
    return max(16, min(512, 1 << (size - 1).bit_length()))


def sizes(
    kernel: str, q: Tensor, v: Tensor, heavy: bool = False, config: Config | None = None,
    *, itemsize: int = 0, tables: Any = tiles_of,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time constants of a kernel: head dims, padded ones, the tile.

    config: of the launcher; the kernel's part of it begins with its name where there are several.
    itemsize: bytes of what is multiplied, where it is wider than q. tables: the module that has the
    tiles.
    """
    d, dv = q.shape[-1], v.shape[-1]
    widths = {"BLOCK_D": padded(d), "BLOCK_DV": padded(dv)}
    if config is not None:
        own = {name.removeprefix(f"{kernel}."): value for name, value in config.items()}
        return {"D": d, "DV": dv, **widths, **{name: own[name] for name in tables.SPACE[kernel]}}
    width, arch = max(widths.values()), device_arch(q.device)[1]
    shape = tiles_of.Shape(arch, max(itemsize, v.dtype.itemsize), width, heavy)
    return {"D": d, "DV": dv, **widths, **tables.choose(kernel, shape)}


def _shape(request: Request) -> tiles_of.Shape:
    width = max(padded(request.dim(name) or 1) for name in ("head_dim", "v_head_dim"))
    heavy = not HEAVY.isdisjoint(request.features)
    return tiles_of.Shape(request.arch, request.dtype.itemsize, width, heavy)


@cache
def _source_digest() -> str:
    """A digest of all that the kernels are made of."""
    root = Path(str(tiles_of.__file__)).parents[1]
    digest = hashlib.sha256()
    for path in sorted((*root.glob("*.py"), *root.glob("flash/*.py"), *root.glob("paged/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def space(*kernels: str, tables: Any = tiles_of) -> SearchSpace:
    """Tiles of a launcher's kernels; with several, a parameter begins with its kernel's name.

    tables: the module that has the tiles.
    """
    one = len(kernels) == 1

    def named(kernel: str, values: dict[str, Any]) -> dict[str, Any]:
        return values if one else {f"{kernel}.{name}": x for name, x in values.items()}

    def fits(config: Config, request: Request) -> str | None:
        for kernel in kernels:
            names = named(kernel, dict.fromkeys(tables.SPACE[kernel]))
            tile = {n.split(".")[-1]: int(config[n]) for n in names}
            if not tables.fits(kernel, tile, _shape(request)):
                return f"the tile of {kernel} is too large for, or unknown to, {request.arch}"
        return None

    return SearchSpace(
        {n: x for kernel in kernels for n, x in named(kernel, tables.SPACE[kernel]).items()},
        lambda request: {
            n: x
            for kernel in kernels
            for n, x in named(kernel, tables.choose(kernel, _shape(request))).items()
        },
        f"the table of triton_kernels/{tables.__name__.split('.')[-2]}/config.py",
        constraints=(fits,),
        environment=lambda: {"triton": version("triton")},
        source=_source_digest,
    )
