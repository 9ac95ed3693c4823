"""What `enable()` gives back: something that can be undone."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

__all__ = ["Undo"]


class Undo(AbstractContextManager[Any]):
    """What `remove()` takes back; so does the end of a ``with`` block, which gives the object."""

    @abstractmethod
    def remove(self) -> None:
        """Undo it; a second time does nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
