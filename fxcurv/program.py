"""What compiling produces: the graph of every stage, and the list of results to make of their sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxcurv.quantities import Factor, Quantity, Used

__all__ = ["Job", "Program"]


@dataclass(frozen=True)
class Job:
    """One result to assemble: a quantity of a parameter (and of what is joined to it), from sums by their names."""

    name: str
    quantity: Quantity
    used: Used
    parameters: tuple[str, ...]
    sums: Mapping[str, str]

    @property
    def status(self) -> str:
        """`exact`, or `approx(<name>)` where something else than the definition is reported."""
        approximation = self.quantity.approximation(self.used)
        return f"approx({approximation})" if approximation else "exact"


@dataclass(frozen=True)
class Program:
    """A model compiled for quantities.

    `forward(*inputs)` returns the output, what the pullback keeps, and sums over inputs; `backwards[factor](S, **kept)`
    returns sums over a chunk of columns; `jobs` says what is made of the sums, and `statuses[quantity][parameter]` what
    each parameter gets.
    """

    stages: Mapping[str, fx.GraphModule]
    forward: fx.GraphModule
    backwards: Mapping[Factor, fx.GraphModule]
    jobs: tuple[Job, ...]
    quantities: Mapping[str, Quantity]
    statuses: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def canonical(self) -> fx.GraphModule:
        """The model's computation, as modules of the vocabulary."""
        return self.stages["canonical"]
