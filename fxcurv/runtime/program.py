"""Program: the emitted graphs as a backend runs them, and the plan of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor, fx

from fxcurv.contractions.statistic import Statistic
from fxcurv.ir.nodes import module_of
from fxcurv.quantities.factors import Factor
from fxcurv.quantities.plan import Plan
from passes.pipeline import Emitted

__all__ = ["Program", "sums_of"]


@dataclass(frozen=True, eq=False)
class Program:
    """A model compiled for quantities.

    `forward(*inputs)` returns the output, what the pullback keeps, and sums over inputs; `backwards[factor](S, **kept)`
    returns sums over a chunk of columns; `plan` says what is made of them. Both are those of the `stages`, as a backend
    runs them. A factor that is taken `SecondPass` has a backward graph of its own, which is given eigenvectors besides.
    """

    stages: Mapping[str, fx.GraphModule]
    forward: Callable[..., Any]
    backwards: Mapping[Factor, Callable[..., dict[str, Tensor]]]
    plan: Plan

    @classmethod
    def of(cls, emitted: Emitted) -> Program:
        """The program that runs the emitted graphs as they stand."""
        stages = emitted.stages
        return cls(stages, stages["forward"], {f: stages[f"backward[{f}]"] for f in emitted.factors}, emitted.plan)

    @cached_property
    def statistics(self) -> dict[str, Statistic]:
        """What computes each sum."""
        sums = (item for gm in self.graphs for item in sums_of(gm).items())
        return {key: cast(Statistic, module_of(node)) for key, node in sums}

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs that run: forward, and one backward graph per factor, two where a factor is taken again."""
        return self.stages["forward"], *(self.stages[f"backward[{factor}]"] for factor in self.backwards)

    @property
    def canonical(self) -> fx.GraphModule:
        """The model's computation, as modules of the vocabulary."""
        return self.stages["canonical"]

    def given(self, factor: Factor) -> dict[str, tuple[int, ...] | None]:
        """What the backward graph of a factor reads besides S, in order: eigenvectors with their shapes, and `kept`."""
        _, *rest = self.stages[f"backward[{factor}]"].graph.find_nodes(op="placeholder")
        return {str(node.target): node.meta.get("eigenvectors") for node in rest}

    def saved(self, factor: Factor) -> list[str]:
        """What the backward graph of a factor reads of what the forward graph keeps."""
        return [name for name, eigenvectors in self.given(factor).items() if eigenvectors is None]


def sums_of(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The sums that a forward or backward graph returns, by name."""
    returned: Any = gm.graph.output_node().args[0]
    return dict(returned if isinstance(returned, dict) else returned[2])
