"""Former names of public objects. They keep working, with a DeprecationWarning that gives the new name."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["Renamed", "warn_renamed"]


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is now called `new`, at the line that called the caller."""
    warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=stacklevel)


class Renamed:
    """A read-only attribute under its former name: `inputs_first = Renamed("in_out")`."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        warn_renamed(f"{owner.__name__}.{self.old}", f".{self.new}")
        return getattr(instance, self.new)
