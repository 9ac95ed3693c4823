"""Requirements of a kernel as small objects: called with a Request, they return None or a reason.

Their text (``str``) is what ``attnforge list`` and the support matrix of the docs show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnforge.registry.spec import Request

__all__ = ["Arch", "Available", "Device", "Dim", "Dtypes", "Features", "Without", "dtype_name"]


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


class Device:
    """The tensors live on one of these device types."""

    def __init__(self, *types: str) -> None:
        self.types = types

    def __call__(self, request: Request, /) -> str | None:
        if request.device in self.types:
            return None
        return f"needs tensors on {' or '.join(self.types)}; they are on {request.device}"

    def __str__(self) -> str:
        return f"device {'/'.join(self.types)}"


@dataclass(frozen=True)
class Arch:
    """The GPU's compute capability lies in ``lowest .. highest`` (90 means sm_90)."""

    lowest: int
    highest: int = 1 << 30

    def __call__(self, request: Request, /) -> str | None:
        digits = request.arch.removeprefix("sm_").rstrip("af")
        if digits.isdigit() and self.lowest <= int(digits) <= self.highest:
            return None
        return f"needs {self}; the device is {request.arch or 'of unknown architecture'}"

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return f"arch sm_{self.lowest}"
        top = "" if self.highest == 1 << 30 else f"..sm_{self.highest}"
        return f"arch sm_{self.lowest}{top or ' or newer'}"


class Dtypes:
    """q, k and v are of one of these dtypes."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        self.dtypes = dtypes

    def __call__(self, request: Request, /) -> str | None:
        if request.dtype in self.dtypes:
            return None
        names = ", ".join(map(dtype_name, self.dtypes))
        return f"dtype {dtype_name(request.dtype)} is not served ({names})"

    def __str__(self) -> str:
        return f"dtype {'/'.join(map(dtype_name, self.dtypes))}"


class Dim:
    """A size is one of ``also``, or a multiple of ``step`` in ``lowest .. highest``."""

    def __init__(
        self, name: str, lowest: int, highest: int, step: int = 1, also: tuple[int, ...] = ()
    ) -> None:
        self.name, self.lowest, self.highest, self.step = name, lowest, highest, step
        self.also = also

    def __call__(self, request: Request, /) -> str | None:
        size = request.dim(self.name)
        if size is None or size in self.also:
            return None
        if self.lowest <= size <= self.highest and size % self.step == 0:
            return None
        return f"{self.name} {size} is not served ({self._range()})"

    def _range(self) -> str:
        text = f"{self.lowest}..{self.highest}"
        if self.step != 1:
            text += f" in steps of {self.step}"
        return ", ".join([text, *map(str, self.also)])

    def __str__(self) -> str:
        return f"{self.name} {self._range()}"


class Features:
    """Nothing but these features is used."""

    def __init__(self, *supported: str) -> None:
        self.supported = frozenset(supported)

    def __call__(self, request: Request, /) -> str | None:
        missing = sorted(request.features - self.supported)
        return f"does not have {', '.join(missing)}" if missing else None

    def __str__(self) -> str:
        return f"features {', '.join(sorted(self.supported)) or 'none'}"


class Without:
    """None of these features is used; for a kernel that has all others."""

    def __init__(self, *refused: str) -> None:
        self.refused = frozenset(refused)

    def __call__(self, request: Request, /) -> str | None:
        used = sorted(request.features & self.refused)
        return f"does not have {', '.join(used)}" if used else None

    def __str__(self) -> str:
        return f"no {', '.join(sorted(self.refused))}"


class Available:
    """Something beside the request is there: a library, a toolkit.

    ``probe`` returns None or the reason for its absence. It runs at selection, and its answer
    must not change within a process.
    """

    def __init__(self, what: str, probe: Callable[[], str | None]) -> None:
        self.what, self.probe = what, probe

    def __call__(self, request: Request, /) -> str | None:
        return self.probe()

    def __str__(self) -> str:
        return self.what
