"""Registration of subclasses by name."""

from __future__ import annotations

from typing import TypeVar

from fxcurv.core.errors import SpecError

__all__ = ["register"]

T = TypeVar("T")


def register(kinds: dict[str, type[T]], name: str, cls: type[T], what: str) -> None:
    """Enter `cls` under `name`; a class defined again, as by a reload, replaces itself.

    Raises a SpecError (FXC302) if another class has the name.
    """
    known = kinds.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise SpecError(f"a second {what} is named {name}", remedy="rename it", code="FXC302")
    kinds[name] = cls
