"""Memory that tells: NaN fences, guard pages, huge lazy buffers, poisoned uninitialised outputs.

A read past a tensor's end usually lands in some other live allocation and gives a plausible
number. Here it gives NaN (``fenced``) or SIGSEGV (``guarded``), and a write shows in ``intact``.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnforge.testing.compare import same_bits

__all__ = ["FENCE", "Fenced", "far_view", "fenced", "guarded", "lazy", "poisoned_memory"]

FENCE = 512  # elements on either side: more than any vector step reads ahead
_PROT_NONE = 0


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else -1


@dataclass(frozen=True)
class Fenced:
    """A tensor between two margins of poison in one buffer."""

    tensor: Tensor
    buffer: Tensor
    snapshot: Tensor

    def intact(self) -> bool:
        """Whether neither the margins nor the tensor changed since."""
        return same_bits(self.buffer, self.snapshot)


def fenced(x: Tensor, margin: int = FENCE) -> Fenced:
    """A copy of ``x`` (contiguous) with ``margin`` poisoned elements before and behind it.

    Poison is NaN, or -1 for integers. ``margin`` also sets the alignment: an odd one puts a
    16-bit tensor at an address that is a multiple of 2 alone.
    """
    buffer = torch.full((x.numel() + 2 * margin,), _poison(x.dtype), dtype=x.dtype)
    view = buffer[margin : margin + x.numel()].view(x.shape)
    with torch.no_grad():
        view.copy_(x)
    return Fenced(view, buffer, buffer.clone())


def guarded(x: Tensor, side: str = "end") -> Tensor:
    """A contiguous copy of ``x`` that touches an unmapped page: one element too far is SIGSEGV.

    side: ``"end"`` puts the last byte before the page, ``"start"`` the first byte behind one.
    """
    page = mmap.PAGESIZE
    size = x.numel() * x.dtype.itemsize
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for wall in (address, address + page + room):
        if libc.mprotect(wall, page, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    if x.numel() == 0:
        return x.detach().clone()
    offset = page + (room - size if side == "end" else 0)
    # The tensor keeps the mapping alive; the walls go with it.
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
    flat.copy_(x.detach().reshape(-1))
    return flat.view(x.shape)


def lazy(numel: int, dtype: torch.dtype) -> Tensor:
    """``numel`` zeros as address space only: pages that nobody touches cost no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else one touched element costs 2 MiB
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def far_view(x: Tensor, seq_stride: int, head_stride: int, beyond: int = 5) -> Tensor:
    """A copy of ``x`` [1, S, H, D] in a lazy buffer with huge strides, behind 2^31 elements.

    It begins at 2^31 + ``beyond``: a multiple of 8 is an address that TMA takes as it is.
    """
    _, s, h, d = x.shape
    base = (1 << 31) + beyond
    buffer = lazy(base + (s - 1) * seq_stride + (h - 1) * head_stride + d, x.dtype)
    view = buffer.as_strided(x.shape, (1 << 33, seq_stride, head_stride, 1), base)
    view.copy_(x)
    return view


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` is NaN (integers: the largest), as are the kernels' workspaces.

    This is ``torch.use_deterministic_algorithms`` with its fill of uninitialised memory.
    """
    from torch.utils import deterministic

    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined, unused-ignore]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined, unused-ignore]
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined, unused-ignore]
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
