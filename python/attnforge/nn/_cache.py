"""Caches of layers: buffers of tokens that grow by doubling, and tails that are cut."""

from __future__ import annotations

from torch import Tensor

__all__ = ["TokenCache"]


class TokenCache:
    """Made empty, filled by a layer. All sequences of a batch have one length."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: dict[str, Tensor] = {}
        self._tails: dict[str, Tensor] = {}

    def append(self, name: str, used: int, new: Tensor, unit: int) -> Tensor:
        """The buffer with ``new`` behind its first ``used`` rows, a multiple of ``unit`` long."""
        old = self._buffers.get(name)
        need = used + new.shape[1]
        if old is None or old.shape[1] < need:
            rows = max(need, 2 * used, unit)
            rows = -(-rows // unit) * unit
            grown = new.new_empty((new.shape[0], rows, *new.shape[2:]))
            if old is not None:
                grown[:, :used] = old[:, :used]
            self._buffers[name] = old = grown
        old[:, used:need] = new
        return old
