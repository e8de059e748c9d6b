"""The options of `compile` besides model, loss and quantities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fxcurv.core.errors import QuantityError
from fxcurv.frontend.inputs import Output
from fxcurv.runtime.inductor import Backend

__all__ = ["OnUnsupported", "Options", "Verify"]

OnUnsupported = Literal["error", "skip", "fallback"]


Verify = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Options:
    """Options of `compile`; the memory budget is in bytes."""

    output: Output = None
    on_unsupported: OnUnsupported = "error"
    backend: Backend = "eager"
    memory_budget: int | None = None
    algorithms: Mapping[str, str] = field(default_factory=dict)
    verify: Verify = "first"

    def __post_init__(self) -> None:
        for name, kind in (("on_unsupported", OnUnsupported), ("backend", Backend), ("verify", Verify)):
            value = getattr(self, name)
            if value not in get_args(kind):
                remedy = f"choose one of {', '.join(get_args(kind))}"
                raise QuantityError(f"{name}={value!r}", remedy=remedy, code="FXC409")
        given: Any = self.algorithms
        if not isinstance(given, Mapping) or not all(isinstance(item, str) for pair in given.items() for item in pair):
            raise QuantityError(
                f"algorithms={given!r} is not a dict of names",
                remedy="map patterns of modules, parameters or statistics to algorithms, as {'conv1': 'unfold'}",
                code="FXC409",
            )
