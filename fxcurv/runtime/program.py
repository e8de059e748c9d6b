"""Program: the emitted graphs of a backend, and the plan of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from torch import Tensor, fx

from fxcurv.contractions.statistic import Statistic
from fxcurv.ir.nodes import module_of
from fxcurv.quantities.factors import Factor
from fxcurv.quantities.plan import Plan
from passes.pipeline import Emitted

__all__ = ["Program", "Verified", "sums_of"]


@dataclass
class Verified:
    """The comparisons of a program with its model that were made: of the gradients, and of outputs by batch size."""

    gradients: bool = False
    sizes: set[int] = field(default_factory=set)

    def forget(self) -> None:
        """Make all comparisons again, because one has failed."""
        self.gradients = False
        self.sizes.clear()


@dataclass(frozen=True, eq=False)
class Program:
    """A model compiled for quantities.

    `forward(*inputs)` returns the output, the tensors saved for backward, and sums over inputs;
    `backwards[factor](S, **saved)` returns sums over a chunk of columns; `plan` assembles the results. Both are graphs
    of `stages`, run by the backend. A `SecondPass` factor has its own backward graph, which also takes eigenvectors.
    """

    stages: Mapping[str, fx.GraphModule]
    forward: Callable[..., Any]
    backwards: Mapping[Factor, Callable[..., dict[str, Tensor]]]
    plan: Plan
    verified: Verified = field(default_factory=Verified)

    @classmethod
    def of(cls, emitted: Emitted) -> Program:
        """Return the program that runs the emitted graphs eagerly."""
        stages = emitted.stages
        return cls(stages, stages["forward"], {f: stages[f"backward[{f}]"] for f in emitted.factors}, emitted.plan)

    @cached_property
    def statistics(self) -> dict[str, Statistic]:
        """The statistic of each sum, by name."""
        sums = (item for gm in self.graphs for item in sums_of(gm).items())
        return {key: cast(Statistic, module_of(node)) for key, node in sums}

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs that run: forward, and one backward graph per factor, two if the factor has a second pass."""
        return self.stages["forward"], *(self.stages[f"backward[{factor}]"] for factor in self.backwards)

    @property
    def canonical(self) -> fx.GraphModule:
        """The model's computation in modules of the vocabulary."""
        return self.stages["canonical"]

    def admits(self, samples: int) -> bool:
        """Whether the model was traced along the branches that it takes for a batch of this size."""
        return samples in self.canonical.meta["sizes"]

    def given(self, factor: Factor) -> dict[str, tuple[int, ...] | None]:
        """Inputs of a backward graph besides S, in order: eigenvectors with shapes, saved tensors with None."""
        _, *rest = self.stages[f"backward[{factor}]"].graph.find_nodes(op="placeholder")
        return {str(node.target): node.meta.get("eigenvectors") for node in rest}

    def saved(self, factor: Factor) -> list[str]:
        """Names of the saved tensors that the backward graph of a factor reads."""
        return [name for name, eigenvectors in self.given(factor).items() if eigenvectors is None]


def sums_of(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The sums returned by a forward or backward graph, by name."""
    returned: Any = gm.graph.output_node().args[0]
    return dict(returned if isinstance(returned, dict) else returned[2])
